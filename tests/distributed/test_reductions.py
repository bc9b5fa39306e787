"""What is pending is reduced as its type says, on ranks in a line and in rows: sums are sums, means are means.

The graphs are written by hand: what the passes make of models has means alone.
"""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from typing import Any
from unittest.mock import Mock

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

import zgraph
from zgraph.bridge import private_runtime
from zgraph.interpreter import Interpreter, whole
from zgraph.ir import Graph, parse_graph, verify
from zgraph.passes import Context, Pipeline, make_plan
from zgraph.passes.all_reduce import AllReduce
from zgraph.passes.broadcast import Broadcast
from zgraph.passes.reduce_scatter import ReduceScatter
from zgraph.passes.schedule import Schedule
from zgraph.runtime.agreement import wire_of
from zgraph.runtime.collectives import EXECUTORS
from zgraph.runtime.gradients import attached, is_unreduced, reduced
from zgraph.runtime.linker import link_plan
from zgraph.runtime.session import Session

from .lockstep import local
from .pool import Pool

SHAPES = {"w": (5, 3), "v": (4,), "b": (3,), "c": (2, 2)}
"""Two parameters that are sharded, of which one does not divide, and two that are whole."""

LINE, ROWS = "shard=2", "replicate=2, shard=2"

WAYS = {
    "alone": """bwd %w_total: {dtype}[5, 3]<{S0}> = reshard(%w_sum)
bwd %v_total: {dtype}[4]<{S0}> = reshard(%v_sum)
bwd %b_total: {dtype}[3]<{R}> = reshard(%b_sum)
bwd %c_total: {dtype}[2, 2]<{R}> = reshard(%c_sum)
""",
    "bucket": """bwd %w_total: {dtype}[5, 3]<{S0}>, %v_total: {dtype}[4]<{S0}> = reshard(%w_sum, %v_sum)
bwd %b_total: {dtype}[3]<{R}>, %c_total: {dtype}[2, 2]<{R}> = reshard(%b_sum, %c_sum)
""",
}
WAYS["grouped"] = WAYS["bucket"]


def step(way: str, mesh: str, reduce: str, dtype: str = "f32", varies: str = "") -> Graph:
    """A step whose gradients are the tangents; those of whole parameters accumulate."""
    num_axes = mesh.count("=")
    everywhere = ", ".join(["V"] * num_axes)
    varies = varies or everywhere
    places = {
        "dtype": dtype,
        "S0": ", ".join(["R"] * (num_axes - 1) + ["S0"]),
        "R": ", ".join(["R"] * num_axes),
        "V": varies,
        "P": varies.replace("V", f"P({reduce})"),
    }
    lines = [f'graph "step" mesh({mesh})', "op aten.mul.Tensor"]
    for name, shape in SHAPES.items():
        stage, placement = (2, "{S0}") if name in "wv" else (0, "{R}")
        lines.append(f'param %{name}: {{dtype}}{list(shape)}<{placement}> "{name}" stage={stage}')
    lines.append(f"input %x: f32[2]<{everywhere}>")
    lines += [f"tangent %t{name}: {{dtype}}{list(shape)}<{{V}}>" for name, shape in SHAPES.items()]
    lines.append(f"fwd %y: f32[2]<{everywhere}> = aten.mul.Tensor(%x, 2.0)")
    for name, shape in SHAPES.items():
        kind = f"{{dtype}}{list(shape)}"
        if name in "wv":
            lines.append(f'bwd %{name}_sum: {kind}<{{P}}> = pending(%t{name}, reduce="{reduce}")')
        else:
            lines.append(f'bwd %{name}_pending: {kind}<{{P}}> = pending(%t{name}, reduce="{reduce}")')
            lines.append(f'bwd %{name}_sum: {kind}<{{P}}> = accumulate(%{name}_pending, target="{name}")')
    returned = [f'return bwd grad "{name}" %{name}_total' for name in SHAPES]
    text = "\n".join([*lines, WAYS[way].strip(), "return fwd output %y", *returned, ""]).format(**places)
    return lowered(parse_graph(text), grouped=way == "grouped")


def lowered(graph: Graph, *, grouped: bool = False) -> Graph:
    verify(graph)
    passes = Broadcast(), ReduceScatter(grouped), AllReduce(), Schedule()
    graph = Pipeline(passes).run(graph, Context(graph.mesh))
    verify(graph)
    return graph


class Net(nn.Module):
    """What the graphs are for."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        for name, shape in SHAPES.items():
            self.register_parameter(name, nn.Parameter(torch.zeros(shape, dtype=dtype)))
        self.register_buffer("seen", torch.zeros(3))


def tangents(rank: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Numbers of each rank's own, whose sums and means are exact."""
    shapes = SHAPES.items()
    return {f"t{n}": torch.arange(1.0, 1 + torch.Size(s).numel(), dtype=dtype).view(s) * (1 + rank) for n, s in shapes}


def run_step(mesh: DeviceMesh, graph: Graph, dtype: torch.dtype, micro_steps: int, copies: bool) -> dict[str, Any]:
    """The gradients on this rank, after micro-steps of which all but the last do not end the step.

    Args:
        mesh: the ranks.
        graph: the step.
        dtype: of parameters and tangents.
        micro_steps: how many.
        copies: ranks of one column have the same.
    """
    grid = DeviceMesh("cpu", [[0, 1], [2, 3]], mesh_dim_names=("replicate", "shard")) if mesh.size() == 4 else mesh
    model = zgraph.compile(Net(dtype), mesh=grid, stage=lambda name: 2 if name in "wv" else 0)
    session = model._zgraph.session
    session.begin_call()
    forward, backward = link_plan(session, make_plan(graph), {}, "by hand")
    assert backward is not None
    rank = mesh.get_local_rank()
    given = tangents(rank % 2 if copies else rank, dtype)
    held = {}
    for micro_step in range(micro_steps):
        session.syncs = micro_step == micro_steps - 1
        if session.syncs:
            found = {name: reduced(session, slot) for name, slot in session.store.slots.items() if is_unreduced(slot)}
            held = {name: t.reshape(-1).tolist() for name, t in found.items() if t is not None}
        forward([None] * len(SHAPES) + [torch.ones(2)])
        slots = [session.store.slots[name] for name in SHAPES]
        run = attached(partial(Step.apply, backward, given), dict(enumerate(SHAPES)), session)
        run(*(slot.placeholder for slot in slots)).backward()
    made = {name: local(p.grad).reshape(-1).tolist() for name, p in model.named_parameters() if p.grad is not None}
    return {"made": made, "held": held}


class Step(torch.autograd.Function):
    """The end of a forward, whose backward is a plan's."""

    @staticmethod
    def forward(ctx: Any, backward: Any, given: dict[str, torch.Tensor], *_: torch.Tensor) -> torch.Tensor:
        ctx.backward_of_plan, ctx.given = backward, given
        return torch.zeros(())

    @staticmethod
    def backward(ctx: Any, _: torch.Tensor) -> Any:
        return None, None, *ctx.backward_of_plan([t.clone() for t in ctx.given.values()])


def simulated(graph: Graph, num_ranks: int, dtype: torch.dtype, copies: bool = False) -> list[dict[str, Any]]:
    """The same on simulated ranks: whole gradients."""
    by_rank = [tangents(r % 2 if copies else r, dtype) for r in range(num_ranks)]
    inputs = {name: torch.zeros(shape, dtype=dtype) for name, shape in SHAPES.items()} | {"x": torch.ones(2)}
    inputs |= {name: [of[name] for of in by_rank] for name in by_rank[0]}
    outputs = Interpreter().run(graph, inputs)
    found = [whole(o, ranks) for o, ranks in zip(graph.outputs, outputs, strict=True) if ranks is not None]
    return [{name: ranks[r] for name, ranks in zip(SHAPES, found[1:], strict=True)} for r in range(num_ranks)]


def own(gradient: torch.Tensor, name: str, rank: int) -> list[float]:
    """What a rank holds of a whole gradient."""
    if name in "wv":
        rows = gradient.chunk(2)
        gradient = rows[rank % 2]
    return gradient.reshape(-1).tolist()


@pytest.mark.parametrize("reduce", ["sum", "mean"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("mesh", [LINE, ROWS])
def test_gradients_are_reduced_as_their_type_says(pool: Pool, mesh: str, way: str, reduce: str) -> None:
    graph, num_ranks = step(way, mesh, reduce), 4 if mesh == ROWS else 2
    factor = sum(range(1, num_ranks + 1)) / (num_ranks if reduce == "mean" else 1)
    expected = simulated(graph, num_ranks, torch.float32)
    for rank, answer in enumerate(pool.run(run_step, num_ranks, graph, torch.float32, 1, False)):
        for name, gradient in expected[rank].items():
            assert torch.equal(gradient, factor * tangents(0, torch.float32)[f"t{name}"])
            assert answer["made"][name] == own(gradient, name, rank), name


@pytest.mark.parametrize("reduce", ["sum", "mean"])
@pytest.mark.parametrize("mesh", [LINE, ROWS])
def test_what_micro_steps_hold_back_is_reduced_as_its_type_says(pool: Pool, mesh: str, reduce: str) -> None:
    graph, num_ranks = step("alone", mesh, reduce), 4 if mesh == ROWS else 2
    expected = simulated(graph, num_ranks, torch.float32)
    for rank, answer in enumerate(pool.run(run_step, num_ranks, graph, torch.float32, 3, False)):
        for name, gradient in expected[rank].items():
            assert answer["made"][name] == own(3 * gradient, name, rank), name
        assert answer["held"] == {name: own(2 * expected[rank][name], name, rank) for name in "bc"}


@pytest.mark.parametrize(
    ("placement", "divisor"), [("P(sum), P(sum)", 1), ("P(mean), P(mean)", 4), ("R, P(sum)", 2), ("R, P(mean)", 4)]
)
def test_what_a_process_group_is_given_to_sum(monkeypatch, placement, divisor):
    """Of means the shares in them. The gradient itself is left as it is."""
    text = f'graph "g" mesh({ROWS})\ninput %g: f32[4]<{placement}>\n'
    node = parse_graph(text + "bwd %s: future f32[4]<R, R> = all_reduce_start(%g)\n").nodes[0]
    given = []
    monkeypatch.setattr(dist, "all_reduce", lambda out, *_, **__: given.append(out) or Mock())
    monkeypatch.setattr(private_runtime, "has_averages", lambda group: False)
    gradient = torch.arange(4.0)
    session = Mock(num_ranks=4, num_shards=2, num_copies=2, lane=None)
    session.divisor = partial(Session.divisor, session)
    EXECUTORS["all_reduce_start"](node, session)(gradient)
    (summed,) = given
    assert torch.equal(summed, gradient / divisor)
    assert summed.data_ptr() != gradient.data_ptr()


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize(
    ("placement", "ops"),
    [
        ("P(sum), P(sum)", (dist.ReduceOp.SUM, dist.ReduceOp.SUM)),
        ("P(mean), P(mean)", (dist.ReduceOp.AVG, dist.ReduceOp.AVG)),
        ("R, P(sum)", (dist.ReduceOp.SUM, dist.ReduceOp.AVG)),
        ("R, P(mean)", (dist.ReduceOp.AVG, dist.ReduceOp.AVG)),
    ],
)
def test_what_a_process_group_is_asked_for(monkeypatch, placement, ops, count):
    """Along the shard axis, then along the other; one tensor, or more in one call."""
    members = ", ".join(["%g"] * count)
    made = ", ".join(f"%m{i}: future f32[4]<R, S0>" for i in range(count))
    text = f'graph "g" mesh({ROWS})\ninput %g: f32[4]<{placement}>\nbwd {made} = reduce_scatter_start({members})\n'
    session, asked = Mock(num_ranks=4, num_shards=2, num_copies=2, lane=None), []
    group = session.shard_group
    for name in ("reduce_scatter_single_coalesced", "reduce_scatter_tensor_coalesced"):
        setattr(group, name, lambda outs, wholes, options: asked.append(options.reduceOp) or Mock())
    monkeypatch.setattr(private_runtime, "_scatter", lambda *pair, op, **_: asked.append(op) or Mock())
    monkeypatch.setattr(private_runtime, "_side_stream", lambda device: None)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(dist, "all_reduce", lambda out, op, **_: asked.append(op) or Mock())
    start = EXECUTORS["reduce_scatter_start"](parse_graph(text).nodes[0], session)
    start(*[torch.ones(4)] * count)
    assert asked == [ops[0], *[ops[1]] * count]


@pytest.mark.parametrize("way", WAYS)
def test_a_sum_and_a_mean_are_not_the_same_over_the_wire(way: str) -> None:
    """Ranks that compile one each alone must not take them for the same."""
    summed, mean = (wire_of(make_plan(step(way, LINE, reduce)))[1] for reduce in ("sum", "mean"))
    assert summed == wire_of(make_plan(step(way, LINE, "sum")))[1]
    assert summed != mean


@pytest.mark.parametrize("reduce", ["sum", "mean"])
def test_ranks_that_hold_the_same_are_not_summed(pool: Pool, reduce: str) -> None:
    """Along the first axis there is nothing pending: each row has all that there is."""
    graph = step("bucket", ROWS, reduce, varies="R, V")
    expected = simulated(graph, 4, torch.float32, copies=True)
    factor = (1 + 2) / (2 if reduce == "mean" else 1)
    for rank, answer in enumerate(pool.run(run_step, 4, graph, torch.float32, 1, True)):
        for name, gradient in expected[rank].items():
            assert torch.equal(gradient, factor * tangents(0, torch.float32)[f"t{name}"])
            assert answer["made"][name] == own(gradient, name, rank), name


@pytest.mark.parametrize("reduce", ["sum", "mean"])
@pytest.mark.parametrize("mesh", [LINE, ROWS])
def test_half_precision(pool: Pool, mesh: str, reduce: str) -> None:
    graph, num_ranks = step("bucket", mesh, reduce, dtype="f16"), 4 if mesh == ROWS else 2
    expected = simulated(graph, num_ranks, torch.float16)
    for rank, answer in enumerate(pool.run(run_step, num_ranks, graph, torch.float16, 1, False)):
        for name, gradient in expected[rank].items():
            assert answer["made"][name] == own(gradient, name, rank), name


BUFFER = """graph "buffer" mesh(shard=2)
op aten.mul.Tensor
buffer %seen: f32[3]<R> "seen"
input %x: f32[3]<V>
fwd %new: f32[3]<V> = aten.mul.Tensor(%x, 2.0)
fwd %new_pending: f32[3]<P(root)> = pending(%new, reduce="root")
fwd %new_root: f32[3]<R> = reshard(%new_pending)
return fwd mutation "seen" %new_root
return fwd output %new
"""


def run_buffer(mesh: DeviceMesh) -> list[list[float]]:
    model = zgraph.compile(Net(torch.float32), mesh=mesh, stage=0)
    session = model._zgraph.session
    session.begin_call()
    forward, _ = link_plan(session, make_plan(lowered(parse_graph(BUFFER))), {}, "by hand")
    return [t.tolist() for t in forward([torch.zeros(3), torch.full((3,), 1.0 + mesh.get_local_rank())])]


def test_a_root_is_the_first_ranks(pool: Pool) -> None:
    """What the ranks had of their own is still there beside it."""
    assert pool.run(run_buffer, 2) == [[[2.0] * 3, [2.0 + 2 * rank] * 3] for rank in range(2)]
