"""Codes of gradients on simulated ranks: but for what codecs round the numbers are the same, and nothing is lost."""

from dataclasses import replace
from functools import cache

import pytest
import torch

import zgraph
from tests.deep import deep
from tests.interp.ranks import Reference
from zgraph.certify.certificate import certify
from zgraph.debugging.runs import Options, check_graphs
from zgraph.errors import VerifyError
from zgraph.interpreter import Interpreter, whole
from zgraph.ir import Axis, Graph, Mesh, Node, parse_graph
from zgraph.passes import RECIPES, Context, compressing, parse_recipe
from zgraph.passes.compress import Compress

CODECS = ["q8(block=16)", "q4(block=8)", "q2(block=8)", "sign(block=8)", "topk(10%, chunk=40)"]


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = torch.nn.Linear(20, 33), torch.nn.Linear(33, 7, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.tanh(self.first(x))).square().mean()


@cache
def captured() -> Graph:
    torch.compiler.reset()
    return zgraph.trace(Net(), torch.randn(8, 20))


def recipe(stage: int, codec: str) -> str:
    return compressing(RECIPES[stage], codec)


@pytest.mark.parametrize(("stage", "num_ranks"), [(0, 3), (3, 2), *(deep(s, n) for s in RECIPES for n in (2, 3, 4))])
def test_every_pass_keeps_the_numbers_that_codes_stand_for(stage: int, num_ranks: int) -> None:
    Reference(captured(), num_ranks).check(parse_recipe(recipe(stage, CODECS[stage])))


def step(stage: int, num_ranks: int, codec: str) -> str:
    """The text of a step whose gradients are the tangents of two parameters, in a bucket."""
    at, phase = ("S0", "bwd") if stage else ("R", "bwd")
    return f"""graph "step" mesh(shard={num_ranks})
op aten.tanh.default
param %a: f32[5, 8]<{at}> "a" stage={stage}
param %b: f32[7]<{at}> "b" stage={stage}
tangent %t: f32[5, 8]<V>
tangent %u: f32[7]<V>
bwd %g: f32[5, 8]<P(mean)> = pending(%t, reduce="mean")
bwd %h: f32[7]<P(mean)> = pending(%u, reduce="mean")
{phase} %gm: f32[5, 8]<{at}>, %hm: f32[7]<{at}> = reshard(%g, %h)
return bwd grad "a" %gm
return bwd grad "b" %hm
"""


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("stage", [0, 2])
@pytest.mark.parametrize("num_ranks", [2, deep(3), deep(5)])
def test_what_is_sent_and_what_is_left_out_add_up(codec: str, stage: int, num_ranks: int) -> None:
    graph = parse_graph(step(stage, num_ranks, codec))
    coded = Compress(codec, at_least_bytes=1).run(graph, Context(mesh=graph.mesh))
    assert [n.op for n in coded.nodes].count("encode") == (1 if stage else 2)
    interpreter, torch_rng = Interpreter(), torch.Generator().manual_seed(0)
    wanted, sent = [torch.zeros(5, 8).double(), torch.zeros(7).double()], [0.0, 0.0]
    parameters = {"a": torch.zeros(5, 8), "b": torch.zeros(7)}
    for _ in range(5):
        tangents = [[torch.randn(s, generator=torch_rng) for _ in range(num_ranks)] for s in ((5, 8), (7,))]
        made = interpreter.run(coded, {**parameters, "t": tangents[0], "u": tangents[1]})
        for index, (output, ranks) in enumerate(zip(coded.outputs, made, strict=True)):
            assert ranks is not None
            sent[index] = sent[index] + whole(output, ranks, num_ranks)[0].double()
            wanted[index] = wanted[index] + torch.stack(tangents[index]).double().mean(0)
    own = torch.stack(interpreter.rests[("a", "b"), False]).double().mean(0)
    if not stage:
        own = own + torch.cat(interpreter.rests[("a", "b"), True]).double()
    chunk = -(-5 // num_ranks) * 8
    left = own[:, :chunk].reshape(-1)[:40].view(5, 8)
    torch.testing.assert_close(sent[0] + left, wanted[0], rtol=1e-5, atol=1e-5)
    assert (sent[0] - wanted[0]).abs().max() > 1e-4, "the code leaves something out"


ONE_AXIS = (Axis("shard", 2),)
ROWS = (Axis("replicate", 2), Axis("shard", 2))


def checked(
    stage: int, wrong: dict[str, str] | None = None, mesh: Mesh = ONE_AXIS
) -> tuple[list[tuple[str, Graph]], Context]:
    """The graphs of a recipe, the last with options of its encodes changed."""
    context, steps = Context(mesh=mesh), [("captured", captured())]
    for ran in parse_recipe(recipe(stage, "q8(block=16)")).steps(captured(), context):
        steps.append((ran.step.name, ran.after))
    if wrong:
        name, graph = steps[-1]
        steps[-1] = (name, graph.with_nodes([changed(n, wrong) for n in graph.nodes]))
    return steps, context


def changed(node: Node, wrong: dict[str, str]) -> Node:
    if node.op == "decode" and "reduce" in wrong:
        return replace(node, kwargs=tuple((k, wrong.get(k, v)) for k, v in node.kwargs))
    if node.op == "encode" and "feedback" in wrong:
        return replace(
            node, kwargs=tuple((k, v[::-1] if k == "feedback" and isinstance(v, tuple) else v) for k, v in node.kwargs)
        )
    return node


@pytest.mark.parametrize(
    ("stage", "mesh"),
    [
        (0, ONE_AXIS),
        (3, ONE_AXIS),
        deep(1, ONE_AXIS),
        deep(2, ONE_AXIS),
        (2, ROWS),
        *(deep(stage, ROWS) for stage in (0, 1, 3)),
    ],
)
def test_it_is_certified_and_checked_by_numbers(stage: int, mesh: Mesh) -> None:
    steps, context = checked(stage, mesh=mesh)
    rules = [c.rule for c in certify(steps, context).checked]
    assert "codes" in rules
    assert check_graphs([name for name, _ in steps], steps, context, Options(micro_steps=1, dtypes=True)).wrong is None


def test_another_reduction_is_found_by_numbers() -> None:
    steps, context = checked(2, {"reduce": "sum"})
    assert check_graphs([name for name, _ in steps], steps, context, Options()).wrong is not None


@pytest.mark.parametrize(
    ("wrong", "says"),
    [({"reduce": "sum"}, "is not what the graph before it computes"), ({"feedback": ""}, "codes gradients of")],
)
@pytest.mark.parametrize("mesh", [ONE_AXIS, ROWS], ids=["one axis", "rows"])
def test_a_code_of_something_else_is_refused(mesh: Mesh, wrong: dict[str, str], says: str) -> None:
    steps, context = checked(2, wrong, mesh)
    with pytest.raises(VerifyError, match=says):
        certify(steps, context)
