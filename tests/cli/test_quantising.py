"""The commands on weights in integers: a folder that comes back, figures, and what is refused."""

import json
from pathlib import Path

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers

import zgraph
from zgraph.codegen import quantised
from zgraph.errors import QuantisationError, UsageError
from zgraph.inference.calibration import rounded_integers
from zgraph.inference.evaluation import as_integers, evaluate
from zgraph.inference.model import seen_of
from zgraph.inference.sensitivity import costliest, divergences
from zgraph.inference.serving import _same
from zgraph.inference.storage import FILE, load_quantised, save_quantised
from zgraph.passes.analysis.integers import integers_of

WORDS = [f"w{n}" for n in range(64)]


def small(width: int = 32, **more: object) -> torch.nn.Module:
    torch.manual_seed(0)
    config = hf.LlamaConfig(
        vocab_size=64,
        hidden_size=width,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        **more,
    )
    return hf.LlamaForCausalLM(config).eval()


def save_language_model(folder: Path, width: int = 32) -> None:
    """Save a model with a tokenizer of 64 words, as transformers does."""
    small(width).save_pretrained(folder)
    words = Tokenizer(models.WordLevel({word: n for n, word in enumerate(WORDS)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    hf.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0").save_pretrained(folder)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with a model and a tokenizer."""
    found = tmp_path_factory.mktemp("model")
    save_language_model(found)
    return found


@pytest.mark.parametrize("weights", ["int8", "int4"])
@pytest.mark.parametrize("tied", [False, True])
def test_a_folder_comes_back_as_the_numbers_of_its_integers(tmp_path, weights, tied):
    model = small(tie_word_embeddings=tied)
    kept = save_quantised(model, tmp_path, weights=weights, group=32)
    assert kept["model.embed_tokens.weight"] == kept["lm_head.weight"] == "int8"
    assert kept["model.layers.0.mlp.up_proj.weight"] == weights
    found, *about = load_quantised(tmp_path)
    assert about == [weights, 32]
    own, back = dict(model.named_parameters()), dict(found.named_parameters())
    assert own.keys() == back.keys()
    for name, weight in own.items():
        wanted = as_integers(weight, kept[name], 32) if name in kept else weight
        assert torch.equal(back[name], wanted), name


def test_a_folder_keeps_the_integers_that_were_calibrated(tmp_path):
    model, tokens = small(), torch.randint(64, (4, 32), generator=torch.Generator().manual_seed(0))
    save_quantised(model, tmp_path, weights="int4", group=32, calibrate=tokens)
    found, *_ = load_quantised(tmp_path)
    for name, both in rounded_integers(model, tokens, 32).items():
        assert torch.equal(found.get_parameter(name), quantised.from_int4(*both, 32)), name
    with pytest.raises(UsageError, match="leave it out"):
        save_quantised(model, tmp_path, weights="int8", calibrate=tokens)


def test_a_folder_is_served_with_its_own_integers(tmp_path):
    tokens = torch.randint(64, (4, 32), generator=torch.Generator().manual_seed(0))
    save_quantised(small(), tmp_path, weights="int4", group=32, calibrate=tokens)
    found, *_ = load_quantised(tmp_path)
    held = load_file(tmp_path / FILE)
    name = "model.layers.0.mlp.up_proj.weight"
    inference = zgraph.infer(found, max_len=32, weights="int4", group=32)
    inference.generate(tokens[:1, :4], max_new_tokens=1, pad_token_id=0)
    programs, packed = inference.programs, quantised.pack_int4(held[f"{name}.int4"])
    in_use = [t for t in programs._resident.values() if t.dtype == packed.dtype]
    assert any(torch.equal(t, packed) for t in in_use)
    own = dict(zip(integers_of(name), (held[f"{name}.int4"], held[f"{name}.scales"]), strict=True))
    assert all(torch.equal(programs.beside[target], tensor) for target, tensor in own.items())
    assert len(programs.beside) == 2 * 7
    with torch.no_grad():
        found.get_parameter(name).mul_(2)
    again = seen_of(found, "int4", None, 32, None)
    assert [t for t, tensor in again.items() if not torch.equal(tensor, programs.beside[t])] == [*own]


@pytest.mark.parametrize(
    "given",
    [
        {"input_ids": torch.zeros(1, 4)},
        {"input_ids": torch.zeros(1, 4, dtype=torch.long), "attention_mask": torch.ones(1, 1, 3, 3)},
    ],
)
def test_inputs_that_a_model_cannot_take_are_refused(given):
    with pytest.raises(UsageError, match="cannot be called with what calibrate= gives"):
        rounded_integers(small(), given, 32)


def test_inputs_that_are_no_numbers_name_the_layer():
    layer = torch.nn.Sequential(torch.nn.Linear(32, 16))
    for wrong in (torch.inf, torch.nan, 1e30):
        with pytest.raises(QuantisationError, match="0 is given numbers"):
            rounded_integers(layer, {"input": torch.full((4, 32), wrong)}, 32)
    assert rounded_integers(layer, {"input": torch.ones(0, 32)}, 32) == {}


def test_options_with_tensors_are_compared_by_value():
    one = {"calibrate": {"input_ids": torch.ones(2, 3)}, "max_batch": 2}
    assert _same(one, {"calibrate": {"input_ids": torch.ones(2, 3)}, "max_batch": 2})
    for other in ({**one, "calibrate": {"input_ids": torch.zeros(2, 3)}}, {**one, "calibrate": None}, {"max_batch": 2}):
        assert not _same(one, other)
        assert not _same(other, one)


def test_errors_of_layers_are_those_of_the_integers_in_use():
    model, tokens = small(), torch.randint(64, (32,), generator=torch.Generator().manual_seed(0))
    errors = [
        {
            layer.name: layer.error
            for layer in evaluate(model, tokens, weights="int4", group=32, window=32, **more).layers
        }
        for more in ({}, {"calibrate": tokens})
    ]
    name = "model.layers.0.mlp.down_proj"
    assert errors[1][name] < errors[0][name]
    assert errors[1]["lm_head"] == errors[0]["lm_head"]


def test_what_gpt2_has_as_columns_comes_back(tmp_path):
    model = hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=2, n_positions=32))
    save_quantised(model, tmp_path, weights="int8")
    found, *_ = load_quantised(tmp_path)
    for name, weight in model.named_parameters():
        error = (found.get_parameter(name) - weight).abs().max()
        assert error <= weight.abs().max() / 254 + 1e-7, name


def test_files_that_are_none_are_refused(tmp_path):
    with pytest.raises(UsageError, match="zgraph quantise"):
        load_quantised(tmp_path)
    save_quantised(small(), tmp_path, weights="int8")
    whole = (tmp_path / FILE).read_bytes()
    for wrong in (whole[:-9], b"", whole.replace(b"zgraph.weights", b"zgraph.weightz"), whole[:100] + whole[140:]):
        (tmp_path / FILE).write_bytes(wrong)
        with pytest.raises(UsageError, match="damaged"):
            load_quantised(tmp_path)
    (tmp_path / FILE).write_bytes(whole)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 2}))
    with pytest.raises(UsageError, match="does not fit"):
        load_quantised(tmp_path)
    odd = hf.LlamaForCausalLM(hf.LlamaConfig(vocab_size=64, hidden_size=48, num_attention_heads=2, num_hidden_layers=1))
    with pytest.raises(QuantisationError, match=r"48 columns.*take int8"):
        save_quantised(odd, tmp_path, weights="int4")


def test_the_commands(command, saved, tmp_path):
    (tmp_path / "text.txt").write_text(" ".join(WORDS * 2))
    code, out, _ = command(
        *("quantise", str(saved), "-o", str(tmp_path / "made"), "--weights", "int4", "--group", "32", "--json"),
        *("--calibrate", str(tmp_path / "text.txt")),
    )
    assert code == 0
    made = json.loads(out)
    assert made["weights"] == {"int8": 2, "int4": 7}
    assert made["bytes"] < made["bytes_before"]
    assert load_quantised(tmp_path / "made")[1:] == ("int4", 32)
    given = "eval", str(saved), "--text", str(tmp_path / "text.txt"), "--window", "32"
    code, out, _ = command(*given, "--weights", "int8", "--json")
    assert code == 0
    found = json.loads(out)
    assert found["num_tokens"] == 4 * 31
    assert found["before"] == pytest.approx(found["after"], rel=0.01)
    assert {layer["name"] for layer in found["layers"]} >= {"lm_head", "model.layers.0.self_attn.q_proj"}
    errors = [layer["error"] for layer in found["layers"]]
    assert errors == sorted(errors, reverse=True)
    assert 0 < errors[0] < 0.02


def test_perplexity_is_that_of_the_plain_model():
    model, tokens = small(), torch.randint(64, (100,), generator=torch.Generator().manual_seed(0))
    found = evaluate(model, tokens, weights="int8", window=32, max_windows=2)
    with torch.no_grad():
        rows = tokens[:64].view(2, 32)
        wanted = torch.nn.functional.cross_entropy(model(rows).logits[:, :-1].reshape(-1, 64), rows[:, 1:].reshape(-1))
    assert found.before == pytest.approx(wanted.exp().item(), rel=1e-5)
    assert found.num_tokens == 62
    with pytest.raises(UsageError, match="longer text"):
        evaluate(model, tokens[:20], weights="int8", window=32)


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("quantise", "nowhere", "-o", "made"), "no folder nowhere"),
        (("quantise", ".", "-o", "made"), "no causal language model"),
        (("quantise", ".", "-o", "made", "--weights", "int3"), "int8, int4"),
        (("eval", ".", "--text", "nowhere.txt"), "cannot read"),
        (("quantise", "made", "-o", "other", "--weights", "int4", "--calibrate", "nowhere.txt"), "no folder made"),
    ],
)
def test_mistakes(command, tmp_path, monkeypatch, args, said):
    monkeypatch.chdir(tmp_path)
    code, _, err = command(*args)
    assert code == 2
    assert said in err


def test_a_folder_is_exported(command, saved, tmp_path):
    plain, smaller = tmp_path / "plain.pt2", tmp_path / "smaller.pt2"
    assert command("export-model", str(saved), "-o", str(plain), "--json")[0] == 0
    code, out, _ = command("export-model", str(saved), "-o", str(smaller), "--weights", "int8")
    assert code == 0
    assert out == f"{smaller}: {smaller.stat().st_size:,} bytes, weights in int8\n"
    ids = torch.tensor([[5, 6, 7], [8, 9, 10], [11, 12, 13]])
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with torch.no_grad():
        wanted = small()(**given).logits
    found = [torch.export.load(path).module()(**given)["logits"] for path in (plain, smaller)]
    assert torch.allclose(found[0], wanted, atol=1e-5)
    assert 1e-4 < (found[1] - wanted).norm() / wanted.norm() < 0.05
    save_quantised(small(), tmp_path, weights="int8")
    code, _, error = command("export-model", str(tmp_path), "-o", str(plain))
    assert code == 2
    assert "no tokenizer" in error


def test_what_costs_most_stays_in_int8(tmp_path):
    model, tokens = small(), torch.randint(64, (4, 32), generator=torch.Generator().manual_seed(0))
    kept = save_quantised(model, tmp_path, weights="int4", group=32, calibrate=tokens, wider=0.3)
    wide = sorted(n for n, kind in kept.items() if kind == "int8" and "layers" in n)
    every = rounded_integers(model, tokens, 32)
    changes = {n: quantised.from_int4(*both, 32) - model.get_parameter(n) for n, both in every.items()}
    costs = divergences(model, changes, tokens)
    assert wide == sorted(costliest(costs, {n: c.numel() for n, c in changes.items()}, 0.3))
    assert 0 < sum(changes[n].numel() for n in wide) <= 0.3 * sum(c.numel() for c in changes.values())
    found, *_ = load_quantised(tmp_path)
    inference = zgraph.infer(found, max_len=32, weights="int4", group=32)
    own = zgraph.infer(model, max_len=32, weights="int4", group=32, calibrate=tokens, wider=0.3)
    assert torch.allclose(inference.logits(tokens[:1, :8]), own.logits(tokens[:1, :8]), atol=1e-3)
    assert inference.weights_bytes == own.weights_bytes
    layers = evaluate(model, tokens.flatten(), weights="int4", group=32, window=32, calibrate=tokens, wider=0.3).layers
    assert sorted(f"{x.name}.weight" for x in layers if x.kept_in == "int8" and "layers" in x.name) == wide
    for wrong in ({"wider": 1.0}, {"wider": 0.1, "calibrate": None}, {"wider": 0.1, "weights": "int8"}):
        with pytest.raises(UsageError, match="wider"):
            zgraph.infer(model, **{"weights": "int4", "group": 32, "calibrate": tokens} | wrong)


def test_a_divergence_is_that_of_the_changed_model():
    model, tokens = small(), torch.randint(64, (4, 64), generator=torch.Generator().manual_seed(0))
    name = "model.layers.0.mlp.down_proj.weight"
    change = 1e-2 * torch.randn(32, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        before = model(tokens).logits.log_softmax(-1)
        found = divergences(model, {name: change}, tokens)[name]
        model.get_parameter(name).add_(change)
        after = model(tokens).logits.log_softmax(-1)
    wanted = (before.exp() * (before - after)).sum(-1).mean().item()
    assert wanted / 2 < found < 2 * wanted
    assert all(p.grad is None for p in model.parameters())
