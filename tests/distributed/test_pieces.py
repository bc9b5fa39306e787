"""`fullgraph=False`: a forward that is no one graph is captured in pieces, and stays sharded between them."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import zgraph
from zgraph.compiler.compiled_model import compiled_model
from zgraph.errors import StaleParametersError, UsageError
from zgraph.runtime import eager_fallback
from zgraph.runtime.peers import ASK_AFTER_SECONDS

from .lockstep import Lockstep, assert_same
from .nets import CLASSES, WIDTH, built, rows
from .pool import Pool

STAGES = pytest.mark.parametrize("stage", range(4))


class Layer(nn.Module):
    """A break in the middle, of the kind that a subclass makes."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.out, self.norm = nn.Linear(WIDTH, 20), nn.Linear(20, WIDTH), nn.LayerNorm(WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = F.gelu(self.into(x))
        return self.norm(x + self.out(self.between(hidden)))

    def between(self, hidden: torch.Tensor) -> torch.Tensor:
        torch._dynamo.graph_break()
        return hidden


class Deep(nn.Module):
    """Layers one behind the other, and a loss."""

    def __init__(self, layer: Callable[[], nn.Module] = Layer, depth: int = 10) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layer() for _ in range(depth))
        self.last = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return F.cross_entropy(self.last(x), y)


class Branching(Layer):
    """Which way it goes depends on data that all ranks have."""

    def between(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden * 2 if self.out.weight.shape[0] and torch.ones(()).item() > 0 else hidden


class Switched(Layer):
    """Its second linear layer runs where torch.compile is switched off."""

    @torch.compiler.disable
    def between(self, hidden: torch.Tensor) -> torch.Tensor:
        return F.linear(F.linear(hidden, self.out.weight, self.out.bias), self.out.weight.t()) + hidden


class Recurrent(Layer):
    """Packed sequences and an LSTM, whose parameters are in a list as well."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(20, 20, batch_first=True)

    def between(self, hidden: torch.Tensor) -> torch.Tensor:
        sequence = hidden.view(2, -1, 20)
        packed = nn.utils.rnn.pack_padded_sequence(sequence, torch.tensor([3, 2]), batch_first=True)
        states, _ = nn.utils.rnn.pad_packed_sequence(self.rnn(packed)[0], batch_first=True)
        return hidden + states.reshape(-1, 20)


class Counted(Layer):
    """Statistics of batches, kept by eager code."""

    def __init__(self) -> None:
        super().__init__()
        self.batches = nn.BatchNorm1d(20)

    @torch.compiler.disable
    def between(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.batches(hidden)


class Solving(Layer):
    """An op that zgraph has no form for: its piece runs eagerly."""

    def between(self, hidden: torch.Tensor) -> torch.Tensor:
        weight = self.out.weight
        return hidden + torch.linalg.cholesky(weight @ weight.t() + torch.eye(WIDTH)).sum()


class Clamped(Layer):
    """Eager code that keeps a parameter within bounds."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.bound()
        return super().forward(x)

    @torch.compiler.disable
    def bound(self) -> None:
        with torch.no_grad():
            self.into.weight.clamp_(-0.1, 0.1)
        self.norm.weight.data.mul_(0.99)
        self.out.weight.data = F.normalize(self.out.weight.data)


class Printing(Layer):
    def between(self, hidden: torch.Tensor) -> torch.Tensor:
        print("shape", hidden.shape)
        return hidden


LAYERS = [Layer, Branching, Switched, Recurrent, Counted, Solving, Printing]


Options = dict[str, object]


def train(mesh: DeviceMesh, stage: int, layer: Callable[[], nn.Module], options: Options) -> tuple[float, float]:
    pair = Lockstep(mesh, built(lambda: Deep(layer, 2)), stage=stage, fullgraph=False, **options)
    for step in range(4):
        micro = 3 if step == 2 else 1
        pair.step(*(rows(100 * step + 10 * number + pair.rank) for number in range(micro)), no_sync=True)
    return pair.errors


@pytest.mark.parametrize("layer", LAYERS, ids=[layer.__name__ for layer in LAYERS])
@pytest.mark.parametrize("stage", [0, 1, 3])
def test_training_is_that_of_ddp(pool: Pool, stage: int, layer: Callable[[], nn.Module]) -> None:
    assert_same(pool.run(train, 2, stage, layer, {}))


@pytest.mark.parametrize("options", [{"offload": "parameters"}, {"recompute": True}], ids=str)
def test_with_other_options(pool: Pool, options: Options) -> None:
    assert_same(pool.run(train, 2, 3, Switched, options))


def clamp(mesh: DeviceMesh, stage: int) -> float:
    """How far parameters that the forward writes to are from eager PyTorch's."""
    model, reference = (
        zgraph.compile(built(lambda: Deep(Clamped, 2))(), stage=stage, mesh=mesh, fullgraph=False),
        built(lambda: Deep(Clamped, 2))(),
    )
    for number in range(3):
        for side in (model, reference):
            side(*rows(number)).backward()
            with torch.no_grad():
                for parameter in side.parameters():
                    parameter.sub_(0.1 * parameter.grad)
            side.zero_grad()
    whole = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in model.parameters()]
    return max(float((a - b).abs().max()) for a, b in zip(whole, reference.parameters(), strict=True))


@STAGES
def test_what_eager_code_writes_to_a_parameter_is_kept(pool: Pool, stage: int) -> None:
    assert max(pool.run(clamp, 2, stage)) <= 1e-6


def count_gathered(mesh: DeviceMesh) -> tuple[int, int, int]:
    """Bytes at rest, the largest that eager code had gathered at a time, and the number of graphs."""
    model = zgraph.compile(built(lambda: Deep(Switched, 4))(), stage=3, mesh=mesh, fullgraph=False)
    alive: list[int] = []
    whole = eager_fallback.full

    def watched(session: object, slot: object) -> torch.Tensor:
        made = whole(session, slot)  # type: ignore[arg-type]
        tensors.add(made)
        alive.append(sum(t.nbytes for t in tensors))
        return made

    from weakref import WeakSet

    from zgraph.runtime import pieces

    tensors: WeakSet[torch.Tensor] = WeakSet()
    pieces.full, before = watched, pieces.full
    try:
        model(*rows(0)).backward()
    finally:
        pieces.full = before
    return compiled_model(model).session.store.rest_bytes, max(alive), len(compiled_model(model).entries)


def test_no_more_is_whole_than_an_op_reads(pool: Pool) -> None:
    bytes_of_a_layer = 4 * (20 * WIDTH + WIDTH)
    for at_rest, gathered, graphs in pool.run(count_gathered, 2):
        total = sum(p.nbytes for p in Deep(Switched, 4).parameters())
        assert at_rest <= total // 2 + 64 * 40
        assert 0 < gathered <= bytes_of_a_layer
        assert graphs >= 8


class Apart(Layer):
    """Which parameter is used depends on the rank's own data."""

    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Linear(20, 20)
        self.sign = torch.ones(())

    def between(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.other(hidden) if self.sign.item() > 0 else hidden


def go_apart(mesh: DeviceMesh) -> str:
    model = zgraph.compile(built(lambda: Deep(Apart, 1))(), stage=3, mesh=mesh, fullgraph=False)
    try:
        for number in range(4):
            model.layers[0].sign = torch.tensor(1.0 if number and mesh.get_local_rank() else -1.0)
            model(*rows(number)).backward()
    except zgraph.errors.ZgraphError as error:
        return str(error)
    return "nothing was raised"


def test_ranks_that_go_another_way_are_told(pool: Pool) -> None:
    for text in pool.run(go_apart, 2, spoils=True):
        assert text != "nothing was raised"


@torch.compiler.disable
def take_turns(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The second rank comes late to a gather, and the first to the next piece."""
    if dist.get_rank() == 1:
        time.sleep(3 * ASK_AFTER_SECONDS)
    scaled = hidden * weight.mean()
    if dist.get_rank() == 0:
        time.sleep(3 * ASK_AFTER_SECONDS)
    return scaled


class Late(Layer):
    def between(self, hidden: torch.Tensor) -> torch.Tensor:
        return take_turns(hidden, self.norm.weight)


def test_a_rank_that_was_late_once_is_not_taken_for_one_that_goes_another_way(pool: Pool) -> None:
    assert_same(pool.run(train, 2, 3, Late, {}))


class Sequences(nn.Module):
    """A recurrent layer over the rows."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.last = nn.GRU(WIDTH, 8), nn.Linear(8, CLASSES)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(self.last(self.rnn(x)[0]), y)


def record_recurrent(mesh: DeviceMesh) -> tuple[tuple[float, float], int, int]:
    """Errors of a recurrent net, how many graphs were captured, and how many of its flat weights are not at rest."""
    pair = Lockstep(mesh, built(Sequences), stage=3)
    for step in range(2):
        pair.step(rows(10 * step + pair.rank))
    model = pair.ours.model
    others = sum(not isinstance(weight, DTensor) for weight in model.rnn._flat_weights)
    return pair.errors, len(zgraph.report(model).entries), others


def test_recurrent_layers_are_captured_once(pool: Pool) -> None:
    answers = pool.run(record_recurrent, 2)
    assert_same([errors for errors, _, _ in answers])
    assert [rest for _, *rest in answers] == [[1, 0]] * 2


class Checkpointed(Layer):
    """Activation checkpointing of what is not captured."""

    reentrant = False

    @torch.compiler.disable
    def between(self, hidden: torch.Tensor) -> torch.Tensor:
        return checkpoint(lambda x: self.into(self.out(x)), hidden, use_reentrant=self.reentrant)


class Reentrant(Checkpointed):
    reentrant = True


class InAGraph(Layer):
    """Activation checkpointing within a piece."""

    def between(self, hidden: torch.Tensor) -> torch.Tensor:
        torch._dynamo.graph_break()
        return checkpoint(lambda x: self.into(self.out(x)).tanh(), hidden, use_reentrant=False)


def checkpoint_eager_code(mesh: DeviceMesh, layer: Callable[[], nn.Module], fullgraph: object) -> str:
    model = zgraph.compile(built(lambda: Deep(layer, 2))(), stage=3, mesh=mesh, fullgraph=fullgraph)
    try:
        model(*rows(0)).backward()
    except UsageError as error:
        return str(error)
    return "nothing was raised"


@pytest.mark.parametrize("layer", [Checkpointed, Reentrant])
@pytest.mark.parametrize("fullgraph", [False, "eager"])
def test_checkpoints_of_eager_code_are_refused(pool: Pool, layer: Callable[[], nn.Module], fullgraph: object) -> None:
    for text in pool.run(checkpoint_eager_code, 2, layer, fullgraph):
        assert "torch.utils.checkpoint is around code that" in text


def test_checkpoints_of_captured_code_are_taken(pool: Pool) -> None:
    assert_same(pool.run(train, 2, 3, InAGraph, {}))


def change_between(mesh: DeviceMesh) -> str:
    """Parameters of eager code are changed between forward and backward."""
    model = zgraph.compile(built(lambda: Deep(Switched, 1))(), stage=3, mesh=mesh, fullgraph=False)
    loss = model(*rows(0))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
    try:
        loss.backward()
    except StaleParametersError as error:
        return str(error)
    return "nothing was raised"


def test_parameters_that_change_before_the_backward_are_told(pool: Pool) -> None:
    for text in pool.run(change_between, 2):
        assert "between this forward and its backward" in text


def infer(mesh: DeviceMesh, mode: str) -> float:
    """How far a loss without gradients is from eager PyTorch's."""
    build = built(lambda: Deep(Switched, 2))
    model, reference = zgraph.compile(build(), stage=3, mesh=mesh, fullgraph=False), build()
    with getattr(torch, mode)():
        return abs(model(*rows(0)).item() - reference(*rows(0)).item())


@pytest.mark.parametrize("mode", ["no_grad", "inference_mode"])
def test_without_gradients(pool: Pool, mode: str) -> None:
    assert max(pool.run(infer, 2, mode)) <= 1e-6


class Clamping(nn.Module):
    """Writes to a parameter where torch can capture it, and zgraph cannot take it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.layer.weight.data.clamp_(-0.05, 0.05)
        return self.layer(x).sum()


def test_a_captured_write_by_data_is_in_the_parameter() -> None:
    model = zgraph.compile(Clamping(), fullgraph=False)
    model(torch.ones(2, 4)).backward()
    assert float(model.layer.weight.detach().abs().max()) <= 0.0500001
