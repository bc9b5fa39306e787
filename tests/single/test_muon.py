"""Muon beside torch's own, the roles of parameters, and how ranks share the work."""

import functools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers import BertConfig, BertForMaskedLM, GPT2Config, GPT2ForSequenceClassification

import zgraph
from small import llama
from zgraph.engine.config.read import read_config
from zgraph.errors import UsageError
from zgraph.optim import Muon
from zgraph.optim.newton_schulz import orthogonalised
from zgraph.optim.roles import hidden_matrices
from zgraph.optim.shares import Matrix, owners, rounds

MATCHED = {"adjust_lr_fn": "match_rms_adamw", "weight_decay": 0.0, "momentum": 0.5}
CASES = [
    (torch.float32, {}),
    (torch.bfloat16, {}),
    (torch.float32, MATCHED),
    (torch.bfloat16, MATCHED),
    # in bfloat16, torch 2.13 normalises its momentum in place
    (torch.float32, {"nesterov": False, "adjust_lr_fn": "original", "ns_steps": 3}),
]


def matrices(dtype: torch.dtype) -> list[nn.Parameter]:
    """The last is not dense in the order of its dimensions."""
    dice = torch.Generator().manual_seed(0)
    made = [nn.Parameter(torch.randn(shape, generator=dice).to(dtype)) for shape in ((33, 31), (16, 64), (64, 16))]
    return [*made, nn.Parameter(torch.randn(6, 5, generator=dice).to(dtype).t())]


@pytest.mark.parametrize(("dtype", "options"), CASES)
def test_the_update_is_torchs_to_the_last_bit(dtype: torch.dtype, options: dict) -> None:
    ours, theirs = matrices(dtype), matrices(dtype)
    optimizer = Muon(ours, lr=0.02, use_muon=True, ns_dtype=torch.bfloat16, **options)
    reference = torch.optim.Muon(theirs, lr=0.02, **options)
    for step in range(4):
        dice = torch.Generator().manual_seed(step)
        for one, other in zip(ours, theirs, strict=True):
            gradient = torch.randn(one.shape, generator=dice).to(dtype)
            one.grad, other.grad = gradient, gradient.clone()
        optimizer.step()
        reference.step()
        if step == 1:
            state = optimizer.state_dict()
            optimizer = Muon(ours, lr=1.0, use_muon=True, ns_dtype=torch.bfloat16)
            optimizer.load_state_dict(state)
    assert all(map(torch.equal, ours, theirs))


def test_singular_values_come_near_one() -> None:
    dice = torch.Generator().manual_seed(0)
    for shape in ((20, 50), (50, 20), (30, 30)):
        found = torch.linalg.svdvals(orthogonalised(torch.randn(shape, generator=dice), 9))
        assert float(found.min()) > 0.5
        assert float(found.max()) < 1.3


def chosen(model: nn.Module) -> set[str]:
    found = hidden_matrices(model)
    return {name for name, p in model.named_parameters() if id(p) in found}


def test_embeddings_heads_and_vectors_are_no_matrices() -> None:
    layer = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert {name.split(".")[-2] for name in chosen(llama())} == layer
    tiny = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    bert = BertForMaskedLM(BertConfig(vocab_size=20, **tiny))
    assert not any("embeddings" in name or "decoder" in name for name in chosen(bert))
    assert "cls.predictions.transform.dense.weight" in chosen(bert)
    scored = GPT2ForSequenceClassification(GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=20))
    assert {name.rpartition(".")[0].split(".")[-1] for name in chosen(scored)} == {"c_attn", "c_proj", "c_fc"}
    images = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4, 5), nn.Linear(5, 6))
    assert chosen(images) == {"0.weight", "2.weight"}


def test_groups_are_split_and_keep_their_options() -> None:
    model = zgraph.compile(nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 6)))
    groups = [{"params": [*model[0].parameters()], "lr": 0.5}, {"params": [*model[1].parameters()], "adam_lr": 0.25}]
    optimizer = Muon(groups, lr=0.02, adam_lr=0.125, weight_decay=0.3)
    found = [(g["use_muon"], g["lr"], g["weight_decay"], len(g["params"])) for g in optimizer.param_groups]
    assert found == [(True, 0.5, 0.3, 1), (False, 0.125, 0.3, 1), (False, 0.25, 0.3, 2)]


BAD = [
    {"lr": -1.0},
    {"momentum": 1.0},
    {"ns_steps": 0},
    {"ns_steps": 100},
    {"ns_dtype": torch.float16},
    {"adjust_lr_fn": "none"},
    {"adam_lr": -1.0},
    {"adam_betas": (0.9, 1.0)},
    {"bucket_bytes": 0},
    {"ns_coefficients": (1.0, 2.0)},
]


@pytest.mark.parametrize("bad", BAD, ids=str)
def test_bad_arguments_are_refused(bad: dict) -> None:
    with pytest.raises(UsageError):
        Muon(matrices(torch.float32), use_muon=True, **bad)


def test_what_has_no_known_role_is_refused() -> None:
    model = nn.Linear(3, 4)
    with pytest.raises(UsageError, match="make the optimizer after"):
        Muon(model.parameters())
    with pytest.raises(UsageError, match="named_parameters"):
        Muon(model.parameters(), use_muon=lambda name: True)
    with pytest.raises(UsageError, match="complex"):
        Muon([nn.Parameter(torch.zeros(2, 2, dtype=torch.complex64))], use_muon=True)
    assert [g["use_muon"] for g in Muon([model.bias]).param_groups] == [False]


def test_a_configuration_has_one_rate_or_two(tmp_path) -> None:
    def made(folder=None, **params):
        config = {"train_batch_size": 1, "optimizer": {"type": "Muon", "params": params}}
        optimizer = read_config(config, world_size=1).optimizer
        model = zgraph.compile(nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 6)))
        return [g["lr"] for g in optimizer.make([*model.parameters()], folder=folder).param_groups]

    assert made(lr=0.1) == [0.1, 0.1]
    assert made(lr=0.1, muon_lr=0.2, adam_lr=0.3) == [0.2, 0.3]
    with pytest.raises(UsageError, match="nvme"):
        made(folder=tmp_path)


@given(st.lists(st.integers(1, 50), max_size=30), st.integers(1, 5))
def test_ranks_share_the_work_evenly(works: list[int], num_ranks: int) -> None:
    shares = owners(works, num_ranks)
    assert sorted(n for share in shares for n in share) == [*range(len(works))]
    loads = [sum(works[n] for n in share) for share in shares]
    assert max(loads) - min(loads) <= max(works, default=0)


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9), st.booleans()), max_size=20), st.integers(1, 4))
def test_rounds_hold_every_matrix_once_within_the_limit(shapes: list, num_ranks: int) -> None:
    found = [Matrix(rows, columns, sharded, rows * columns) for rows, columns, sharded in shapes]
    size = functools.partial(Matrix.travelling_numel, num_ranks=num_ranks)
    made = rounds(found, num_ranks, 40)
    assert sorted(n for each in made for share in each for n in share) == [*range(len(found))]
    for share in (share for each in made for share in each):
        assert len(share) <= 1 or sum(size(found[n]) for n in share) <= 40
