"""A new collective is one row, one executor and one interpreter rule; whatever else is missing is named."""

from collections.abc import Callable, Mapping
from functools import partial

import pytest
import torch

from zgraph import interpreter
from zgraph.certify.certificate import certify
from zgraph.cost import simulate
from zgraph.errors import VerifyError, ZirError
from zgraph.interpreter import Interpreter, whole
from zgraph.ir import OPS, Mesh, Node, Shard, Type, ops, parse_graph, print_graph, verify
from zgraph.ir.op_rows import Op, Transfer
from zgraph.ir.type_rules import TypeRuleError, tensor
from zgraph.passes import Context, make_plan
from zgraph.passes.plan.make_plan import memory_of
from zgraph.runtime import collectives

TEXT = """graph "g" mesh(shard=2)
op aten.tanh.default
param %w: f32[4, 3]<S0> "w" stage=3
fwd %start: future f32[4, 3]<S0> = rotate_start(%w)
fwd %next: f32[4, 3]<S0> = wait(%start)
fwd %y: f32[4, 3]<S0> = copy(%next)
return fwd output %y
"""


def rotated(node: Node, mesh: Mesh) -> tuple[Type, ...]:
    """Each rank's shard goes to the next rank."""
    kind = tensor(node)
    if kind.future or not kind.placement or kind.placement[-1] != Shard(0):
        raise TypeRuleError(f"rotates shards, not {kind}")
    return (kind.promised(),)


def sent(node: Node, mesh: Mesh) -> int:
    return ops.moved_bytes(node, mesh) // 2


ROW = Op(
    "rotate_start",
    "Begin to send each rank's shard to the next.",
    rotated,
    "comm",
    sent,
    pure=False,
    transfer=Transfer("rotate", holds=True),
    kind="gather",
)


def missing(name: str) -> list[str]:
    """Parts that an op of the table lacks."""
    row, found = OPS[name], []
    if name not in interpreter.RULES and name not in ("accumulate", "encode", "release"):
        found.append("an interpreter rule")
    if name not in collectives.EXECUTORS and name not in ("release", "reshard", "pending"):
        found.append("an executor")
    if row.lane != "compute" and row.transfer is None:
        found.append("what it moves (transfer=)")
    return found


@pytest.fixture
def add(monkeypatch) -> Callable[..., None]:
    """Adds the row, and what else is asked for."""

    def add(row: Op = ROW, *, rule: bool = True, executor: bool = True) -> None:
        monkeypatch.setitem(OPS, row.name, row)
        if rule:
            monkeypatch.setitem(interpreter.RULES, row.name, lambda node, operands, mesh: [operands[0][::-1]])
        if executor:
            monkeypatch.setitem(collectives.EXECUTORS, row.name, lambda node, session: partial(print, node))

    return add


@pytest.mark.parametrize("name", OPS)
def test_no_op_of_the_table_lacks_anything(name):
    assert missing(name) == []


def test_what_a_new_op_lacks_is_named(add):
    add(rule=False, executor=False)
    assert missing("rotate_start") == ["an interpreter rule", "an executor"]
    add()
    assert missing("rotate_start") == []
    plain: Mapping[str, object] = {"transfer": None}
    add(Op(**{**{f: getattr(ROW, f) for f in Op.__dataclass_fields__}, **plain}))
    assert missing("rotate_start") == ["what it moves (transfer=)"]


def test_a_row_is_all_that_text_verifier_costs_memory_and_certificate_ask_for(add):
    with pytest.raises(ZirError, match="rotate_start"):
        parse_graph(TEXT)
    add()
    graph = parse_graph(TEXT)
    assert print_graph(graph) == TEXT
    verify(graph)
    with pytest.raises(VerifyError, match="rotates shards"):
        verify(parse_graph(TEXT.replace("<S0>", "<R>")))
    context = Context(mesh=graph.mesh)
    span = next(s for s in simulate(make_plan(graph), context.costs, {}).spans if s.node == "start")
    assert span.lane == "comm"
    assert span.end_us - span.start_us == pytest.approx(context.costs.network(graph.mesh).direct_us(24))
    assert memory_of(graph, {}).peak.total_bytes >= 48
    certify([("captured", graph)], context)
    without = parse_graph(TEXT.replace("copy(%next)", "copy(%w)"))
    with pytest.raises(VerifyError, match="not what the graph before it computes"):
        certify([("captured", graph), ("dce", without)], context)


def test_the_interpreter_rule_says_what_it_means(add):
    add()
    graph = parse_graph(TEXT)
    w = torch.arange(12.0).view(4, 3)
    shards = [w[:2], w[2:]]
    (made,) = Interpreter().run(graph, {"w": w})
    assert made is not None
    assert torch.equal(whole(graph.outputs[0], made)[0], torch.cat(shards[::-1]))
