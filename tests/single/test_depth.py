"""A deep model captured by a few of its layers: the graph is that of all of them, and layers that differ are found."""

from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import small
import zgraph
from tests.deep import deep
from zgraph.capture.deep import capture_deep
from zgraph.capture.extrapolate import extrapolate
from zgraph.capture.layers import kinds_and_shapes, shortened, stacks
from zgraph.errors import CaptureError
from zgraph.estimate.layer_scaling import capture_samples
from zgraph.ir import Graph, print_graph

IDS = torch.zeros(2, 16, dtype=torch.int64)
TEXT = {"input_ids": IDS, "labels": IDS}
ROWS = {"x": torch.ones(4, 8)}


class Block(nn.Module):
    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number
        self.norm = nn.BatchNorm1d(8)
        self.linear = nn.Linear(8, 8)
        self.activation = partial(nn.functional.gelu, approximate="tanh")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.activation(self.linear(self.norm(x)))


class Deep(nn.Module):
    """Layers with buffers, which `change` treats by their number before they run."""

    def __init__(self, change: Any = lambda x, number, depth: x, depth: int = 10) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block(number) for number in range(depth))
        self.change = change

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for number, layer in enumerate(self.layers):
            x = layer(self.change(x, number, len(self.layers)))
        return x.square().mean()


class Marked(Deep):
    """Every layer is computed again in the backward."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=False)
        return x.square().mean()


class Turns(Deep):
    """Two kinds of layers, which a configuration lists."""

    def __init__(self, depth: int = 17) -> None:
        super().__init__(depth=depth)
        self.config = SimpleNamespace(kinds=["tanh" if number % 2 else "relu" for number in range(depth)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for kind, layer in zip(self.config.kinds, self.layers, strict=False):
            x = getattr(torch, kind)(layer(x))
        return x.square().mean()


class Shapes(nn.Module):
    """Layers of two shapes that take turns."""

    def __init__(self, depth: int = 9) -> None:
        super().__init__()
        kinds = (nn.Linear(8, 8) if number % 2 else nn.Bilinear(8, 8, 8) for number in range(depth))
        self.layers = nn.ModuleList(kinds)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x).tanh() if isinstance(layer, nn.Linear) else layer(x, x)
        return x.square().mean()


class Two(nn.Module):
    """An encoder, and a decoder all of whose layers read what it made, with one embedding."""

    def __init__(self, depths: tuple[int, int] = (6, 5)) -> None:
        super().__init__()
        self.embed = nn.Embedding(16, 8)
        self.encoder, self.decoder = (nn.ModuleList(nn.Linear(8, 8) for _ in range(depth)) for depth in depths)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = y = self.embed(x)
        for layer in self.encoder:
            x = x + layer(x).relu()
        for layer in self.decoder:
            y = torch.tanh(layer(y) * x)
        return (y @ self.embed.weight.t()).logsumexp(-1).mean()


def on_meta(build: Any) -> nn.Module:
    with torch.device("meta"):
        return build()


def whole(model: nn.Module, inputs: dict[str, Any]) -> Graph:
    return zgraph.trace(model, **inputs)


def few(model: nn.Module, inputs: dict[str, Any], *lengths: int) -> Graph:
    with shortened(dict(zip((s.layers for s in stacks(model)), lengths, strict=True))):
        return whole(model, inputs)


@pytest.mark.parametrize(
    ("build", "depth"),
    [(partial(small.llama, num_layers=5, tie_word_embeddings=True), 5), deep(partial(small.gpt2, num_layers=5), 5)],
)
def test_grown_from_two_three_and_four_layers(build, depth):
    """To the letter, names of values included."""
    model = on_meta(build)
    graphs = {(more,): few(model, TEXT, 2 + more) for more in range(3)}
    assert print_graph(extrapolate(graphs, (depth - 2,))) == print_graph(whole(model, TEXT))


def test_figures_need_less_likeness_than_graphs():
    """Layers of a class with parameters of the same shapes have the same figures, whatever numbers they hold."""
    model = Deep()
    for number, layer in enumerate(model.layers):
        layer.rate = number**2
    assert stacks(model) == []
    (found,) = stacks(model, kinds_and_shapes)
    assert (found.layers, found.period) == (model.layers, 1)
    assert stacks(model, kinds_and_shapes, (nn.Sequential,)) == []


def test_figures_of_layers_that_take_turns_grow_by_the_period():
    model = on_meta(Shapes)
    samples = capture_samples(model, (), ROWS, None)
    assert samples.missing == (3,)
    assert samples.scale([len(g.nodes) for g in samples.members]) == len(whole(model, ROWS).nodes)


def test_two_stacks_at_once():
    model = on_meta(Two)
    counts = ((0, 0), (1, 0), (2, 0), (0, 1), (0, 2), (1, 1))
    graphs = {(a, b): few(model, {"x": IDS}, 3 + a, 3 + b) for a, b in counts}
    assert print_graph(extrapolate(graphs, (3, 2))) == print_graph(whole(model, {"x": IDS}))


@pytest.mark.parametrize(
    ("build", "said"),
    [
        (partial(Deep, depth=13), "with 2, 3, 4, 5 of 13 layers"),
        deep(partial(Deep, lambda x, number, depth: x * (number + 1)), "with 2, 3, 4 of 10 layers"),
        (partial(Deep, lambda x, number, depth: x.tanh() if number == depth - 1 else x, 16), "4, 5, 6 of 16 layers"),
        deep(partial(Marked, depth=13), "with 2, 3, 4, 5 of 13 layers"),
        (Turns, "with 3, 5, 7 of 17 layers"),
    ],
)
def test_layers_that_are_alike(build, said):
    model = on_meta(build)
    graph, how = capture_deep(model, ROWS, None)
    assert said in how
    assert print_graph(graph) == print_graph(whole(model, ROWS))


def frozen() -> nn.Module:
    model = Deep()
    model.layers[:6].requires_grad_(False)
    return model


def tied() -> nn.Module:
    model = Deep(depth=13)
    model.layers[9].linear.weight = model.layers[8].linear.weight
    return model


def other() -> nn.Module:
    model = Deep()
    model.layers[7].activation = partial(nn.functional.gelu, approximate="none")
    return model


def mixed() -> nn.Module:
    model = Turns()
    model.config.kinds[9] = "relu"
    return model


@pytest.mark.parametrize(
    ("build", "why"),
    [
        (partial(Deep, lambda x, number, depth: x.tanh() if number == depth // 2 else x), "do not repeat evenly"),
        (partial(Deep, lambda x, number, depth: x if depth == 10 else x / (1 // 0)), "ZeroDivisionError"),
        (tied, "layers.9.linear.weight is not what other layers have"),
        (frozen, ""),
        (other, ""),
        (mixed, ""),
    ],
)
def test_layers_that_differ_are_all_captured(build, why):
    model = on_meta(build)
    graph, how = capture_deep(model, ROWS, None)
    assert how.startswith("whole")
    assert why in how
    assert {i.target for i in graph.params} == {name for name, _ in model.named_parameters()}


def test_graphs_that_follow_no_pattern():
    graphs = {(more,): few(on_meta(Deep), ROWS, length) for more, length in enumerate((3, 4, 6))}
    with pytest.raises(CaptureError, match="do not repeat evenly"):
        extrapolate(graphs, (5,))
