"""Buckets move gathers and reductions, never what is computed."""

from functools import cache

import pytest
import torch

import small
import zgraph
from zgraph.ir import OPS, Axis, Graph
from zgraph.passes import Context, parse_recipe


@cache
def captured() -> Graph:
    ids = torch.zeros(2, 8, dtype=torch.int64)
    return zgraph.trace(small.llama(16, 4, 13), input_ids=ids, labels=ids, param_dtype=torch.bfloat16)


def computed(graph: Graph) -> list[str]:
    return [n.name for n in graph.nodes if n.op not in OPS]


@pytest.mark.parametrize("stage", range(4))
@pytest.mark.parametrize("max_bytes", [2000, 10_000, 1_000_000])
def test_what_is_computed_again_stays_where_it_is_needed(stage, max_bytes):
    """A bucket waits for the casts of all its members, which must not hold up what comes after it."""
    context = Context(mesh=(Axis("shard", 2),))
    before = parse_recipe(f"canonicalize,partition(stage={stage}),recompute(keep_bytes=1)").run(captured(), context)
    bucket = parse_recipe(f"partition,bucket(max_bytes={max_bytes},pack_below_bytes={max_bytes})").passes[-1]
    after = bucket.run(before, context)
    assert after != before
    assert computed(after) == computed(before)
