"""When a plan's programs are recorded for a GPU to repeat, and what of them can be."""

from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import zgraph
from zgraph.compiler.recordings import Recordings
from zgraph.cost import CostTable, hardware
from zgraph.cost.launches import launches, recorded_bytes
from zgraph.errors import UsageError
from zgraph.ir import HOST, DType, ExternalOp, Graph, Instruction, Node, ScalarType, TensorType, Value
from zgraph.ir.symbols import symbol
from zgraph.passes import Context
from zgraph.runtime.stretches import Stretch, cut, problem_of

H100 = CostTable(hardware=hardware("h100"))


def planned(num_rows: int, width: int):
    """The plan of a step of two layers."""
    model = zgraph.compile(nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, width)), stage=0)
    model(torch.ones(num_rows, width)).sum().backward()
    return zgraph.report(model).entries[0].plan


@pytest.fixture(scope="module")
def small():
    return planned(2, 16)


def test_small_steps_are_bound_by_launches(small):
    bound = launches(small, H100, {})
    assert bound.bind
    assert bound.host_us == pytest.approx(4.0 * sum(H100.node_us(small.graph, n, {}) > 0 for n in small.graph.nodes))


@pytest.mark.parametrize(("num_rows", "binds"), [(16, True), (4096, False)])
def test_large_steps_are_not(num_rows, binds):
    bound = launches(planned(num_rows, 1024), H100, {})
    assert bound.bind == binds
    flop = 5 * 2 * num_rows * 1024 * 1024  # two products forward, three backward
    assert bound.device_us >= 1e6 * flop / H100.hardware.device.rate("f32")


def test_slow_devices_are_not(small):
    device = H100.hardware.device.model_copy(update={"memory_bytes_per_s": 1e6})
    slow = H100.model_copy(update={"hardware": H100.hardware.model_copy(update={"device": device})})
    assert not launches(small, slow, {}).bind
    found = Recordings(small, SimpleNamespace(), Context(costs=slow), "auto")
    assert found.maker is None
    assert "the device would not wait" in str(found)
    assert Recordings(small, SimpleNamespace(), Context(costs=slow), True).maker is not None


def test_a_budget_goes_first(small):
    kept = recorded_bytes(small, {})
    roomy = Context(costs=H100, memory_budget=1000 + kept, rest_bytes=600, update_bytes=400)
    assert Recordings(small, SimpleNamespace(), roomy, True).maker is not None
    tight = Context(costs=H100, memory_budget=999 + kept, rest_bytes=600, update_bytes=400)
    found = Recordings(small, SimpleNamespace(), tight, True)
    assert found.maker is None
    assert found.kept_bytes == 0
    assert "more than the budget has room for" in str(found)


@pytest.mark.parametrize(
    ("wanted", "words"), [(True, "for GPUs"), ("yes", 'True, False or "auto"'), (1, 'True, False or "auto"')]
)
def test_options_that_mean_nothing(wanted, words):
    with pytest.raises(UsageError, match=words):
        zgraph.compile(nn.Linear(4, 4), cuda_graphs=wanted)


def test_auto_is_nothing_on_processors():
    model = zgraph.compile(nn.Linear(4, 4), cuda_graphs="auto", stage=0)
    model(torch.ones(2, 4)).sum().backward()
    assert zgraph.report(model).cuda_graphs == ()


# --- stretches --------------------------------------------------------------------------------------------------

FOREIGN = {
    "aten.relu.default": ExternalOp(),
    "aten.rand_like.default": ExternalOp(random=True),
    "aten.t.default": ExternalOp(views=(0,)),
    "aten.add_.Tensor": ExternalOp(writes=(0,)),
    "some.op.default": ExternalOp(opaque=True),
}
GRAPH = Graph("g", foreign=FOREIGN)
KIND = TensorType(DType.f32, (4,))


def node(op, name, *operands, kind=KIND):
    return Node(op, operands, (Value(name, kind),))


def value(name, kind=KIND):
    return Value(name, kind)


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (node("aten.relu.default", "a", value("x")), ""),
        (node("aten.rand_like.default", "a", value("x")), ""),
        (node("cast", "a", value("x")), ""),
        (node("unpack", "a", value("x")), ""),
        (node("all_gather_start", "a", value("x")), "collectives"),
        (node("offload_start", "a", value("x")), "copies to and from the host"),
        (node("reload_start", "a", value("x")), "copies to and from the host"),
        (node("wait", "a", value("x")), "waits"),
        (node("accumulate", "a", value("x")), "the model keeps"),
        (node("encode", "a", value("x")), "encode, which has a state"),
        (node("some.op.default", "a", value("x")), "effects are unknown"),
        (node("aten.add_.Tensor", "a", value("x")), "write to what they are given"),
        (node("aten.relu.default", "a", value("x", KIND.on(HOST))), "host's memory"),
        (node("aten.relu.default", "a", value("x", ScalarType("int"))), "numbers that the host computes"),
        (node("aten.relu.default", "a", kind=TensorType(DType.f32, (symbol("s"),))), "sizes that change"),
    ],
)
def test_ops_that_are_left_to_the_host(found, words):
    problem = problem_of(found, GRAPH)
    assert words in problem
    assert bool(words) == bool(problem)


def test_a_stretch_ends_where_the_host_begins_something():
    relu = "aten.relu.default"
    chain = [node(relu, f"a{i + 1}", value(f"a{i}")) for i in range(5)]
    start = Node("all_reduce_start", (value("a5"),), (Value("f", KIND.promised()),))
    rest = [node(relu, "b", value("a5")), node("aten.t.default", "c", value("b"))]
    parts = [*(Instruction(n, (n.operands[0].name,)) for n in chain), Instruction(start), *map(Instruction, rest)]
    left = Counter()
    first, *others = cut(parts, GRAPH, frozenset({"a0"}), left)
    assert isinstance(first, Stretch)
    assert (first.num_ops, first.inputs, [v.name for v in first.outputs], first.frees) == (5, (), ["a5"], ("a0",))
    assert others == parts[5:]
    assert sum(left.values()) == 2
