"""Numbers that choose rows: the numeric check reads every row where there are enough of them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

import zgraph
from zgraph.debugging import examine, reference
from zgraph.debugging.ranges import drawn
from zgraph.ir import Graph, TensorType, parse_graph, print_graph


class Net(nn.Module):
    """An embedding whose rows are read as the input's views say, and a loss."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = nn.Embedding(5, 4)
        self.head = nn.Linear(4, 7)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(self.head(self.rows(x)).flatten(0, 1), y.flatten())


def captured() -> Graph:
    ids = torch.zeros(3, 4, dtype=torch.long)
    return zgraph.trace(Net(), ids, ids)


def corrupted(graph: Graph) -> Graph:
    """The graph whose embedding reads its weight through triu: rows from the third on are wrong."""
    lines = print_graph(graph, origins=False).splitlines()
    at = next(i for i, line in enumerate(lines) if "= aten.embedding.default(" in line)
    weight = lines[at].partition("aten.embedding.default(")[2].partition(",")[0]
    lines[at] = lines[at].replace(f"({weight},", "(%wrong,")
    lines.insert(at, f"fwd %wrong: f32[5, 4] = aten.triu.default({weight}, -1)")
    if "op aten.triu.default" not in lines:
        lines.insert(1, "op aten.triu.default")
    return parse_graph("\n".join(lines) + "\n")


@pytest.mark.parametrize("seed", [0, 5])
def test_an_embedding_wrong_in_its_upper_rows_is_found(seed: int) -> None:
    graph = captured()
    known = reference(graph, 2, seed)
    failure = examine(known, corrupted(graph))
    assert failure is not None
    assert failure.kind == "differs"


def test_inputs_cover_what_they_index() -> None:
    known = reference(captured(), 2)
    whole = [v for v in known.numbers.batch(0).values() if v[0].dtype == torch.int64]
    assert [set(v[0].flatten().tolist()) for v in whole] == [set(range(5)), {-100, *range(7)}]


def test_ranks_take_turns_where_there_are_too_few() -> None:
    random = torch.Generator().manual_seed(0)
    seen = {int(n) for rank in range(3) for n in drawn(4, 10, rank, random)}
    assert seen == set(range(10))


class Rows(nn.Module):
    """An embedding read by what a function makes of whole numbers."""

    def __init__(self, index: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.rows = nn.Embedding(9, 2)
        self.index = index

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.rows(self.index(ids))).sum()


@pytest.mark.parametrize(
    ("index", "low", "high"),
    [
        (lambda i: i, 0, 8),
        (lambda i: i + 2, -2, 6),
        (lambda i: 2 + i.to(torch.int32), -2, 6),
        (lambda i: i - 3, 3, 11),
        (lambda i: 5 - i, -3, 5),
        (lambda i: -i, -8, 0),
        (lambda i: 2 * i + 1, 0, 3),
        (lambda i: i.clamp(0, 8), -2, 10),
        (lambda i: i.clamp(min=2), -100, 8),
        (lambda i: i % 9, 0, 17),
        (lambda i: torch.div(i, 4, rounding_mode="floor"), 0, 35),
        (lambda i: i.flatten()[1:].unsqueeze(0), 0, 8),
        (lambda i: torch.cat([i, i + 1]), 0, 7),
        (lambda i: torch.stack([i, 8 - i]), 0, 8),
        (lambda i: torch.arange(8) + i, 0, 1),
        (lambda i: torch.where(i != -7, i, 0), 0, 8),
        (lambda i: i.masked_fill(i == -7, 1) + 1, -1, 7),
        (lambda i: torch.ops.aten.copy(torch.zeros_like(i), i) + 1, -1, 7),
    ],
)
def test_what_indexes_is_followed_to_the_input(index, low, high):
    graph = zgraph.trace(Rows(index), torch.zeros(6, 8, dtype=torch.long))
    known = reference(graph, 2)
    given = torch.stack(next(iter(v for v in known.numbers.batch(0).values() if v[0].dtype == torch.int64)))
    numbers = set(given.flatten().tolist()) - {-7}
    if low > -100:
        assert (min(numbers), max(numbers)) == (low, high)
    chosen = set(torch.stack([index(ids) for ids in given]).flatten().tolist())
    assert chosen <= set(range(9))
    assert len(chosen) >= min(9, (high - low + 1) if low > -100 else 7)


def test_what_is_replaced_is_given_too():
    graph = zgraph.trace(Rows(lambda i: torch.where(i != -7, i, 0)), torch.zeros(6, 8, dtype=torch.long))
    (given,) = (v for v in reference(graph, 2).numbers.batch(0).values() if v[0].dtype == torch.int64)
    assert (given[0] == -7).any()
    assert (given[0] != -7).any()


def test_a_mask_of_other_elements_replaces_nothing():
    graph = zgraph.trace(Rows(lambda i: torch.where(i.flip(0) != -7, i, 0)), torch.zeros(6, 8, dtype=torch.long))
    (given,) = (v for v in reference(graph, 2).numbers.batch(0).values() if v[0].dtype == torch.int64)
    assert set(given[0].flatten().tolist()) == set(range(9))


def test_sizes_that_are_symbols_bound_what_indexes_them():
    class Chosen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(3))

        def forward(self, x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
            return (x[ids + x.shape[0] // 2] * self.scale).sum()

    graph = zgraph.trace(Chosen(), torch.rand(8, 3), torch.zeros(20, dtype=torch.long), dynamic=True)
    assert any(
        not isinstance(d, int) for i in graph.inputs if isinstance(i.value.type, TensorType) for d in i.value.type.shape
    )
    values = reference(graph, 2).numbers.batch(0)
    (x,) = (v[0] for v in values.values() if v[0].ndim == 2)
    (ids,) = (v[0] for v in values.values() if v[0].dtype == torch.int64)
    assert (int(ids.min()), int(ids.max())) == (-(len(x) // 2), len(x) - 1 - len(x) // 2)


def test_buffers_that_index_cover_all_rows():
    class Buffered(Rows):
        def __init__(self) -> None:
            super().__init__(lambda i: i)
            self.register_buffer("ids", torch.zeros(12, dtype=torch.long))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (self.rows(self.ids) * x).sum()

    known = reference(zgraph.trace(Buffered(), torch.rand(2)), 2)
    (ids,) = (v for v in known.numbers.rest.values() if v.dtype == torch.int64)
    assert set(ids.tolist()) == set(range(9))
