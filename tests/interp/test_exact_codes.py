"""Exact codes of gathers on simulated ranks: the same numbers to the last bit, step after step, in fewer bytes."""

from dataclasses import replace

import pytest
import torch

from tests.deep import deep
from zgraph.certify.certificate import certify
from zgraph.cost import CostTable, Link, hardware
from zgraph.debugging.runs import Options, check_graphs
from zgraph.errors import ContractError, VerifyError
from zgraph.interpreter import Interpreter
from zgraph.ir import Axis, Graph, Node, parse_graph
from zgraph.passes import Context, parse_recipe
from zgraph.passes.code_gathers import CodeGathers

TEXT = """graph "step" mesh({mesh})
op aten.mm.default
op aten.tanh.default
op aten.t.default views(0)
param %a: f32[40, 8]<{at}S0> "a" stage={stage}
param %b: f32[7]<{at}S0> "b" stage={stage}
input %x: bf16[5, 40]<{own}V>
fwd %ac: bf16[40, 8]<{at}S0> = cast(%a, dtype=bf16)
fwd %bc: bf16[7]<{at}S0> = cast(%b, dtype=bf16)
fwd %af: bf16[40, 8]<{at}R>, %bf: bf16[7]<{at}R> = reshard(%ac, %bc{keep})
fwd %y: bf16[5, 8]<{own}V> = aten.mm.default(%x, %af)
fwd %z: bf16[7]<{at}R> = aten.tanh.default(%bf)
return fwd output %y
return fwd output %z
"""
LOWER = "all-gather,release,schedule,dce,arena"


def step(stage: int, mesh: str) -> Graph:
    keep, wide = ", keep=true" if stage < 3 else "", "," in mesh
    at, own = ("R, ", "V, ") if wide else ("", "")
    return parse_graph(TEXT.format(stage=stage, mesh=mesh, at=at, own=own, keep=keep))


def lowered(graph: Graph, codec: str) -> list[tuple[str, Graph]]:
    context, steps = Context(mesh=graph.mesh), [("placed", graph)]
    given = f"code-gathers(codec={codec},at_least_bytes=1)," if codec else ""
    for one in parse_recipe(f"partition(stage=3),{given}{LOWER}").passes[1:]:
        steps.append((one.name, one.run(steps[-1][1], context)))
    return steps


@pytest.mark.parametrize(
    ("stage", "codec", "mesh"),
    [(2, "delta", "shard=2"), (3, "exponent", "rows=2, shard=2"), deep(1, "delta", "rows=2, shard=3")],
)
def test_numbers_are_the_same_step_after_step(stage: int, codec: str, mesh: str) -> None:
    graph = step(stage, mesh)
    coded, plain = (lowered(graph, text)[-1][1] for text in (codec, ""))
    assert [n.op for n in coded.nodes].count("encode") == 1
    one, other, rng = Interpreter(), Interpreter(), torch.Generator().manual_seed(0)
    a, b = torch.randn(40, 8, generator=rng), torch.randn(7, generator=rng)
    taken = []
    for number in range(4):
        x, before = torch.randn(5, 40, generator=rng).bfloat16(), one.sized.sent_bytes
        found, wanted = (i.run(g, {"a": a, "b": b, "x": x}) for i, g in ((one, coded), (other, plain)))
        for made, due in zip(found, wanted, strict=True):
            assert made is not None
            assert due is not None
            assert all(torch.equal(p, q) for p, q in zip(made, due, strict=True))
        taken.append(one.sized.sent_bytes - before)
        a = a + 1e-4 * torch.randn(40, 8, generator=rng) * (number != 1)
    if codec == "delta":
        assert max(taken[1:]) < 0.6 * taken[0]
        num_ranks = graph.num_ranks
        assert taken[2] == 24 * num_ranks, "nothing changed"


@pytest.mark.parametrize(("stage", "codec"), [(2, "delta"), deep(3, "exponent")])
def test_they_are_certified_and_checked_by_numbers(stage: int, codec: str) -> None:
    graph = step(stage, "shard=2")
    steps = lowered(graph, codec)
    certify(steps, Context(mesh=graph.mesh))
    assert check_graphs([n for n, _ in steps], steps, Context(mesh=graph.mesh), Options(micro_steps=1)).wrong is None


def test_a_change_of_other_copies_is_refused() -> None:
    graph = step(2, "shard=2")
    steps = lowered(graph, "delta")[:2]

    def changed(node: Node) -> Node:
        kwargs = tuple((k, v[::-1] if k == "copies" and isinstance(v, tuple) else v) for k, v in node.kwargs)
        return replace(node, kwargs=kwargs) if node.op == "decode" else node

    steps[-1] = (steps[-1][0], steps[-1][1].with_nodes([changed(n) for n in steps[-1][1].nodes]))
    with pytest.raises(VerifyError, match="is not what the graph before it computes"):
        certify(steps, Context(mesh=graph.mesh))


@pytest.mark.parametrize(("bytes_per_s", "wanted"), [(1e4, ("delta",)), (1e12, ())])
def test_auto_codes_where_sending_takes_longer(bytes_per_s: float, wanted: tuple[str, ...]) -> None:
    link = Link(bytes_per_s=bytes_per_s, latency_us=1.0)
    profile = hardware("cpu").model_copy(update={"within": link, "across": link})
    graph = step(2, "shard=2")
    context = Context(mesh=graph.mesh, costs=CostTable(hardware=profile, per_host=2))
    auto = CodeGathers("auto", at_least_bytes=1)
    assert auto.chosen(auto.times_us(graph, context)) == wanted
    made = auto.run(graph, context)
    assert made == (CodeGathers("delta", at_least_bytes=1).run(graph, context) if wanted else graph)


def test_what_is_cut_along_a_model_axis_is_refused() -> None:
    text = 'graph "g" mesh(tensor=2, shard=2)\nparam %a: f32[4, 2]<S1, S0> "a" stage=3\n'
    graph = parse_graph(text)
    with pytest.raises(ContractError, match="cuts them along tensor"):
        CodeGathers("delta").run(graph, Context(mesh=(Axis("tensor", 2), Axis("shard", 2))))


def test_only_exact_codecs_code_gathers() -> None:
    for codec, says in (("q8", "delta, exponent or auto"), ("delt", "there is no codec called delt")):
        with pytest.raises(ValueError, match=says):
            CodeGathers(codec)
