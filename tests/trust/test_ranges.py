"""Numbers that choose rows: the numeric check reads every row where there are enough of them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import zgraph
from zgraph.debugging import examine, reference
from zgraph.debugging.ranges import drawn
from zgraph.ir import Graph, parse_graph, print_graph


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
