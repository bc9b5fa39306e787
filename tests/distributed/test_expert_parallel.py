"""Expert parallelism on real ranks: the numbers of plain training, with tokens sent to the ranks of their experts."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
import transformers as hf
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

import zgraph
from tests.deep import DEEP, deep

from . import tensor_zoo as zoo
from .nets import built
from .pool import Pool

NUM_STEPS = 20 if DEEP else 3


@pytest.fixture(scope="module")
def pair() -> Iterator[Pool]:
    """Two ranks alone."""
    found = Pool(2)
    yield found
    found.stop()


def mixtral() -> nn.Module:
    return hf.MixtralForCausalLM(hf.MixtralConfig(**zoo.EXPERTS, num_local_experts=4))


def lopsided() -> nn.Module:
    """A model all of whose tokens go to the experts of the first rank: the others have none."""
    model = mixtral()
    for name, parameter in model.named_parameters():
        if name.endswith("gate.weight"):
            parameter.data.zero_()
            parameter.requires_grad_(False)
    return model


MODELS: dict[str, Callable[[], nn.Module]] = {
    "mixtral": mixtral,
    "lopsided": lopsided,
    "qwen3_moe": zoo.MODELS["qwen3_moe"],
}


def full(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def train(mesh: DeviceMesh, name: str, stage: int, num_micro: int) -> tuple[float, float, float]:
    """The largest relative errors of a loss and of a gradient's norm, and the largest of a parameter in the end."""
    plain, ours = (built(MODELS[name])() for _ in range(2))
    ours = zgraph.compile(ours, stage=stage, expert_parallel=2)
    num_data, mine = mesh.size() // 2, mesh.get_local_rank() // 2
    optimizers = [torch.optim.AdamW(model.parameters(), lr=1e-3) for model in (plain, ours)]
    worst_loss = worst_norm = 0.0
    for step in range(NUM_STEPS):
        for micro in range(num_micro):
            seeds = [100 * step + 10 * micro + rank for rank in range(num_data)]
            losses = [plain(**zoo.batch("mixtral", seed)).loss for seed in seeds]
            (sum(losses) / num_data).backward()
            torch.manual_seed(seeds[mine])
            if micro < num_micro - 1:
                with zgraph.no_sync(ours):
                    loss = ours(**zoo.batch("mixtral", seeds[mine])).loss
                    loss.backward()
            else:
                loss = ours(**zoo.batch("mixtral", seeds[mine])).loss
                loss.backward()
            worst_loss = max(worst_loss, abs(loss.item() / losses[mine].item() - 1))
        norms = [full(nn.utils.clip_grad_norm_(model.parameters(), 0.5)).item() for model in (plain, ours)]
        worst_norm = max(worst_norm, abs(norms[1] / norms[0] - 1))
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    pairs = zip(plain.parameters(), ours.parameters(), strict=True)
    return worst_loss, worst_norm, max(float((full(b) - a).detach().abs().max()) for a, b in pairs)


def assert_close(found: list[tuple[float, float, float]]) -> None:
    for loss, norm, parameter in found:
        assert loss < 2e-6
        assert norm < 2e-6
        assert parameter < 1e-4  # where a gradient is nearly zero, AdamW makes much of its last bits


@pytest.mark.parametrize(
    ("name", "stage", "num_micro"),
    [("qwen3_moe", 3, 1), *(deep(name, stage, 2) for name in MODELS for stage in (0, 1, 2, 3))],
)
def test_two_ranks(pair: Pool, name: str, stage: int, num_micro: int) -> None:
    assert_close(pair.run(train, 2, name, stage, num_micro, limit_s=600 if DEEP else 90))


@pytest.mark.parametrize(
    ("name", "stage", "num_micro"),
    [deep("mixtral", 3, 1), deep("qwen3_moe", 1, 2), deep("mixtral", 0, 2), deep("lopsided", 2, 1)],
)
def test_two_by_two_ranks(pool: Pool, name: str, stage: int, num_micro: int) -> None:
    assert_close(pool.run(train, 4, name, stage, num_micro, limit_s=600 if DEEP else 90))
