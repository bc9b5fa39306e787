"""Instruments of a pipeline: counts, dumps, and the name of the pass that broke the graph."""

from dataclasses import dataclass, replace
from typing import ClassVar

import pytest

from zgraph.errors import VerifyError
from zgraph.ir import Axis, Graph, parse_graph
from zgraph.passes import Context, Pass, Pipeline, parse_recipe
from zgraph.passes.core.instruments import Dump, Log, Verify

GRAPH = parse_graph("""graph "net"
op aten.detach.default views(0)
op aten.mul.Tensor
param %w: f32[4] "w"
input %x: f32[4]
tangent %t: f32[4]
fwd %x2: f32[4] = aten.detach.default(%x)
fwd %y: f32[4] = aten.mul.Tensor(%x2, %w)
bwd %g: f32[4] = aten.mul.Tensor(%x, %t)
return fwd output %y
return bwd grad "w" %g
""")
CONTEXT = Context(mesh=(Axis("shard", 2),))
RECIPE = "canonicalize,partition(stage=2),all-gather,reduce-scatter,release,dce"


@dataclass(frozen=True)
class Break(Pass):
    """Forgets the nodes that it should keep."""

    name: ClassVar[str] = "break"

    def run(self, graph: Graph, context: Context) -> Graph:
        return replace(graph, nodes=graph.nodes[1:])


@dataclass(frozen=True)
class Misname(Pass):
    """Gives a value a name that text cannot have."""

    name: ClassVar[str] = "misname"

    def run(self, graph: Graph, context: Context) -> Graph:
        node = replace(graph.nodes[-1], results=(replace(graph.nodes[-1].results[0], name="a b"),))
        return replace(graph, nodes=(*graph.nodes[:-1], node), outputs=graph.outputs[:1])


class Count:
    def __init__(self) -> None:
        self.seen: list[str] = []

    def after(self, step: Pass, before: Graph, after: Graph, seconds: float) -> None:
        self.seen.append(f"{step.name} {len(before.nodes)}->{len(after.nodes)}")
        assert seconds >= 0


def test_an_instrument_hears_of_every_pass_in_order():
    count = Count()
    parse_recipe(RECIPE).run(GRAPH, CONTEXT, [count])
    assert count.seen == [
        "canonicalize 3->2",
        "partition 2->5",
        "all-gather 5->6",
        "reduce-scatter 6->7",
        "release 7->8",
        "dce 8->8",
    ]


def test_the_log_counts_what_each_pass_changed():
    log = Log()
    parse_recipe(RECIPE).run(GRAPH, CONTEXT, [log])
    steps = {step.text: step for step in log.steps}
    assert list(steps) == RECIPE.split(",")
    assert steps["canonicalize"].changed == {"aten.detach.default": -1}
    assert steps["partition(stage=2)"].changed == {"reshard": 2, "pending": 1}
    assert steps["all-gather"].changed == {"reshard": -1, "all_gather_start": 1, "wait": 1}
    assert steps["all-gather"].summary == "+1 all_gather_start -1 reshard +1 wait"
    assert steps["release"].num_nodes == 8
    assert steps["dce"].changed == {}
    assert steps["dce"].summary == "order only or nothing"


def test_the_dump_has_one_file_a_pass(tmp_path):
    graphs = []

    class Keep:
        def after(self, step: Pass, before: Graph, after: Graph, seconds: float) -> None:
            graphs.append(after)

    parse_recipe(RECIPE).run(GRAPH, CONTEXT, [Dump(tmp_path / "new"), Keep()])
    files = sorted((tmp_path / "new").iterdir())
    assert [f.name for f in files] == [
        "net-00-captured.zir",
        "net-01-canonicalize.zir",
        "net-02-partition.zir",
        "net-03-all-gather.zir",
        "net-04-reduce-scatter.zir",
        "net-05-release.zir",
        "net-06-dce.zir",
    ]
    assert [parse_graph(f.read_text()) for f in files] == [GRAPH, *graphs]


def test_verify_names_the_pass_that_broke_the_graph():
    recipe = Pipeline((*parse_recipe("canonicalize").passes, Break(), *parse_recipe("dce").passes))
    count = Count()
    with pytest.raises(VerifyError) as caught:
        recipe.run(GRAPH, CONTEXT, [Verify(), count])
    assert str(caught.value).startswith("after the pass break: [ssa] ")
    assert "%y" in str(caught.value)
    assert count.seen == ["canonicalize 3->2"]


def test_verify_names_the_pass_whose_text_does_not_read_back():
    with pytest.raises(VerifyError, match="after the pass misname: "):
        Pipeline((Misname(),)).run(GRAPH, CONTEXT, [Verify()])


def test_verify_is_silent_about_what_is_valid():
    graph = parse_recipe(RECIPE).run(GRAPH, CONTEXT, [Verify()])
    assert graph == parse_recipe(RECIPE).run(GRAPH, CONTEXT)
