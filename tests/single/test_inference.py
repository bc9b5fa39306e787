"""Tokens and logits of inference are transformers' own, and what cannot be done is said."""

import gc
import weakref

import pytest
import torch
import transformers as hf
from transformers.cache_utils import Cache

import zgraph
from tests.deep import DEEP, deep
from zgraph.codegen import quantised
from zgraph.errors import ContextLengthError, InferenceError, QuantisationError, UsageError
from zgraph.inference.calibration import outlier_columns
from zgraph.inference.evaluation import _Rounded, as_integers
from zgraph.inference.prompts import Prompts, pieces
from zgraph.inference.sampling import Sampling
from zgraph.inference.slots import LayerShape, SlotLayer

SMALL = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
GROUPED = {**SMALL, "intermediate_size": 64, "num_key_value_heads": 2}

FAMILIES = {
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**GROUPED)),
    "one layer": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**{**GROUPED, "num_hidden_layers": 1})),
    "gemma2": lambda: hf.Gemma2ForCausalLM(hf.Gemma2Config(**GROUPED, head_dim=8, sliding_window=6)),
    "gpt2": lambda: hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=96, n_embd=32, n_layer=2, n_head=4, n_positions=96)),
    "qwen3": lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**GROUPED, head_dim=8)),
    "mistral": lambda: hf.MistralForCausalLM(hf.MistralConfig(**GROUPED, sliding_window=6)),
}
USUAL = ("llama", "gemma2", "gpt2")


def made(family: str) -> torch.nn.Module:
    """A small model whose likeliest tokens vary."""
    torch.manual_seed(0)
    model = FAMILIES[family]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    return model


@pytest.fixture(scope="module")
def llama():
    return made("llama")


@pytest.fixture(scope="module")
def inference(llama):
    return zgraph.infer(llama, max_batch=4, max_len=96)


def prompts(num_rows: int = 3, length: int = 70) -> dict[str, torch.Tensor]:
    """Prompts of 10, of nearly all, and of all tokens, padded on the left."""
    ids = torch.randint(3, 96, (num_rows, length), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :-10], mask[1:2, :5] = 0, 0
    return {"input_ids": ids * mask, "attention_mask": mask}


def own_logits(model: torch.nn.Module, given: dict[str, torch.Tensor]) -> torch.Tensor:
    """Logits of the model's own forward for the token behind each prompt."""
    places = (given["attention_mask"].cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        return model(**given, position_ids=places).logits[:, -1]


@pytest.mark.parametrize("family", [*FAMILIES] if DEEP else USUAL)
def test_greedy_tokens_and_logits_are_transformers(family, request):
    model = request.getfixturevalue("llama") if family == "llama" else made(family)
    found = request.getfixturevalue("inference") if family == "llama" else zgraph.infer(model, max_batch=4, max_len=96)
    given = prompts()
    wanted = model.generate(**given, max_new_tokens=20, do_sample=False, pad_token_id=0)
    assert torch.equal(found.generate(**given, max_new_tokens=20, pad_token_id=0), wanted)
    own = own_logits(model, given)
    assert (found.logits(**given) - own).abs().max() <= 1e-5 * own.abs().max()


def test_draws_are_transformers(llama, inference):
    given, options = prompts(), {"do_sample": True, "temperature": 0.8, "top_k": 20, "top_p": 0.9, "pad_token_id": 0}
    torch.manual_seed(5)
    wanted = llama.generate(**given, max_new_tokens=8, **options)
    torch.manual_seed(5)
    assert torch.equal(inference.generate(**given, max_new_tokens=8, **options), wanted)


def test_rows_end_at_stop_tokens(llama, inference):
    given = prompts()
    free = inference.generate(**given, max_new_tokens=8)
    stop = int(free[0, 72])
    wanted = llama.generate(**given, max_new_tokens=8, do_sample=False, eos_token_id=stop, pad_token_id=1)
    assert torch.equal(inference.generate(**given, max_new_tokens=8, eos_token_id=stop, pad_token_id=1), wanted)


def test_tokens_are_streamed(inference):
    class Heard:
        def __init__(self):
            self.told, self.has_ended = [], False

        def put(self, value):
            self.told.append(value)

        def end(self):
            self.has_ended = True

    heard, given = Heard(), prompts(2)
    whole = inference.generate(**given, max_new_tokens=3, streamer=heard)
    assert heard.has_ended
    assert torch.equal(heard.told[0], given["input_ids"])
    assert torch.equal(torch.stack(heard.told[1:], 1), whole[:, -3:])
    assert torch.equal(torch.stack([*inference.stream(**given, max_new_tokens=3)], 1), whole[:, -3:])


def test_a_row_gives_the_same_in_any_batch(inference):
    given = prompts(4)
    whole = inference.generate(**given, max_new_tokens=4)
    alone = inference.generate(given["input_ids"][:1, -10:], max_new_tokens=4)
    assert torch.equal(alone[0, -4:], whole[0, -4:])


def test_new_weights_are_computed_with(llama, inference):
    given = prompts(1, 10)
    before = {name: p.detach().clone() for name, p in llama.named_parameters()}
    try:
        with torch.no_grad():
            for p in llama.parameters():
                p.mul_(0.9)
        own = own_logits(llama, given)
        assert (inference.logits(**given) - own).abs().max() <= 1e-5 * own.abs().max()
    finally:
        with torch.no_grad():
            for name, p in llama.named_parameters():
                p.copy_(before[name])


def test_the_cache_is_written_in_place(inference):
    for program in inference.programs.all:
        ops = [node.op for node in program.plan.graph.nodes]
        assert ops.count("aten.index_put_.default") == 4
        assert "aten.index_put.default" not in ops
        assert program.copies == []
    decode = inference.programs.all[1].plan.graph
    assert not [n for n in decode.nodes if n.op == "aten.expand.default" and len(n.operands[0].tensor.shape) == 5]
    assert inference.cache_bytes == 2 * 2 * -(-4 * 2 * 97 * 8 * 4 // 512) * 512


def rounded(model: torch.nn.Module, weights: str, group: int) -> torch.nn.Module:
    """The model with the numbers that integers stand for."""
    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, torch.nn.Linear | torch.nn.Embedding):
                is_wide = isinstance(module, torch.nn.Embedding) or name == "lm_head"
                module.weight.copy_(as_integers(module.weight, "int8" if is_wide else weights, group))
    return model


@pytest.mark.parametrize(
    ("weights", "activations", "close"), [("int8", None, 1e-4), deep("int8", "int8", 0.5), ("int4", None, 0.2)]
)
def test_a_model_in_integers_is_the_model_of_their_numbers(weights, activations, close):
    model, given = made("one layer"), prompts()
    own = own_logits(rounded(made("one layer"), weights, 32), given)
    found = zgraph.infer(model, max_batch=4, max_len=96, weights=weights, activations=activations, group=32)
    logits = found.logits(**given)
    assert (logits - own).norm() <= close * own.norm()
    assert not torch.equal(logits, own_logits(model, given))
    matrices = sum(p.nbytes for p in model.parameters() if p.dim() == 2)
    assert found.weights_bytes < 0.45 * matrices
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
    twice = found.logits(**given)
    assert (twice - 2 * logits).norm() <= 1e-3 * twice.norm()
    held = weakref.ref(model.lm_head.weight)
    del model
    gc.collect()
    assert held() is None
    assert torch.equal(found.logits(**given), twice)


class Layers(torch.nn.Module):
    """Two layers that read the same, and one that reads what they give."""

    def __init__(self):
        super().__init__()
        self.gate, self.up = torch.nn.Linear(96, 64), torch.nn.Linear(96, 64)
        self.last = torch.nn.Linear(64, 48, bias=False)

    def forward(self, x):
        return self.last(self.gate(x).tanh() + self.up(x).tanh())


def test_columns_with_outliers_are_kept():
    torch.manual_seed(0)
    model, x = Layers().eval(), torch.randn(2, 10, 96)
    x[..., [5, 70]] *= 60
    with torch.no_grad():
        for layer in (model.gate, model.up):
            layer.weight[:, [5, 70]] /= 10
        wanted = model(x=x)
    found = zgraph.infer(model, weights="int8", activations="int8", calibrate={"x": x})
    outliers = outlier_columns(model, {"x": x})
    assert {name: len(columns) for name, columns in outliers.items()} == {
        f"{name}.weight": 16 for name in ("gate", "up", "last")
    }
    assert {5, 70} <= {*outliers["gate.weight"].tolist()}
    error, without = ((made - wanted).norm() / wanted.norm() for made in (found(x=x), rounded_layers(model, x)))
    assert 5 * error < without
    assert error < 0.04
    with pytest.raises(UsageError, match="takes no tokens"):
        zgraph.infer(model, weights="int8", activations="int8")
    with pytest.raises(UsageError, match="cannot be called"):
        zgraph.infer(model, weights="int8", activations="int8", calibrate={"y": x})
    with pytest.raises(UsageError, match="tensors by name"):
        zgraph.infer(model, weights="int8", activations="int8", calibrate={"x": 1})


@pytest.mark.skipif(not DEEP, reason="make test-deep")
def test_inductor_fuses_what_rounds_with_what_is_around_it():
    torch.manual_seed(0)
    model, x = Layers().eval(), torch.randn(2, 3, 96)
    options = {"weights": "int8", "activations": "int8", "calibrate": {"x": x}}
    plain, fused = (zgraph.infer(model, **options, kernels=kernels) for kernels in ("aten", "inductor"))
    assert torch.allclose(fused(x=x), plain(x=x), rtol=1e-4, atol=1e-4)
    inside = [n for r in fused.programs._together._by_text.values() for n, _ in r.steps.calls]
    assert {"zgraph.to_int8.default", "zgraph.int8_mm.default"} <= {node.op for node in inside}


def rounded_layers(model: Layers, x: torch.Tensor) -> torch.Tensor:
    """The model with weights and activations as one row of int8, outliers among them."""

    def product(x: torch.Tensor, layer: torch.nn.Linear) -> torch.Tensor:
        (x8, xs), (w8, ws) = quantised.to_int8(x.view(-1, x.shape[-1]), 1), quantised.to_int8(layer.weight, 1)
        made = quantised.int8_mm(x8, w8, xs, ws, torch.float32).view(*x.shape[:-1], -1)
        return made if layer.bias is None else made + layer.bias

    with torch.no_grad():
        return product(product(x, model.gate).tanh() + product(x, model.up).tanh(), model.last)


def test_int4_that_was_calibrated_errs_less_on_its_text():
    torch.manual_seed(0)
    model, x = Layers().eval(), torch.randn(2, 100, 24) @ torch.randn(24, 96)
    with torch.no_grad():
        for layer in (model.gate, model.up):
            layer.weight /= 5
        wanted = model(x=x)
    before = {name: p.clone() for name, p in model.named_parameters()}
    found = zgraph.infer(model, weights="int4", group=32, calibrate={"x": x})
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    error, nearest = ((f(x=x) - wanted).norm() for f in (found, zgraph.infer(model, weights="int4", group=32)))
    assert error < 0.8 * nearest
    with torch.no_grad():
        model.up.bias.add_(1)
    assert torch.isfinite(found(x=x)).all()
    with torch.no_grad():
        model.up.weight.mul_(2)
    with pytest.raises(UsageError, match=r"up\.weight was written to"):
        found(x=x)
    with pytest.raises(QuantisationError, match=r"96 columns.*take groups of 32"):
        zgraph.infer(model, weights="int4", group=64, calibrate={"x": x})


@pytest.mark.parametrize(
    ("calibrate", "words"),
    [(torch.ones(3), "outside of 0 to 95"), (torch.tensor([96]), "outside of 0 to 95"), ([1, 2], "a tensor of tokens")],
)
def test_what_no_model_can_be_calibrated_with_is_refused(llama, calibrate, words):
    with pytest.raises(UsageError, match=words):
        zgraph.infer(llama, weights="int8", activations="int8", calibrate=calibrate)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_cache_in_int8_is_served_as_it_is_scored(dtype):
    states = torch.randn(1, 2, 5, 16).mul(torch.tensor([1e-6, 1e-3, 1.0, 30.0, 0.0])[:, None]).to(dtype)
    shape = LayerShape(2, 16, 16, dtype, is_rounded=True)
    memory = {name: torch.zeros(size, dtype=kind) for name, (size, kind) in shape.tensors(1, 5).items()}
    served = SlotLayer(memory, torch.arange(5)[None]).update(states, states)
    scored = _Rounded().update(states, states)
    for one, other in zip(served, scored, strict=True):
        assert one.dtype is dtype
        assert torch.equal(one, other)
    largest = states.float().abs().amax(-1, keepdim=True)
    step = (largest / 127).clamp_min(torch.finfo(dtype).tiny)
    assert ((served[0].float() - states.float()).abs() <= step * 0.51 + 2 * torch.finfo(dtype).eps * largest).all()


def test_keys_and_values_in_int8_are_the_model_with_rounded_ones():
    model, given = made("one layer"), prompts(1)
    own = own_logits(model, given)
    found = zgraph.infer(model, max_batch=2, max_len=96, kv="int8")
    cache = Cache(layers=[_Rounded()])
    with torch.no_grad():
        wanted = model(given["input_ids"][:, 60:], past_key_values=cache).logits[:, -1]
    logits = found.logits(**given)
    assert (logits - wanted).norm() <= 1e-3 * wanted.norm() < (logits - own).norm() * 10
    assert (logits - own).norm() <= 0.05 * own.norm()
    assert found.cache_bytes == 2 * (-(-2 * 2 * 97 * 8 // 512) + -(-2 * 2 * 97 * 4 // 512)) * 512
    assert not [n.op for p in found.programs.all for n in p.plan.graph.nodes if n.op == "aten.index_put.default"]
    tokens = found.generate(**given, max_new_tokens=20)
    assert torch.equal(tokens[:, :70], given["input_ids"])
    again = found.logits(tokens[:, 60:89])
    with torch.no_grad():
        wanted = model(tokens[:, 60:89], past_key_values=cache).logits[:, -1]
    assert (again - wanted).norm() <= 1e-3 * wanted.norm()
    assert int(again.argmax()) == int(tokens[0, 89])


BAD = {
    "longer than the cache": (ContextLengthError, "max_len=100", {"max_new_tokens": 30}, {}),
    "no new tokens": (UsageError, "above 0", {"max_new_tokens": 0}, {}),
    "no draws": (UsageError, "do_sample=True", {"max_new_tokens": 1, "top_k": 3}, {}),
    "padding behind": (UsageError, "on the left", {"max_new_tokens": 1}, {"attention_mask": torch.zeros(3, 70)}),
    "another mask": (UsageError, "one entry", {"max_new_tokens": 1}, {"attention_mask": torch.ones(3, 7)}),
    "floats": (UsageError, "integers", {"max_new_tokens": 1}, {"input_ids": torch.ones(3, 70)}),
    "no such token": (UsageError, "vocabulary", {"max_new_tokens": 1}, {"input_ids": torch.full((3, 70), 96)}),
    "too many rows": (
        UsageError,
        "max_batch=5",
        {"max_new_tokens": 1},
        {"input_ids": torch.ones(5, 7, dtype=torch.int64), "attention_mask": None},
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_prompts_are_refused(inference, case):
    kind, words, options, given = BAD[case]
    with pytest.raises(kind, match=words):
        inference.generate(**{**prompts(), **given}, **options)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_batch": 0}, "max_batch"),
        ({"max_len": 10**6}, "made for 2048"),
        ({"weights": "int3"}, "int8, int4"),
        ({"kv": "int4"}, "None or int8"),
        ({"max_source": 8}, "no encoder"),
        ({"activations": "int8"}, 'weights="int8"'),
        ({"calibrate": torch.ones(4, dtype=torch.int64)}, "leave it out"),
        ({"weights": "int4", "group": 48}, "32, 64, 128"),
        ({"kernels": "triton"}, "aten, inductor"),
    ],
)
def test_bad_options_are_refused(llama, options, words):
    with pytest.raises(UsageError, match=words):
        zgraph.infer(llama, **options)


def test_plain_forwards_are_the_models():
    torch.manual_seed(0)
    model = hf.BertForSequenceClassification(
        hf.BertConfig(vocab_size=96, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64)
    ).eval()
    inference = zgraph.infer(model)
    given = prompts(2, 12)
    for _ in range(2):
        found, own = inference(**given, output_hidden_states=True), model(**given, output_hidden_states=True)
        assert type(found) is type(own)
        assert torch.allclose(found.logits, own.logits, atol=1e-6)
        assert len(found.hidden_states) == len(own.hidden_states) == 2
        assert torch.allclose(found.hidden_states[1], own.hidden_states[1], atol=1e-6)
        with torch.no_grad():
            model.classifier.bias.add_(1)
    assert len(inference.programs.all) == 1
    with pytest.raises(UsageError, match="no head that gives tokens"):
        inference.generate(given["input_ids"], max_new_tokens=1)
    with pytest.raises(UsageError, match="no use for max_batch"):
        zgraph.infer(model, max_batch=2)
    with pytest.raises(UsageError, match="plain values"):
        inference(input_ids=[1, 2])


def test_models_that_cannot_be_inferred_are_refused():
    plain = torch.nn.Linear(2, 2)
    assert torch.equal(zgraph.infer(plain)(input=torch.ones(1, 2)), plain(torch.ones(1, 2)))
    with torch.device("meta"), pytest.raises(UsageError, match="one device"):
        zgraph.infer(hf.LlamaForCausalLM(hf.LlamaConfig(**GROUPED)))
    with pytest.raises(UsageError, match="takes a module"):
        zgraph.infer("model")
    mamba = hf.MambaForCausalLM(hf.MambaConfig(vocab_size=96, hidden_size=16, num_hidden_layers=1, state_size=4))
    with pytest.raises(UsageError, match="own generate"):
        zgraph.infer(mamba).generate(torch.ones(1, 2, dtype=torch.int64), max_new_tokens=1)


def test_groups_that_do_not_divide_are_refused():
    torch.manual_seed(0)
    odd = hf.LlamaForCausalLM(hf.LlamaConfig(**{**GROUPED, "intermediate_size": 80, "num_hidden_layers": 1}))
    with pytest.raises(QuantisationError, match=r"down_proj.*80 columns"):
        zgraph.infer(odd, weights="int4", group=32)


def test_logits_that_are_no_numbers_are_refused():
    model = made("one layer")
    found = zgraph.infer(model, max_len=32)
    with torch.no_grad():
        model.model.embed_tokens.weight[5] = torch.nan
    with pytest.raises(InferenceError, match="no numbers"):
        found.logits(torch.tensor([[5, 6]]))


def test_the_distribution_that_is_drawn_from():
    logits = torch.tensor([[3.0, 2.0, 1.0, 0.0]])
    assert Sampling(True, top_k=2).shaped(logits).isinf().tolist() == [[False, False, True, True]]
    assert Sampling(True, top_p=0.6).shaped(logits).isinf().tolist() == [[False, True, True, True]]
    assert Sampling(True, top_p=0.7).shaped(logits).isinf().tolist() == [[False, False, True, True]]
    assert torch.equal(Sampling(True, temperature=2.0).shaped(logits), logits / 2)
    assert Sampling().choose(logits).tolist() == [0]
    for wrong in ({"temperature": 0.0}, {"top_k": 0}, {"top_p": 0.0}, {"top_p": 1.5}):
        with pytest.raises(UsageError, match=next(iter(wrong))):
            Sampling(True, **wrong)


def test_a_prompt_is_cut_so_that_its_last_piece_is_full():
    ids = torch.tensor([[0, 0, 7], [1, 2, 3]])
    found = Prompts(ids, torch.tensor([[0, 0, 1], [1, 1, 1]]), 8)
    assert found.lengths == [1, 3]
    cut = [[(tokens.tolist(), places.tolist()) for tokens, places in pieces(row, 2, 9)] for row in found.rows]
    assert cut == [[([[0, 7]], [[9, 0]])], [([[0, 1]], [[9, 0]]), ([[2, 3]], [[1, 2]])]]
