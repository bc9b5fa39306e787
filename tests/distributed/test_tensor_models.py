"""Models of many kinds on ranks that compute together: what plain training makes of them, dropout included."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

import zgraph
from tests.deep import DEEP, deep

from . import tensor_zoo as zoo
from .pool import Pool

NUM_STEPS = 20 if DEEP else 5
MAX_NORM = 0.5

EXACT = {"tied": torch.float64}
"""Models of which plain training in fp32 rounds more than the limit is: up to 6e-6 of a norm, ranks together 1.4e-6."""


@pytest.fixture(scope="module")
def pair() -> Iterator[Pool]:
    """Two ranks alone."""
    found = Pool(2)
    yield found
    found.stop()


def full(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def train(
    mesh: DeviceMesh, name: str, stage: int, num_micro: int = 1, *, sequence_parallel: bool = False
) -> tuple[float, float, float]:
    """The largest relative errors of a loss and of a gradient's norm, and the largest of a parameter in the end.

    Each data rank has its own batch, and its own seed for dropout.
    """
    plain, ours = (
        zoo.builder(name)().to(EXACT.get(name)),
        zgraph.compile(zoo.builder(name)(), stage=stage, tensor_parallel=2, sequence_parallel=sequence_parallel),
    )
    num_data, mine = mesh.size() // 2, mesh.get_local_rank() // 2
    optimizers = [torch.optim.AdamW(model.parameters(), lr=1e-3) for model in (plain, ours)]
    worst_loss = worst_norm = 0.0
    for step in range(NUM_STEPS):
        for micro in range(num_micro):
            seeds = [100 * step + 10 * micro + rank for rank in range(num_data)]
            losses = []
            for seed in seeds:
                torch.manual_seed(seed)
                losses.append(plain(**zoo.batch(name, seed)).loss)
            (sum(losses) / num_data).backward()
            torch.manual_seed(seeds[mine])
            if micro < num_micro - 1:
                with zgraph.no_sync(ours):
                    loss = ours(**zoo.batch(name, seeds[mine])).loss
                    loss.backward()
            else:
                loss = ours(**zoo.batch(name, seeds[mine])).loss
                loss.backward()
            worst_loss = max(worst_loss, abs(loss.item() / losses[mine].item() - 1))
        norms = [full(nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)).item() for model in (plain, ours)]
        worst_norm = max(worst_norm, abs(norms[1] / norms[0] - 1))
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    pairs = zip(plain.parameters(), ours.parameters(), strict=True)
    return worst_loss, worst_norm, max(float((full(b) - a).abs().max()) for a, b in pairs)


def in_parts(mesh: DeviceMesh, name: str, stage: int) -> tuple[float, float, float]:
    """The same with activations cut along the sequence."""
    return train(mesh, name, stage, 2, sequence_parallel=True)


def assert_close(found: list[tuple[float, float, float]]) -> None:
    for loss, norm, parameter in found:
        assert loss < 2e-6
        assert norm < 2e-6
        assert parameter < 1e-4  # where a gradient is nearly zero, AdamW makes much of its last bits


@pytest.mark.parametrize(
    ("name", "stage", "num_micro"),
    [
        deep("tied", 3, 2),
        *(deep(name, stage, num_micro) for name, stage, num_micro in (("bert", 0, 2), ("t5", 3, 1), ("gpt2", 2, 2))),
        *(deep(name, stage, num_micro) for name, stage, num_micro in (("vit", 1, 2), ("mixtral", 3, 2))),
        *(deep(name, stage, num_micro) for name, stage, num_micro in (("qwen3_moe", 2, 1), ("llama", 1, 1))),
    ],
)
def test_two_by_two_ranks(pool: Pool, name: str, stage: int, num_micro: int) -> None:
    assert_close(pool.run(train, 4, name, stage, num_micro, limit_s=600 if DEEP else 90))


@pytest.mark.parametrize(
    ("name", "stage"),
    [
        ("bert", 3),
        ("mixtral", 2),
        *(deep(name, stage) for name, stage in (("llama", 3), ("tied", 1), ("gpt2", 3), ("t5", 2))),
        *(deep(name, stage) for name, stage in (("vit", 3), ("qwen3_moe", 3))),
    ],
)
def test_two_ranks(pair: Pool, name: str, stage: int) -> None:
    assert_close(pair.run(train, 2, name, stage, limit_s=600 if DEEP else 90))


def reshard(mesh: DeviceMesh, name: str, path: str) -> list[float]:
    """How far parameters are off that were saved at one layout and loaded at another, and back."""
    ours = zgraph.compile(zoo.builder(name)(), stage=3, tensor_parallel=2)
    dcp.save(ours.state_dict(), checkpoint_id=f"{path}/0")
    others = [zgraph.compile(zoo.builder(name)(), stage=3), zgraph.compile(zoo.builder(name)(), tensor_parallel=2)]
    found = []
    for number, other in enumerate(others):
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.zero_()
        held = other.state_dict()
        dcp.load(held, checkpoint_id=f"{path}/{number}")
        other.load_state_dict(held)
        dcp.save(other.state_dict(), checkpoint_id=f"{path}/{number + 1}")
        pairs = zip(ours.parameters(), other.parameters(), strict=True)
        found.append(max(float((full(a) - full(b)).detach().abs().max()) for a, b in pairs))
    return found


@pytest.mark.parametrize("name", [deep("mixtral"), deep("t5"), deep("tied")])
def test_a_checkpoint_is_loaded_at_another_layout_and_back(pool: Pool, name: str, tmp_path: Any) -> None:
    assert pool.run(reshard, 4, name, str(tmp_path)) == [[0.0, 0.0]] * 4


TOGETHER: dict[str, dict[str, Any]] = {
    "tensor": {"tensor_parallel": {"autotp_size": 2}, "zgraph": {"sequence_parallel": True}},
    "context": {"sequence_parallel_size": 2},
}
"""Keys by which two ranks have one batch."""


def engine(mesh: DeviceMesh, path: str, axis: str) -> tuple[float, float, float, list[int]]:
    """How far an engine's losses and gradient norms are from those of plain training, and a loss after a checkpoint."""
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 2,
        "gradient_clipping": MAX_NORM,
        "zero_optimization": {"stage": 3},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "weight_decay": 0.01}},
        **TOGETHER[axis],
    }
    ours, plain = zgraph.initialize_engine(model=zoo.builder("tied")(), config=config)[0], zoo.builder("tied")()
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-3, weight_decay=0.01)
    mine, worst_loss, worst_norm = ours.get_data_parallel_rank(), 0.0, 0.0
    torch.manual_seed(mine)
    for step in range(3):
        losses = [[plain(**zoo.batch("tied", 100 * step + 10 * m + r)).loss for r in range(2)] for m in range(2)]
        (sum(loss for row in losses for loss in row) / 4).backward()
        norm = nn.utils.clip_grad_norm_(plain.parameters(), MAX_NORM)
        optimizer.step()
        optimizer.zero_grad()
        for micro in range(2):
            loss = ours(**zoo.batch("tied", 100 * step + 10 * micro + mine)).loss
            ours.backward(loss)
            ours.step()
            worst_loss = max(worst_loss, abs(loss.item() / losses[micro][mine].item() - 1))
        worst_norm = max(worst_norm, abs(float(ours.get_global_grad_norm()) / norm.item() - 1))
    ours.save_checkpoint(path)
    after = [ours(**zoo.batch("tied", 7)).loss.item()]
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.zero_()
    ours.load_checkpoint(path)
    after.append(ours(**zoo.batch("tied", 7)).loss.item())
    along = ours.get_tensor_parallel_rank() if axis == "tensor" else ours.get_sequence_parallel_rank()
    numbers = [ours.world_size, ours.dp_world_size, ours.get_data_parallel_rank(), along]
    return worst_loss, worst_norm, abs(after[0] - after[1]), numbers


@pytest.mark.parametrize("axis", [deep("tensor"), deep("context")])
def test_an_engine(pool: Pool, axis: str, tmp_path: Any) -> None:
    for rank, (loss, norm, resumed, numbers) in enumerate(pool.run(engine, 4, str(tmp_path), axis, limit_s=300)):
        assert loss < 2e-6
        assert norm < 2e-6
        assert resumed == 0
        assert numbers == [4, 2, rank // 2, rank % 2]


@pytest.mark.parametrize(("name", "stage"), [("mixtral", 1), deep("bert", 3), deep("tied", 2), deep("t5", 0)])
def test_sequences_in_parts(pair: Pool, name: str, stage: int) -> None:
    assert_close(pair.run(in_parts, 2, name, stage, limit_s=600 if DEEP else 90))
