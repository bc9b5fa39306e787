"""Context parallelism on real ranks: the numbers of plain training, with each sequence in parts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

import zgraph
from tests.deep import DEEP, deep
from tests.peaks import peak_bytes
from zgraph.errors import BatchMismatchError, PeerError, PlacementError, UsageError

from . import tensor_zoo as zoo
from .nets import built
from .pool import Pool

NUM_STEPS = 20 if DEEP else 4


@pytest.fixture(scope="module")
def pair() -> Iterator[Pool]:
    """Two ranks alone."""
    found = Pool(2)
    yield found
    found.stop()


def full(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def train(mesh: DeviceMesh, name: str, stage: int, num_micro: int, tensor: int = 1) -> tuple[float, float, float]:
    """The largest relative errors of a loss and of a gradient's norm, and the largest of a parameter in the end."""
    plain, ours = (
        zoo.builder(name)(),
        zgraph.compile(zoo.builder(name)(), stage=stage, context_parallel=2, tensor_parallel=tensor),
    )
    num_data, mine = mesh.size() // 2 // tensor, mesh.get_local_rank() // 2 // tensor
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
        norms = [full(nn.utils.clip_grad_norm_(model.parameters(), 0.5)).item() for model in (plain, ours)]
        worst_norm = max(worst_norm, abs(norms[1] / norms[0] - 1))
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    pairs = zip(plain.parameters(), ours.parameters(), strict=True)
    return worst_loss, worst_norm, max(float((full(b) - a).abs().max()) for a, b in pairs)


def assert_close(found: list[tuple[float, float, float]]) -> None:
    for loss, norm, parameter in found:
        assert loss < 2e-6
        assert norm < 2e-6
        assert parameter < 1e-4  # where a gradient is nearly zero, AdamW makes much of its last bits


@pytest.mark.parametrize(
    ("name", "stage", "num_micro", "tensor"),
    [("tied", 3, 1, 2), deep("llama", 3, 2, 1), deep("gpt2", 2, 1, 1), deep("tied", 1, 2, 1), deep("gpt2", 2, 2, 2)],
)
def test_four_ranks(pool: Pool, name: str, stage: int, num_micro: int, tensor: int) -> None:
    assert_close(pool.run(train, 4, name, stage, num_micro, tensor, limit_s=600 if DEEP else 90))


@pytest.mark.parametrize(("name", "stage", "num_micro"), [("gpt2", 3, 1), deep("llama", 0, 2), deep("tied", 2, 1)])
def test_two_ranks(pair: Pool, name: str, stage: int, num_micro: int) -> None:
    assert_close(pair.run(train, 2, name, stage, num_micro, limit_s=600 if DEEP else 90))


class Causal(nn.Module):
    """Layers of causal attention, and a loss that is all it returns."""

    def __init__(self, num_heads: int = 4) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.embed = nn.Embedding(zoo.WORDS, 32)
        self.layers = nn.ModuleList(
            nn.ModuleDict(
                {
                    "qkv": nn.Linear(32, 96),
                    "out": nn.Linear(32, 32),
                    "up": nn.Linear(32, 256),
                    "down": nn.Linear(256, 32),
                }
            )
            for _ in range(4)
        )
        self.head = nn.Linear(32, zoo.WORDS)

    def forward(self, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        h = self.embed(ids)
        for layer in self.layers:
            q, k, v = (t.view(*ids.shape, self.num_heads, -1).transpose(1, 2) for t in layer["qkv"](h).chunk(3, -1))
            mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            h = h + layer["out"](mixed.transpose(1, 2).flatten(2))
            h = h + layer["down"](layer["up"](h).relu())
        return nn.functional.cross_entropy(self.head(h).flatten(0, 1), labels.flatten())


def peaks(mesh: DeviceMesh) -> tuple[int, int, float]:
    """Peaks of a step, of a sequence on one rank and of one 3.5 times as long on four; and how far its loss is off."""
    found, off = [], 0.0
    for tokens, contexts in ((512, 1), (1792, 4)):
        model = zgraph.compile(built(Causal)(), stage=3, context_parallel=contexts)
        ids = torch.randint(zoo.WORDS, (1, tokens), generator=torch.Generator().manual_seed(tokens))
        model(ids, ids).backward()
        found.append(peak_bytes(lambda model=model, ids=ids: model(ids, ids).backward()))
        off = max(off, abs(model(ids, ids).item() / built(Causal)()(ids, ids).item() - 1))
    return found[0], found[1], off


def test_four_ranks_have_the_memory_of_three_and_a_half_sequences(pool: Pool) -> None:
    for one, four, off in pool.run(peaks, 4):
        assert four < 1.02 * one
        assert off < 2e-6


def one_head() -> nn.Module:
    return Causal(1)


def go_round(mesh: DeviceMesh, dtype: str | None) -> tuple[float, float, int]:
    """How far losses and gradients are off of a model of one head, whose keys go round; and passes of attention."""
    plain, ours = built(one_head)(), zgraph.compile(built(one_head)(), context_parallel=mesh.size(), param_dtype=dtype)
    worst = worst_gradient = 0.0
    for step in range(2):
        ids = torch.randint(zoo.WORDS, (2, 24), generator=torch.Generator().manual_seed(step))
        losses = plain(ids, ids), ours(ids, ids)
        for loss in losses:
            loss.backward()
        worst = max(worst, abs(losses[1].item() / losses[0].item() - 1))
        wanted, found = (
            torch.cat([full(p.grad).flatten() for p in model.parameters() if p.grad is not None])
            for model in (plain, ours)
        )
        worst_gradient = max(worst_gradient, float((found - wanted).norm() / wanted.norm()))
        plain.zero_grad()
        ours.zero_grad()
    nodes = zgraph.report(ours).entries[0].plan.graph.nodes
    return worst, worst_gradient, sum(node.op.startswith("ring_attention") for node in nodes)


def assert_goes_round(found: list[tuple[float, float, int]], dtype: str | None = None) -> None:
    for loss, gradient, count in found:
        assert loss < (2e-6 if dtype is None else 0.01)
        assert gradient < (1e-5 if dtype is None else 0.05)
        assert count == 8


def test_keys_go_round_where_heads_do_not_divide(pair: Pool) -> None:
    assert_goes_round(pair.run(go_round, 2, None, limit_s=90))


@pytest.mark.parametrize("dtype", [deep(None), deep("bfloat16")])
def test_keys_go_round_four_ranks(pool: Pool, dtype: str | None) -> None:
    assert_goes_round(pool.run(go_round, 4, dtype, limit_s=300), dtype)


def reshard(mesh: DeviceMesh, name: str, path: str) -> list[float]:
    """How far parameters are off that were saved at one layout and loaded at another, and back."""
    layouts: list[dict[str, Any]] = [
        {"context_parallel": 2},
        {},
        {"context_parallel": 2, "tensor_parallel": 2},
        {"context_parallel": 4, "stage": 1},
    ]
    ours = zgraph.compile(zoo.builder(name)(), **layouts[0])
    dcp.save(ours.state_dict(), checkpoint_id=f"{path}/0")
    found = []
    for number, layout in enumerate([*layouts[1:], layouts[0]]):
        other = zgraph.compile(zoo.builder(name)(), **layout)
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


@pytest.mark.parametrize("name", [deep("tied")])
def test_a_checkpoint_is_loaded_at_another_layout_and_back(pool: Pool, name: str, tmp_path: Any) -> None:
    assert pool.run(reshard, 4, name, str(tmp_path)) == [[0.0] * 4] * 4


def refused(mesh: DeviceMesh) -> dict[str, str]:
    """What is said of options and calls that cannot be."""
    found = {}
    wrong: dict[str, dict[str, Any]] = {
        "ranks": {"context_parallel": 3},
        "number": {"context_parallel": 0},
        "twice": {"context_parallel": 2, "tensor_parallel": 2, "sequence_parallel": True},
        "placements": {"context_parallel": 2, "placements": "auto"},
        "pieces": {"context_parallel": 2, "fullgraph": False},
    }
    for name, options in wrong.items():
        try:
            zgraph.compile(zoo.builder("llama")(), **options)
        except UsageError as error:
            found[name] = str(error)
    model = zgraph.compile(built(Causal)(), context_parallel=4)
    try:
        model(torch.zeros(1, 10, dtype=torch.int64), torch.zeros(1, 10, dtype=torch.int64))
    except PlacementError as error:
        found["sequence"] = str(error)
    model = zgraph.compile(built(Causal)(), context_parallel=2)
    ids = torch.full((1, 8), dist.get_rank())
    try:
        model(ids, ids)
    except (BatchMismatchError, PeerError) as error:
        found["batch"] = str(error)
    return found


def test_what_is_wrong_is_said(pool: Pool) -> None:
    words = {
        "ranks": "context_parallel=3, but there are 4 ranks; start a multiple of 3",
        "number": "context_parallel must be a number of ranks",
        "twice": "leave sequence_parallel= out",
        "placements": "give tensor_parallel= too",
        "pieces": "fullgraph must be True",
        "sequence": "(1, 10) does not divide over 4 ranks of context; pad it",
        "batch": "compute together along context, but were given other inputs",
    }
    for found in pool.run(refused, 4):
        assert found.keys() == words.keys()
        assert all(words[name] in found[name] for name in words)
