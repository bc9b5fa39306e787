"""A student and its teacher in one step: the losses of a plain loop, and what does not fit is refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    Gemma2Config,
    GPT2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

import small
import zgraph
from tests.deep import DEEP
from zgraph.distillation.model import divergence
from zgraph.errors import UsageError


def models(build: Any = None) -> tuple[nn.Module, nn.Module]:
    """A teacher, and a student of two of its layers."""
    torch.manual_seed(0)
    teacher = build() if build else small.llama(num_layers=4)
    return zgraph.prune_layers(teacher, [0, 3]), teacher


def batch(step: int, num_words: int) -> dict[str, torch.Tensor]:
    dice = torch.Generator().manual_seed(step)
    ids = torch.randint(num_words, (2, 12), generator=dice)
    labels = ids.clone()
    labels[0, :3] = -100
    return {"input_ids": ids, "labels": labels}


def plain_loss(student: nn.Module, teacher: nn.Module, given: dict[str, torch.Tensor], kind: str) -> torch.Tensor:
    """The loss as anyone would write it."""
    own = student(**given)
    with torch.no_grad():
        taught = teacher(input_ids=given["input_ids"]).logits
    each = divergence(own.logits[:, :-1], taught[:, :-1], kind, 2.0, 0.5)
    return 0.3 * own.loss + 0.7 * 4.0 * each[given["labels"][:, 1:] != -100].mean()


@pytest.mark.parametrize("logits", ["blocks", "whole"])
@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jsd"])
def test_losses_are_those_of_a_plain_loop(kind: str, logits: str) -> None:
    student, teacher = models()
    plain = copy.deepcopy(student)
    kept = copy.deepcopy(teacher.state_dict())
    model = zgraph.distill(student, teacher, loss=kind, temperature=2.0, alpha=0.3, logits=logits)
    ours = torch.optim.AdamW(model.student.parameters(), lr=1e-2)
    theirs = torch.optim.AdamW(plain.parameters(), lr=1e-2)
    for step in range(4):
        given = batch(step, student.config.vocab_size)
        loss = model(**given).loss
        loss.backward()
        wanted = plain_loss(plain, teacher_of(model), given, kind)
        wanted.backward()
        assert loss.item() == pytest.approx(wanted.item(), rel=1e-5)
        for optimizer in (ours, theirs):
            optimizer.step()
            optimizer.zero_grad()
    assert all(torch.equal(kept[name], value) for name, value in teacher.state_dict().items())
    assert not model.teacher.training
    assert all(p.grad is None for p in model.teacher.parameters())


def test_a_student_learns_from_what_it_generates() -> None:
    """Rounds of (the student generates, the teacher scores, the student learns) are those of a plain loop."""
    student, teacher = models()
    plain = copy.deepcopy(student)
    model = zgraph.distill(student, teacher, loss="reverse_kl", temperature=2.0, alpha=0.3)
    ours = torch.optim.AdamW(model.student.parameters(), lr=1e-2)
    theirs = torch.optim.AdamW(plain.parameters(), lr=1e-2)
    seen, captured = [], []
    for step in range(20 if DEEP else 3):
        prompts = batch(step, student.config.vocab_size)["input_ids"][:, :6]
        with zgraph.serving(model, part="student", max_batch=2, max_len=12) as inference:
            answers = inference.generate(prompts, max_new_tokens=6, eos_token_id=[], pad_token_id=0)
        mask = torch.ones_like(prompts)
        options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        assert torch.equal(answers, plain.generate(prompts, attention_mask=mask, **options))
        labels = answers.clone()
        labels[:, : prompts.shape[1]] = -100
        given = {"input_ids": answers, "labels": labels}
        loss, wanted = model(**given).loss, plain_loss(plain, teacher_of(model), given, "reverse_kl")
        assert loss.item() == pytest.approx(wanted.item(), rel=1e-5)
        for made, optimizer in ((loss, ours), (wanted, theirs)):
            made.backward()
            optimizer.step()
            optimizer.zero_grad()
        seen.append(loss.item())
        captured.append((len(inference.programs.all), len(zgraph.report(model).entries)))
    assert len(set(captured)) == 1
    assert len(set(seen)) == len(seen)
    with pytest.raises(UsageError, match="no module 'pupil'"), zgraph.serving(model, part="pupil"):
        pass
    with pytest.raises(UsageError, match="part='student'"), zgraph.serving(model, part="student"):
        pass


def teacher_of(model: Any) -> nn.Module:
    """A plain copy of the frozen teacher."""
    made = small.llama(num_layers=4)
    made.load_state_dict(dict(model.teacher.state_dict().items()))
    return made.eval()


def test_neithers_logits_are_in_the_graph() -> None:
    student, teacher = models()
    model = zgraph.distill(student, teacher)
    given = batch(0, student.config.vocab_size)
    model(**given).loss.backward()
    (entry,) = zgraph.report(model).entries
    graph = entry.plan.graph
    assert [n.op.split(".")[1] for n in graph.nodes if "distillation" in n.op] == [
        "linear_distillation",
        "linear_distillation_backward",
    ]
    num_words, num_tokens = student.config.vocab_size, given["input_ids"].numel()
    sizes = [r.tensor.numel for n in graph.nodes for r in n.results if num_words in r.tensor.shape]
    assert sizes, "of weights and their gradients"
    assert {size // num_words for size in sizes} == {student.config.hidden_size} != {num_tokens}


def test_hidden_states_are_brought_to_the_teachers_width() -> None:
    teacher = small.llama(width=64, num_layers=2)
    student = small.llama(width=32, num_layers=1)
    model = zgraph.distill(student, teacher, hidden={1: 2}, hidden_weight=3.0)
    given = batch(0, student.config.vocab_size)
    made = model(**given)
    made.loss.backward()
    with torch.no_grad():
        mine, theirs = small.llama(width=32, num_layers=1), small.llama(width=64, num_layers=2)
        for plain, ours in ((mine, model.student), (theirs, model.teacher)):
            plain.load_state_dict(dict(ours.state_dict().items()))
        states = [m(input_ids=given["input_ids"], output_hidden_states=True).hidden_states for m in (mine, theirs)]
        projected = F.linear(states[0][1], model.projections[0].weight)
        assert made.hidden_loss.item() == pytest.approx(F.mse_loss(projected, states[1][2]).item(), rel=1e-5)
    assert model.projections[0].weight.grad is not None
    total = 0.5 * made.hard_loss + 0.5 * made.soft_loss + 3.0 * made.hidden_loss
    assert made.loss.item() == pytest.approx(total.item(), rel=1e-6)


@pytest.mark.parametrize("num_heads", [4, 2], ids=["heads as many", "means over heads"])
def test_attention_is_learned_from_the_teachers(num_heads: int) -> None:
    torch.manual_seed(0)
    teacher = small.llama(num_layers=3, num_heads=4, num_kv_heads=2)
    student = small.llama(num_layers=2, num_heads=num_heads, num_kv_heads=2)
    for model in (student, teacher):
        model.set_attn_implementation("eager")
    plain, taught = copy.deepcopy(student), copy.deepcopy(teacher).eval()
    model = zgraph.distill(student, teacher, attention={0: 1, 1: 2}, attention_weight=3.0)
    given = batch(0, student.config.vocab_size)
    mask = torch.ones_like(given["input_ids"])
    mask[0, :2] = 0
    made = model(**given, attention_mask=mask)
    made.loss.backward()
    found = [
        m(input_ids=given["input_ids"], attention_mask=mask, output_attentions=True).attentions for m in (plain, taught)
    ]
    each = [(a, b) if num_heads == 4 else (a.mean(1), b.mean(1)) for a, b in zip(found[0], found[1][1:], strict=True)]
    squares = [(a - b.detach()).square().sum(-1) for a, b in each]
    rows = [s.mean(1) if num_heads == 4 else s for s in squares]
    wanted = torch.stack([(r * mask).sum() / mask.sum() for r in rows]).mean()
    assert made.attention_loss.item() == pytest.approx(wanted.item(), rel=1e-4)
    total = 0.5 * made.hard_loss + 0.5 * made.soft_loss + 3.0 * made.attention_loss
    assert made.loss.item() == pytest.approx(total.item(), rel=1e-5)
    assert all(p.grad is not None for p in model.student.parameters())


def test_attention_that_is_not_there() -> None:
    student, teacher = models()
    for attention, words in (
        ({0: 0}, "which the student does not make with sdpa attention"),
        ({2: 0}, "the student has layers 0 to 1"),
        ({0: 4}, "the teacher has layers 0 to 3"),
        ([0], "attention must map layers"),
    ):
        if words.startswith("the teacher"):
            student.set_attn_implementation("eager")
        with pytest.raises(UsageError, match=words):
            zgraph.distill(student, teacher, attention=attention)


def gpt2() -> nn.Module:
    return AutoModelForCausalLM.from_config(GPT2Config(vocab_size=300, n_embd=32, n_layer=4, n_head=2, n_positions=64))


def qwen3() -> nn.Module:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    return AutoModelForCausalLM.from_config(Qwen3Config(vocab_size=300, num_hidden_layers=4, head_dim=8, **sizes))


@pytest.mark.parametrize("build", [gpt2, qwen3, lambda: small.llama(num_layers=4)])
def test_a_pruned_model_is_its_layers_and_generates(build: Any) -> None:
    torch.manual_seed(0)
    teacher = build().eval()
    before = copy.deepcopy(teacher.state_dict())
    pruned = zgraph.prune_layers(teacher, [3, 0])
    ids = torch.arange(6)[None]
    made = pruned.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0)
    again = pruned.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0, use_cache=False)
    assert torch.equal(made, again), "the cache has a place for each of its layers"
    assert pruned.config.num_hidden_layers == 2
    assert teacher.config.num_hidden_layers == 4
    assert all(torch.equal(before[n], v) for n, v in teacher.state_dict().items())
    kept = zip(layers(pruned)[1].parameters(), layers(teacher)[3].parameters(), strict=True)
    assert all(torch.equal(p, q) for p, q in kept)


def layers(model: Any) -> Any:
    return model.transformer.h if hasattr(model, "transformer") else model.model.layers


def gemma2() -> nn.Module:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = Gemma2Config(vocab_size=300, num_hidden_layers=2, head_dim=8, **sizes)
    return AutoModelForCausalLM.from_config(config)


def bert() -> nn.Module:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 2}
    return AutoModelForMaskedLM.from_config(BertConfig(vocab_size=300, **sizes))


def bart() -> nn.Module:
    sizes = {"encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    layers = {"encoder_layers": 1, "decoder_layers": 1}
    return BartForConditionalGeneration(BartConfig(vocab_size=300, d_model=32, **sizes, **layers))


@pytest.mark.parametrize("build", [bart, lambda: small.t5(32, 1)])
def test_an_encoder_and_decoder_learns_from_whole_logits(build: Any) -> None:
    torch.manual_seed(0)
    student, teacher = build().eval(), build().eval()
    plain = [copy.deepcopy(m) for m in (student, teacher)]
    model = zgraph.distill(student, teacher, logits="whole")
    given = batch(0, 300)
    made = model(**given)
    own, taught = (m(**given) for m in plain)
    each = divergence(own.logits, taught.logits, "forward_kl", 1.0, 0.5)
    assert made.hard_loss.item() == pytest.approx(own.loss.item(), rel=1e-5)
    assert made.soft_loss.item() == pytest.approx(each[given["labels"] != -100].mean().item(), rel=1e-5)


def test_what_padding_holds_does_not_matter() -> None:
    student, teacher = models()
    model = zgraph.distillation.Distillation(student, teacher, hidden={1: 2})
    given = batch(0, student.config.vocab_size)
    mask = torch.ones_like(given["input_ids"])
    mask[:, 8:] = 0
    given["labels"][:, 8:] = -100
    first = model(**given, attention_mask=mask)
    given["input_ids"][:, 8:] = 7
    for one, other in zip(first, model(**given, attention_mask=mask), strict=True):
        assert other.item() == pytest.approx(one.item(), rel=1e-6)


def test_where_no_label_counts_nothing_is_learnt() -> None:
    student, teacher = models()
    model = zgraph.distillation.Distillation(student, teacher)
    ids = batch(0, student.config.vocab_size)["input_ids"]
    made = model(input_ids=ids, labels=torch.full_like(ids, -100))
    made.loss.backward()
    assert made.loss.item() == 0
    assert all(not p.grad.any() for p in student.parameters() if p.grad is not None)


def test_modules_that_were_in_eval_mode_stay_so() -> None:
    student, teacher = models()
    student.train()
    student.model.layers[0].eval()
    zgraph.distillation.Distillation(student, teacher)
    assert student.training
    assert student.model.layers[1].training
    assert not student.model.layers[0].training


def test_a_label_that_is_no_word_is_told() -> None:
    student, teacher = models()
    model = zgraph.distillation.Distillation(student, teacher)
    given = batch(0, student.config.vocab_size)
    given["labels"][0, 5] = 305
    assert model(**given).loss.isnan()


def test_a_configuration_that_does_not_describe_what_is_left_is_refused() -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    experts = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16, "mlp_only_layers": [3]}
    config = Qwen3MoeConfig(vocab_size=300, num_hidden_layers=4, head_dim=8, **sizes, **experts)
    with pytest.raises(UsageError, match="does not describe the layers that are left"):
        zgraph.prune_layers(AutoModelForCausalLM.from_config(config), [0, 3])


def meta() -> nn.Module:
    with torch.device("meta"):
        return small.llama()


def test_a_masked_model_is_not_shifted_and_learns_from_whole_logits() -> None:
    torch.manual_seed(0)
    teacher, student = bert(), bert()
    plain = [copy.deepcopy(m).eval() for m in (student, teacher)]
    model = zgraph.distill(student.eval(), teacher, logits="whole")
    given = batch(0, 300)
    made = model(**given)
    own, taught = plain[0](**given), plain[1](input_ids=given["input_ids"]).logits
    each = divergence(own.logits, taught, "forward_kl", 1.0, 0.5)
    assert made.hard_loss.item() == pytest.approx(own.loss.item(), rel=1e-5)
    assert made.soft_loss.item() == pytest.approx(each[given["labels"] != -100].mean().item(), rel=1e-5)


REFUSED: dict[str, tuple[Any, Any, dict[str, Any], str]] = {
    "loss": (small.llama, small.llama, {"loss": "kl"}, "loss must be one of forward_kl"),
    "temperature": (small.llama, small.llama, {"temperature": 0.0}, "temperature must be above 0"),
    "alpha": (small.llama, small.llama, {"alpha": 1.5}, "from 0 to 1"),
    "beta": (small.llama, small.llama, {"beta": 1.0}, "between 0 and 1"),
    "logits": (small.llama, small.llama, {"logits": "some"}, 'logits must be "blocks" or "whole"'),
    "words": (small.llama, lambda: small.llama(num_words=77), {}, "resize_token_embeddings"),
    "soft-capping": (small.llama, gemma2, {}, 'teacher.*soft-capping.*logits="whole"'),
    "a head of more than one layer": (bert, bert, {}, 'no product alone.*logits="whole"'),
    "no transformer": (lambda: nn.Linear(4, 4), small.llama, {"shift": True}, 'student, Linear.*logits="whole"'),
    "an encoder": (lambda: small.t5(32, 1), small.llama, {}, 'encoder|decoder|logits="whole"'),
    "weights that are not there": (meta, small.llama, {"logits": "whole"}, "load its weights first"),
    "pairs": (small.llama, small.llama, {"hidden": [(1, 2)]}, "hidden must map layers"),
    "no shift": (lambda: nn.Linear(4, 4), small.llama, {"logits": "whole"}, "pass shift=True or False"),
    "layer": (small.llama, small.llama, {"hidden": {1: 99}}, "teacher has hidden states 0 to"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused(case: str) -> None:
    student, teacher, options, message = REFUSED[case]
    with pytest.raises(UsageError, match=message):
        zgraph.distill(student(), teacher(), **options)


def test_a_teacher_that_shares_parameters_would_freeze_them() -> None:
    model = small.llama()
    with pytest.raises(UsageError, match=r"copy\.deepcopy"):
        zgraph.distill(model, model)


def test_models_that_are_compiled_already_are_refused() -> None:
    with pytest.raises(UsageError, match="teacher is compiled already"):
        zgraph.distill(small.llama(), zgraph.compile(small.llama()))


def test_a_compiled_model_is_not_pruned() -> None:
    with pytest.raises(UsageError, match="prune the plain model"):
        zgraph.prune_layers(zgraph.compile(small.llama()), [0])


@pytest.mark.parametrize("keep", [[], [4], [-1]])
def test_layers_that_are_not_there_cannot_be_kept(keep: list[int]) -> None:
    with pytest.raises(UsageError, match="keep must name some of the layers 0 to 3"):
        zgraph.prune_layers(small.llama(num_layers=4), keep)


class Shares(torch.nn.Module):
    """A model whose table has its first name outside of the part that generates."""

    def __init__(self) -> None:
        super().__init__()
        model = small.llama(32, 1, 100, max_position_embeddings=32)
        self.table, self.student = model.get_input_embeddings(), model

    def forward(self, **given):
        return self.student(**given)


def test_a_part_generates_with_what_it_shares_with_the_rest():
    torch.manual_seed(0)
    model, ids = Shares(), torch.arange(8)[None]
    wanted = model.student.generate(ids, max_new_tokens=4, do_sample=False)
    with zgraph.serving(zgraph.compile(model, stage=0), part="student", max_batch=1, max_len=24) as inference:
        assert torch.equal(inference.generate(ids, max_new_tokens=4), wanted)
