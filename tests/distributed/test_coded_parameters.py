"""Codes of parameters: what ranks compute with follows what is trained, in the bytes that were predicted."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch.distributed.device_mesh import DeviceMesh

import zgraph
from tests.deep import deep
from zgraph.compiler.compiled_model import compiled_model
from zgraph.errors import UsageError

from .pool import Pool
from .test_compress import net, step_of
from .test_exact_codes import count

NUM_STEPS = 40


def trained(mesh: DeviceMesh, stage: int, compress: Any, dtype: torch.dtype | None) -> tuple[list[float], int, int]:
    """Losses, and bytes that the last step sends and that its plan predicts."""
    model = zgraph.compile(net(), mesh=mesh, stage=stage, compress=compress, param_dtype=dtype)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    found, sent = list[float](), list[int]()
    for step in range(NUM_STEPS):
        if step == NUM_STEPS - 1:
            count(compiled_model(model).session.lane, sent)
        found.append(step_of(model, optimizer, step, mesh.get_rank()))
    return found, sum(sent), zgraph.report(model).sent_bytes


@pytest.mark.parametrize(
    ("stage", "codec", "num_ranks", "less"),
    [
        (2, "q4(block=128)", 2, 6.5),
        (3, "q8(block=256)", 2, 3.5),
        deep(1, "sign(block=64)", 3, 15),
        deep(2, "topk(5%, chunk=512)", 2, 7),
        deep(1, "q8(block=256)", 4, 3.5),
        deep(3, "q4(block=128)", 3, 6),
    ],
)
def test_training_is_near_what_it_is_without(pool: Pool, stage: int, codec: str, num_ranks: int, less: float) -> None:
    options = {"gradients": codec, "parameters": codec}
    plain = pool.run(trained, num_ranks, stage, None, None)
    for (wanted, whole, _), (losses, sent, predicted) in zip(
        plain, pool.run(trained, num_ranks, stage, options, None), strict=True
    ):
        first, last, due = sum(losses[:5]), sum(losses[-5:]), sum(wanted[-5:])
        assert last < 0.5 * first, "it learns something"
        assert losses != wanted
        assert abs(last - due) < (0.15 if codec.startswith("topk") else 0.1) * first
        assert sent * less < whole
        assert abs(sent - predicted) <= 0.02 * predicted


@pytest.mark.parametrize("dtype", [torch.bfloat16])
def test_in_bf16_copies_are_counted_and_exact_codes_go_with_codes_of_gradients(pool: Pool, dtype: torch.dtype) -> None:
    for options in ({"gradients": "q4", "parameters": "q4"}, {"gradients": "q4", "parameters": "exact"}):
        for losses, _, _ in pool.run(trained, 2, 2, options, dtype):
            assert sum(losses[-5:]) < 0.5 * sum(losses[:5])


def counted(mesh: DeviceMesh) -> tuple[list[int], bool, int, int]:
    """Bytes of the codes of gathers in two steps of two micro-steps and an evaluation, whether all ranks computed with
    the same, and bytes of copies, predicted and counted."""
    model = zgraph.compile(net(), mesh=mesh, stage=2, compress={"parameters": "q4"})
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    copies, taken = compiled_model(model).session.copies, list[int]()
    x = torch.ones(4, 24)
    for step in range(2):
        before = copies.code_bytes
        with zgraph.no_sync(model):
            model(x).square().mean().backward()
        taken.append(copies.code_bytes - before)
        step_of(model, optimizer, step, mesh.get_rank())
        taken.append(copies.code_bytes - before - taken[-1])
    with torch.no_grad():
        out = model(x)
    others = [torch.empty_like(out) for _ in range(mesh.size())]
    torch.distributed.all_gather(others, out, group=mesh.get_group())
    report = zgraph.report(model)
    held = sum(c.rows.nbytes + c.own.nbytes for c in set(copies._homes.values()))
    return taken, all(torch.equal(out, other) for other in others), report.copies_bytes, held


def test_a_micro_step_sends_heads_and_all_ranks_compute_with_the_same(pool: Pool) -> None:
    for taken, are_alike, copies_bytes, kept in pool.run(counted, 2):
        assert taken[1] == taken[3] < 24 * 8, "nothing changed: heads"
        assert taken[2] < taken[0] / 5
        assert are_alike
        assert 0 < kept <= copies_bytes <= 1.1 * kept


def refused(mesh: DeviceMesh, stage: int, codec: str) -> str:
    with pytest.raises(UsageError) as said:
        zgraph.compile(net(), mesh=mesh, stage=stage, compress={"parameters": codec})
    return str(said.value)


def test_what_cannot_be_is_refused_on_all_ranks(pool: Pool) -> None:
    assert all("at stage 0 none is" in said for said in pool.run(refused, 2, 0, "q8"))
    assert all("take q8 or q4, or stage 2" in said for said in pool.run(refused, 2, 3, "sign"))


def loaded(mesh: DeviceMesh, codec: str) -> tuple[float, float]:
    """How far an evaluation is off after other parameters were loaded, and after all were halved in place."""
    model = zgraph.compile(net(), mesh=mesh, stage=2, compress={"parameters": codec})
    x = torch.randn(16, 24)
    model(x).square().mean().backward()
    torch.manual_seed(7)
    other = torch.nn.Sequential(*[copy.deepcopy(layer) for layer in net()])
    for p in other.parameters():
        torch.nn.init.normal_(p, std=0.3)
    off = []
    for scale in (1.0, 0.5):
        with torch.no_grad():
            if scale == 1.0:
                model.load_state_dict(other.state_dict())
            else:
                for mine, whole in zip(model.parameters(), other.parameters(), strict=True):
                    mine.mul_(scale)
                    whole.mul_(scale)
            off.append(float((model(x) - other(x)).norm() / other(x).norm()))
    return off[0], off[1]


@pytest.mark.parametrize("codec", ["sign", deep("q4"), deep("topk(1%)")])
def test_what_is_loaded_is_computed_with(pool: Pool, codec: str) -> None:
    for after_loading, after_writing in pool.run(loaded, 2, codec):
        assert after_loading < 1e-6
        assert after_writing < 1e-6
