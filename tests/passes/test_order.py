"""The one topological sort: data, writes, randomness, releases and phases hold whatever the priority."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.ir.strategies import graphs
from zgraph.ir import Axis, parse_graph, verify
from zgraph.ir.aliases import Memory
from zgraph.passes import MIXED, Context, parse_recipe
from zgraph.passes.analysis.order import dependencies, reorder

HEAD = """graph "g"
op aten.add_.Tensor views(0) writes(0)
op aten.bernoulli.p random
op aten.neg.default
op aten.t.default views(0)
op user.op.default opaque
input %x: f32[4]
input %y: f32[4]
"""


def backwards(lines: str) -> list[str]:
    """The names in the order that asks for the last line first."""
    graph = parse_graph(HEAD + lines)
    return [n.name for n in reorder(graph, lambda position, node: -position).nodes]


def test_independent_nodes_go_where_the_priority_wants_them():
    assert backwards("fwd %a: f32[4] = aten.neg.default(%x)\nfwd %b: f32[4] = aten.neg.default(%y)\n") == ["b", "a"]


@pytest.mark.parametrize(
    "lines",
    [
        # a reader after what it reads
        "fwd %a: f32[4] = aten.neg.default(%x)\nfwd %b: f32[4] = aten.neg.default(%a)\n",
        # a write after the readers of its memory, also through a view
        "fwd %a: f32[4] = aten.neg.default(%x)\nfwd %b: f32[4] = aten.add_.Tensor(%x, 1)\n",
        "fwd %v: f32[4] = aten.t.default(%x)\nfwd %a: f32[4] = aten.neg.default(%v)\n"
        "fwd %b: f32[4] = aten.add_.Tensor(%x, 1)\n",
        # a reader after the writes to its memory, also through a view
        "fwd %a: f32[4] = aten.add_.Tensor(%x, 1)\nfwd %b: f32[4] = aten.neg.default(%x)\n",
        "fwd %v: f32[4] = aten.t.default(%x)\nfwd %a: f32[4] = aten.add_.Tensor(%v, 1)\n"
        "fwd %b: f32[4] = aten.neg.default(%x)\n",
        # two writes
        "fwd %a: f32[4] = aten.add_.Tensor(%x, 1)\nfwd %b: f32[4] = aten.add_.Tensor(%x, 2)\n",
        # random and unknown ops among themselves
        "fwd %a: f32[4] = aten.bernoulli.p(%x)\nfwd %b: f32[4] = aten.bernoulli.p(%y)\n",
        "fwd %a: f32[4] = user.op.default(%x)\nfwd %b: f32[4] = aten.bernoulli.p(%y)\n"
        "fwd %c: f32[4] = user.op.default()\n",
        # a release after every user of its memory
        "fwd %c: f32[4] = copy(%x)\nfwd %v: f32[4] = aten.t.default(%c)\nfwd %a: f32[4] = aten.neg.default(%v)\n"
        "fwd release(%c)\n",
        # phases
        "fwd %a: f32[4] = aten.neg.default(%x)\nbwd %b: f32[4] = aten.neg.default(%x)\n"
        "upd %c: f32[4] = aten.neg.default(%x)\n",
    ],
)
def test_an_order_that_matters_is_kept(lines):
    assert backwards(lines) == [n.name for n in parse_graph(HEAD + lines).nodes]


def test_ties_keep_the_order_they_had():
    lines = "".join(f"fwd %v{i}: f32[4] = aten.neg.default(%x)\n" for i in range(9))
    graph = parse_graph(HEAD + lines)
    assert reorder(graph, lambda position, node: 0).nodes == graph.nodes


def test_memory_knows_what_shares_it():
    memory = Memory(
        parse_graph(
            HEAD + "fwd %c: f32[4] = copy(%x)\nfwd %v: f32[4] = aten.t.default(%c)\n"
            "fwd %u: f32[4] = aten.t.default(%v)\nfwd %n: f32[4] = aten.neg.default(%u)\n"
            "return fwd output %v\n"
        )
    )
    assert memory.roots("u") == memory.roots("v") == memory.roots("c") == {"c"}
    assert memory.roots("x") == {"x"}
    assert memory.last_uses()["c"] == 3
    assert memory.last_uses()["n"] == 3
    assert memory.returned() == {"c"}


@settings(max_examples=40, deadline=None)
@given(graphs(), st.randoms(use_true_random=False), st.integers(1, 3))
def test_any_priority_leaves_a_valid_graph(graph, random, num_ranks):
    after = parse_recipe(MIXED).run(graph, Context((Axis("shard", num_ranks),)))
    priority = [random.random() for _ in after.nodes]
    mixed = reorder(after, lambda position, node: priority[position])
    verify(mixed)
    assert set(mixed.nodes) == set(after.nodes)
    assert all(before < position for position, needs in enumerate(dependencies(mixed)) for before in needs)


def test_what_is_sent_is_written_and_freed_once_it_is_waited_for():
    graph = parse_graph(
        HEAD.replace('graph "g"', 'graph "g" mesh(shard=2)').replace("f32[4]", "f32[4]<V>")
        + 'bwd %p: f32[4]<P(mean)> = pending(%x, reduce="mean")\nbwd %s: future f32[4]<R> = all_reduce_start(%p)\n'
        + "bwd %r: f32[4]<R> = wait(%s)\nbwd %w: f32[4]<V> = aten.add_.Tensor(%x, 1)\n"
    )
    assert dependencies(graph)[-1] == {0, 1, 2}
