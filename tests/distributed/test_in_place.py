"""All-reduces of a process group's own backend, as GPUs have them: in place, where nobody else needs the operand."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

import zgraph
from zgraph.bridge import private_runtime
from zgraph.compiler.compiled_model import compiled_model
from zgraph.ir import Instruction, Node, Program, parse_graph
from zgraph.runtime import peers
from zgraph.runtime.collectives import EXECUTORS
from zgraph.runtime.in_place import in_place
from zgraph.runtime.session import Session

from .nets import Mlp, built, rows
from .pool import Pool

STEPS = 2


def gradients(mesh: DeviceMesh) -> list[list[torch.Tensor]]:
    """Of steps that add to those before."""
    model = zgraph.compile(built(Mlp)(), stage=0, mesh=mesh)
    found = []
    for step in range(STEPS):
        model(*rows(step + mesh.get_local_rank())).backward()
        found.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    found.append([torch.tensor(compiled_model(model).session.lane is None)])
    return found


def both_ways(mesh: DeviceMesh, averages: bool) -> tuple[bool, bool, int, int, set[str]]:
    """Whether a backend gives the gradients of a lane; its reductions, how many were in place, and their ops."""
    expected = gradients(mesh)
    ops: list[Any] = []
    addresses: list[int] = []
    reduce, execute = dist.all_reduce, EXECUTORS["all_reduce_start"]

    def noted(tensor: torch.Tensor, op: Any = dist.ReduceOp.SUM, **options: Any) -> Any:
        ops.append(str(op))
        addresses.append(tensor.data_ptr())
        if op == dist.ReduceOp.AVG:  # gloo has it since torch 2.13
            tensor.div_(mesh.size())
        return reduce(tensor, dist.ReduceOp.SUM, **options)

    given: list[int] = []

    def noting(node: Node, session: Session) -> Any:
        run = execute(node, session)
        return lambda own, **options: given.append(own.data_ptr()) or run(own, **options)

    with (
        patch.object(peers, "_is_host", lambda device: False),
        patch.object(Session, "_open_lane", lambda self: None),
        patch.object(private_runtime, "has_averages", lambda group: averages),
        patch.dict(EXECUTORS, all_reduce_start=noting),
        patch.object(dist, "all_reduce", noted),
    ):
        found = gradients(mesh)
    pairs = [
        (a, b)
        for ours, theirs in zip(found[:-1], expected[:-1], strict=True)
        for a, b in zip(ours, theirs, strict=True)
    ]
    same = all(torch.allclose(a, b, rtol=1e-6, atol=1e-7) for a, b in pairs)
    return same, bool(found[-1][0]), len(addresses), len({*addresses} & {*given}), set(ops)


@pytest.mark.parametrize("averages", [True, False])
def test_gradients_are_reduced_in_place(pool: Pool, averages: bool) -> None:
    for same, by_backend, num_asked, num_in_place, ops in pool.run(both_ways, 2, averages, spoils=True):
        assert by_backend
        assert same
        assert num_asked >= STEPS
        assert num_in_place > 0
        assert len(ops) == 1
        assert ("AVG" in ops.pop()) == averages


GRAPH = """graph "g" mesh(shard=2)
op aten.relu.default
op aten.t.default views(0)
input %x: f32[4, 2]<P(mean)>
bwd %a: f32[4, 2]<P(mean)> = aten.relu.default(%x)
bwd %v: f32[2, 4]<P(mean)> = aten.t.default(%a)
bwd %b: f32[2, 4]<P(mean)> = aten.relu.default(%v)
bwd %b_t: f32[4, 2]<P(mean)> = aten.t.default(%b)
bwd %x_start: future f32[4, 2]<R> = all_reduce_start(%x)
bwd %a_start: future f32[4, 2]<R> = all_reduce_start(%a)
bwd %b_start: future f32[4, 2]<R> = all_reduce_start(%b_t)
bwd %late: f32[2, 4]<P(mean)> = aten.relu.default(%v)
"""


def test_memory_that_others_touch_is_left_alone() -> None:
    """What the caller gave, what a view of is read later, and what is returned."""
    graph = parse_graph(GRAPH)
    by_name = {r.name: r for n in graph.nodes for r in n.results}
    nodes = tuple(Instruction(node) for node in graph.nodes)
    given = tuple(i.value for i in graph.inputs)

    def names(*results: str) -> set[str]:
        return set(in_place(Program("backward", given, nodes, tuple(by_name[r] for r in results)), graph))

    assert names("late") == {"b_start"}
    assert names("late", "b") == set()
