"""Bytes that coding reads and writes on a rank, by hand."""

import pytest

from tests.cost.test_traffic import step
from zgraph.cost.work import work
from zgraph.ir import Axis
from zgraph.passes import Context, parse_recipe

NUMEL, RANKS = 64 * 64, 2
Q4 = NUMEL // 2 + NUMEL // 128
TOPK = 4 * 41 * 2
"""Of the two parts of the parameter, a chunk each: 2 % of 2048, rounded up."""


@pytest.mark.parametrize(
    ("recipe", "expected"),
    [
        # gradients with rests; sums of two codes; differences from copies; copies with what has changed
        (
            "compress(gradients=q4,parameters=q4)",
            {
                ("bwd", "encode"): 12 * NUMEL + Q4,
                ("bwd", "decode"): 4 * NUMEL // RANKS + Q4,
                ("fwd", "encode"): 12 * NUMEL // RANKS + Q4 // RANKS + 24,
                ("fwd", "decode"): 8 * NUMEL + Q4 + 24,
            },
        ),
        (
            "compress(gradients=topk(2%, chunk=2048))",
            {
                ("bwd", "encode"): 3 * (4 * NUMEL + TOPK) + 8 * NUMEL,
                ("bwd", "decode"): 4 * NUMEL // RANKS + TOPK,
            },
        ),
    ],
)
def test_coding_reads_and_writes_what_it_needs(recipe: str, expected: dict[tuple[str, str], int]) -> None:
    graph = parse_recipe(f"canonicalize,partition(stage=2),{recipe}").run(
        step(((64, 64),)), Context((Axis("shard", RANKS),))
    )
    found = {(node.phase.value, node.op): work(graph, node).num_bytes for node in graph.nodes if "code" in node.op}
    assert found == expected
