"""The last step: a scheduled graph becomes a plan, with every value's last use known."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from zgraph.cost import MemoryCurve, simulate_memory
from zgraph.errors import BudgetError, ContractError
from zgraph.ir import Graph, InputKind, Instruction, Node, Phase, Plan, Program, TensorType, Value
from zgraph.ir.arena import offsets
from zgraph.passes.core.base import Context
from zgraph.passes.plan.no_sync import without_sync
from zgraph.passes.plan.zero_tangents import without_tangents, zero_tangents


def make_plan(graph: Graph, *, only_step: bool = False) -> Plan:
    """The programs of a graph whose passes have all run.

    Args:
        graph: the graph.
        only_step: for those who only look at a step: in place of all backwards the one that syncs, with the tangents
            that are likely to be zero left out.

    Raises:
        ContractError: the recipe left a reshard without a collective to carry it out.
    """
    for node in graph.nodes:
        if node.op == "reshard":
            raise ContractError(
                f"nothing in the recipe carries out the reshard of %{node.operands[0].name} from "
                f"{node.operands[0].type} to {node.results[0].type}; add all-gather, reduce-scatter, all-reduce and "
                "broadcast after partition"
            )
    runs = _as_run(graph)
    forward = runs.phase_nodes(Phase.forward)
    outputs = [o.value for o in runs.outputs if o.phase is Phase.forward]
    saved = _saved(runs, forward)
    absent = (InputKind.tangent, InputKind.constant)
    arguments = [i.value for i in graph.inputs if i.kind not in absent]
    plan_forward = _program("forward", arguments, forward, [*outputs, *saved], graph.arenas.get(Phase.forward))
    tangents = [i.value for i in graph.inputs if i.kind is InputKind.tangent]
    if not any(o.phase is not Phase.forward for o in graph.outputs):
        return Plan(graph, plan_forward, None, None, ())
    zeros = zero_tangents(graph)
    loss_only = without_tangents(graph, zeros) if zeros else None
    left_out = zeros if loss_only else frozenset[str]()
    if only_step:
        backward = _backward("backward", loss_only or graph, saved, tangents)
        both = backward, backward
        return Plan(graph, plan_forward, *both, saved, left_out, both if loss_only else None)
    return Plan(
        graph,
        plan_forward,
        *_backwards("", graph, saved, tangents),
        saved,
        left_out,
        _backwards("loss_only_", loss_only, saved, tangents) if loss_only else None,
    )


def memory_of(graph: Graph, hints: Mapping[str, int]) -> MemoryCurve:
    """Bytes alive over a step of a graph whose passes have all run.

    Raises:
        ContractError: as `make_plan` does.
    """
    return simulate_memory(make_plan(graph, only_step=True), hints)


def _as_run(graph: Graph) -> Graph:
    """The graph without `pending`, which runs nothing: what reads its result reads its operand, as of that type."""
    same: dict[str, Value] = {}
    nodes: list[Node] = []
    for node in graph.nodes:
        node = node.substitute(same)
        if node.op == "pending":
            same[node.name] = replace(node.results[0], name=node.operands[0].name)
        else:
            nodes.append(node)
    if not same:
        return graph
    return replace(graph, nodes=tuple(nodes), outputs=tuple(o.substitute(same) for o in graph.outputs))


OPTIMIZERS_STEP = "the optimizer's step"


def over_budget(context: Context, step_bytes: int, where: str) -> BudgetError:
    """The error of a step that takes so much above what is at rest."""
    needed = context.rest_bytes + step_bytes
    return BudgetError(
        f"a memory budget of {context.memory_budget:,} bytes cannot hold this step: with {context.rest_bytes:,} at "
        f"rest and {step_bytes:,} at its peak ({where}), {needed:,} is the smallest that can; offload the optimizer or "
        "the parameters (offload=), shard over more ranks, or make the batch smaller",
        needed,
        where,
    )


def _backwards(prefix: str, graph: Graph, saved: Iterable[Value], tangents: Iterable[Value]) -> tuple[Program, Program]:
    """The backward of a graph, synced and not."""
    synced = _backward(f"{prefix}backward", graph, saved, tangents)
    return synced, _backward(f"{prefix}unsynced", without_sync(graph), saved, tangents)


def _backward(name: str, graph: Graph, saved: Iterable[Value], tangents: Iterable[Value]) -> Program:
    graph = _as_run(graph)
    nodes = [n for n in graph.nodes if n.phase is not Phase.forward]
    results = [o.value for o in graph.outputs if o.phase is not Phase.forward]
    return _program(name, [*saved, *tangents], nodes, results, graph.arenas.get(Phase.backward))


def _saved(graph: Graph, forward: Iterable[Node]) -> tuple[Value, ...]:
    """Values of the forward, and inputs of the call, that the backward reads or returns; tensors first."""
    live_here = {r.name: r for n in forward for r in n.results}
    kinds = (InputKind.input, InputKind.buffer)
    live_here.update((i.value.name, i.value) for i in graph.inputs if i.kind in kinds)
    read = [v for n in graph.nodes if n.phase is not Phase.forward for v in n.operands]
    read += [o.value for o in graph.outputs if o.phase is not Phase.forward and o.value is not None]
    found = dict.fromkeys(live_here[v.name] for v in read if v.name in live_here)
    return tuple(sorted(found, key=lambda v: not isinstance(v.type, TensorType)))


def _program(
    name: str,
    arguments: Iterable[Value],
    nodes: Iterable[Node],
    results: Iterable[Value | None],
    arena_bytes: int | None,
) -> Program:
    """Instructions with each value freed after its last use; what is returned is never freed."""
    wanted = list(results)
    alive = {v.name for v in wanted if v is not None}
    instructions: list[Instruction] = []
    for node in reversed(list(nodes)):
        touched = dict.fromkeys(v.name for v in (*node.operands, *node.results))
        frees = tuple(n for n in touched if n not in alive)
        alive.update(touched)
        instructions.append(Instruction(node, frees))
    arena_bytes = arena_bytes if any(offsets(i.node) for i in instructions) else None
    return Program(name, tuple(arguments), tuple(reversed(instructions)), tuple(wanted), arena_bytes or 0)
