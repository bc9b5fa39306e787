"""Single faults in graphs: each kind takes a graph and a source of chance, and gives a graph that is wrong, or None.

A fault changes what is computed, sent or alive. Kinds leave out what they know to change nothing: operands of an op
that commutes, a constant that the op does not look at.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from random import Random

from zgraph.ir import (
    HOST,
    OPS,
    Arg,
    DType,
    ExternalOp,
    Graph,
    InputKind,
    Node,
    OutputKind,
    Partial,
    Phase,
    Replicate,
    Shard,
    TensorType,
    Value,
    Varying,
)
from zgraph.ir.ops import views

Kind = Callable[[Graph, Random], Graph | None]

KINDS: dict[str, Kind] = {}

COMMUTES = frozenset({"aten.add.Tensor", "aten.mul.Tensor", "aten.maximum.default"})
STARTS = tuple(op.name for op in OPS.values() if op.lane != "compute")
GATHERS = ("all_gather_start", "reload_start")
REDUCES = ("reduce_scatter_start", "all_reduce_start")


def kind(function: Kind) -> Kind:
    """Register a kind of fault under what its function is called."""
    KINDS[function.__name__.replace("_", " ")] = function
    return function


# --- tools -----------------------------------------------------------------------------------------------------------


def at(graph: Graph, rng: Random, which: Callable[[Node], object]) -> int | None:
    """The position of a node that fits."""
    found = [p for p, n in enumerate(graph.nodes) if which(n)]
    return rng.choice(found) if found else None


def op(*names: str) -> Callable[[Node], bool]:
    return lambda node: node.op in names


def put(graph: Graph, position: int, *nodes: Node) -> Graph:
    """The graph with these nodes in the place of one."""
    return graph.with_nodes([*graph.nodes[:position], *nodes, *graph.nodes[position + 1 :]])


def moved(graph: Graph, position: int, to: int) -> Graph:
    """The graph with a node moved behind the one at `to`, or before it if it goes up."""
    nodes = list(graph.nodes)
    nodes.insert(to, nodes.pop(position))
    return graph.with_nodes(nodes)


def renamed(nodes: Sequence[Node], old: Value, new: Value) -> list[Node]:
    return [n.substitute({old.name: new}) for n in nodes]


def without(graph: Graph, position: int) -> Graph:
    """The graph without a node that makes one value of one, which is read in its place."""
    node = graph.nodes[position]
    new = {node.name: node.operands[0]}
    nodes = [*graph.nodes[:position], *(n.substitute(new) for n in graph.nodes[position + 1 :])]
    return replace(graph, nodes=tuple(nodes), outputs=tuple(o.substitute(new) for o in graph.outputs))


def option(node: Node, key: str, arg: Arg) -> Node:
    """The node with another keyword argument; without it, for None."""
    others = tuple(o for o in node.kwargs if o[0] != key)
    return replace(node, kwargs=others if arg is None else (*others, (key, arg)))


def outputs(graph: Graph, *kinds: OutputKind) -> list[int]:
    return [i for i, o in enumerate(graph.outputs) if o.kind in kinds and o.value is not None]


def alike(values: Sequence[Value], value: Value) -> list[Value]:
    return [v for v in values if v.type == value.type and v.name != value.name]


def before(graph: Graph, position: int) -> list[Value]:
    """The values that are there before a node."""
    return [i.value for i in graph.inputs] + [r for n in graph.nodes[:position] for r in n.results]


def live(graph: Graph) -> frozenset[str]:
    """The values that outputs depend on."""
    found = set(graph.output_names)
    for node in reversed(graph.nodes):
        if any(r.name in found for r in node.results) or (node.op not in OPS and graph.foreign[node.op].writes):
            found.update(v.name for v in node.operands)
    return frozenset(found)


def computes(graph: Graph) -> Callable[[Node], bool]:
    """Whether a node is an op of ATen or a kernel that outputs depend on."""
    found = live(graph)
    return lambda node: node.op not in OPS and any(r.name in found for r in node.results)


def reader(graph: Graph, value: Value, after: int) -> int | None:
    return next((p for p in graph.users.get(value.name, ()) if p > after), None)


def last_use(graph: Graph, position: int) -> int:
    """The last position at which the memory of what a node makes is touched, releases left out."""
    names = {r.name for r in graph.nodes[position].results}
    last = position
    for p in range(position + 1, len(graph.nodes)):
        node = graph.nodes[p]
        if node.op != "release" and any(v.name in names for v in node.operands):
            last = p
            if node.op in STARTS or any(v in names for v in views(graph, node)):
                names.update(r.name for r in node.results)
    return last


# --- waiting ---------------------------------------------------------------------------------------------------------


@kind
def a_wait_dropped(graph: Graph, rng: Random) -> Graph | None:
    p = at(graph, rng, op("wait"))
    return None if p is None else without(graph, p)


@kind
def a_wait_dropped_and_its_type_called_delivered(graph: Graph, rng: Random) -> Graph | None:
    p = at(graph, rng, op("wait"))
    if p is None:
        return None
    node = graph.nodes[p]
    start = next(i for i, n in enumerate(graph.nodes) if node.operands[0] in n.results)
    made = tuple(replace(r, type=r.tensor.delivered()) for r in graph.nodes[start].results)
    changed = put(graph, start, replace(graph.nodes[start], results=made))
    return without(changed, p)


@kind
def a_wait_behind_a_use(graph: Graph, rng: Random) -> Graph | None:
    p = at(graph, rng, lambda n: n.op == "wait" and graph.users.get(n.name))
    return None if p is None else moved(graph, p, graph.users[graph.nodes[p].name][0])


@kind
def a_wait_twice(graph: Graph, rng: Random) -> Graph | None:
    p = at(graph, rng, op("wait"))
    if p is None:
        return None
    node = graph.nodes[p]
    again = replace(node, results=(replace(node.results[0], name=f"{node.name}_twice"),))
    return put(graph, p, node, again)


@kind
def a_wait_in_another_phase(graph: Graph, rng: Random) -> Graph | None:
    p = at(graph, rng, lambda n: n.op == "wait" and n.phase is not Phase.update)
    if p is None:
        return None
    later = Phase.backward if graph.nodes[p].phase is Phase.forward else Phase.update
    return put(graph, p, replace(graph.nodes[p], phase=later))


# --- whose memory it is ----------------------------------------------------------------------------------------------


@kind
def a_release_too_early(graph: Graph, rng: Random) -> Graph | None:
    p = at(graph, rng, op("release"))
    if p is None:
        return None
    name = graph.nodes[p].operands[0].name
    users = [u for u in graph.users[name] if u != p]
    return moved(graph, p, users[0]) if users else None


@kind
def a_release_twice(graph: Graph, rng: Random) -> Graph | None:
    p = at(graph, rng, op("release"))
    return None if p is None else put(graph, p, graph.nodes[p], graph.nodes[p])


@kind
def a_release_dropped(graph: Graph, rng: Random) -> Graph | None:
    p = at(graph, rng, op("release"))
    return None if p is None else graph.with_nodes([*graph.nodes[:p], *graph.nodes[p + 1 :]])


@kind
def a_release_late(graph: Graph, rng: Random) -> Graph | None:
    def makes(node: Node) -> bool:
        return node.op not in OPS and bool(node.results) and not views(graph, node)

    p = at(graph, rng, op("release"))
    if p is None:
        return None
    phase = graph.nodes[p].phase
    later = [i for i in range(p + 1, len(graph.nodes)) if graph.nodes[i].phase is phase and makes(graph.nodes[i])]
    return moved(graph, p, rng.choice(later)) if later else None


@kind
def a_parameter_released(graph: Graph, rng: Random) -> Graph | None:
    if not graph.params or not graph.mesh:
        return None
    node = Node("release", (rng.choice(graph.params).value,), (), phase=graph.nodes[-1].phase)
    return graph.with_nodes([*graph.nodes, node])


@kind
def an_activation_released(graph: Graph, rng: Random) -> Graph | None:
    found = computes(graph)
    p = at(graph, rng, lambda n: found(n) and n.name not in graph.output_names and not views(graph, n))
    if p is None or not any(n.op == "release" for n in graph.nodes):
        return None
    last = last_use(graph, p)
    node = Node("release", graph.nodes[p].results[:1], (), phase=graph.nodes[last].phase)
    return put(graph, last, graph.nodes[last], node)


@kind
def memory_released_while_it_is_sent(graph: Graph, rng: Random) -> Graph | None:
    p = at(graph, rng, lambda n: n.op in STARTS and any(v.name in graph.producers for v in n.operands))
    if p is None:
        return None
    value = next(v for v in graph.nodes[p].operands if v.name in graph.producers)
    return put(graph, p, graph.nodes[p], Node("release", (value,), (), phase=graph.nodes[p].phase))


def _write(value: Value, phase: Phase, name: str) -> Node:
    return Node("aten.mul_.Scalar", (value, 2), (Value(name, value.type),), phase=phase)


def _writing(graph: Graph) -> Graph:
    return replace(graph, foreign={**graph.foreign, "aten.mul_.Scalar": ExternalOp(views=(0,), writes=(0,))})


@kind
def a_write_to_what_is_being_sent(graph: Graph, rng: Random) -> Graph | None:
    p = at(graph, rng, op(*STARTS))
    if p is None or graph.nodes[p].operands[0].tensor.is_on_host:
        return None
    node = graph.nodes[p]
    return _writing(put(graph, p, node, _write(node.operands[0], node.phase, "written")))


@kind
def a_write_between_two_readers(graph: Graph, rng: Random) -> Graph | None:
    found = live(graph)

    def read_twice(node: Node) -> bool:
        kind = node.results[0].type if node.results and node.name in found else None
        is_float = isinstance(kind, TensorType) and kind.dtype in (DType.f32, DType.bf16)
        return node.op not in OPS and is_float and len(graph.users.get(node.name, ())) > 1

    p = at(graph, rng, read_twice)
    if p is None:
        return None
    first = graph.users[graph.nodes[p].name][0]
    write = _write(graph.nodes[p].results[0], graph.nodes[first].phase, "written")
    return _writing(put(graph, first, graph.nodes[first], write))


# --- arenas ----------------------------------------------------------------------------------------------------------


def _placed(graph: Graph, rng: Random) -> int | None:
    return at(graph, rng, lambda n: n.option("at") is not None)


def _at(node: Node, change: Callable[[int], int]) -> Node:
    offsets = node.option("at")
    assert isinstance(offsets, tuple)
    return option(node, "at", tuple(change(o) if isinstance(o, int) else o for o in offsets))


@kind
def a_place_in_an_arena_taken_twice(graph: Graph, rng: Random) -> Graph | None:
    p = _placed(graph, rng)
    return None if p is None else _checked(graph, put(graph, p, _at(graph.nodes[p], lambda o: 0)))


@kind
def an_odd_offset_in_an_arena(graph: Graph, rng: Random) -> Graph | None:
    p = _placed(graph, rng)
    return None if p is None else put(graph, p, _at(graph.nodes[p], lambda o: o + 4))


@kind
def an_offset_far_beyond_an_arena(graph: Graph, rng: Random) -> Graph | None:
    p = _placed(graph, rng)
    return None if p is None else put(graph, p, _at(graph.nodes[p], lambda o: o + 10 * 2**20))


def _checked(graph: Graph, changed: Graph) -> Graph | None:
    return None if changed == graph else changed


# --- collectives -----------------------------------------------------------------------------------------------------


def _relowered(graph: Graph, rng: Random, old: str, new: str) -> Graph | None:
    p = at(graph, rng, op(old))
    return None if p is None else put(graph, p, replace(graph.nodes[p], op=new))


@kind
def a_reduce_scatter_made_an_all_gather(graph: Graph, rng: Random) -> Graph | None:
    return _relowered(graph, rng, "reduce_scatter_start", "all_gather_start")


@kind
def an_all_gather_made_a_reduce_scatter(graph: Graph, rng: Random) -> Graph | None:
    return _relowered(graph, rng, "all_gather_start", "reduce_scatter_start")


@kind
def a_reduce_scatter_made_an_all_reduce(graph: Graph, rng: Random) -> Graph | None:
    return _relowered(graph, rng, "reduce_scatter_start", "all_reduce_start")


@kind
def an_all_reduce_made_a_broadcast(graph: Graph, rng: Random) -> Graph | None:
    return _relowered(graph, rng, "all_reduce_start", "broadcast_start")


@kind
def a_broadcast_made_an_all_reduce(graph: Graph, rng: Random) -> Graph | None:
    return _relowered(graph, rng, "broadcast_start", "all_reduce_start")


@kind
def a_mean_made_another_reduction(graph: Graph, rng: Random) -> Graph | None:
    """Where types say what is pending, there; else where a reshard says it."""
    p = at(graph, rng, lambda n: n.op == "pending" or (n.op == "reshard" and n.operands[0].tensor.varies))
    if p is None:
        return None
    node = graph.nodes[p]
    if node.op == "reshard":
        return put(graph, p, option(node, "reduce", None if node.option("reduce") else "root"))
    old = node.option("reduce")
    new = {"mean": "sum", "sum": "mean", "root": "mean"}[str(old)]
    kind = node.results[0].tensor
    placed = tuple(replace(e, reduce=new) if isinstance(e, Partial) else e for e in kind.placement)
    value = replace(node.results[0], type=kind.at(*placed))
    changed = put(graph, p, replace(option(node, "reduce", new), results=(value,)))
    return replace(changed, nodes=tuple(renamed(changed.nodes, node.results[0], value)))


@kind
def a_reduction_skipped(graph: Graph, rng: Random) -> Graph | None:
    found = [i for i in outputs(graph, OutputKind.grad) if graph.mesh]
    rng.shuffle(found)
    for index in found:
        output = graph.outputs[index]
        assert output.value is not None
        maker = graph.producers.get(output.value.name)
        while maker is not None and maker.op in OPS and maker.operands:
            raw = maker.operands[0]
            maker = graph.producers.get(raw.name)
            if raw.tensor.shape == output.value.tensor.shape and not raw.tensor.future:
                changed = list(graph.outputs)
                changed[index] = replace(output, value=raw)
                return replace(graph, outputs=tuple(changed))
    return None


def _scaled(graph: Graph, position: int, value: Value, by: float) -> Graph:
    """The graph with a value scaled where it is made."""
    made = replace(value, name=f"{value.name}_scaled")
    node = Node("aten.mul.Scalar", (value, by), (made,), phase=graph.nodes[position].phase)
    after = renamed(graph.nodes[position + 1 :], value, made)
    changed = tuple(o.substitute({value.name: made}) for o in graph.outputs)
    foreign = {**graph.foreign, "aten.mul.Scalar": ExternalOp()}
    nodes = (*graph.nodes[: position + 1], node, *after)
    return replace(graph, nodes=nodes, outputs=changed, foreign=foreign)


@kind
def a_gradient_scaled(graph: Graph, rng: Random) -> Graph | None:
    names = {o.value.name for o in graph.outputs if o.kind is OutputKind.grad and o.value is not None}
    behind = {v.name for n in graph.nodes if n.op in (*REDUCES, "reshard", "pending", "accumulate") for v in n.operands}
    p = at(
        graph,
        rng,
        lambda n: (
            n.op not in OPS and n.results and n.name in names | behind and isinstance(n.results[0].type, TensorType)
        ),
    )
    return None if p is None else _scaled(graph, p, graph.nodes[p].results[0], rng.choice((2.0, 0.5)))


@kind
def another_parameter_read(graph: Graph, rng: Random) -> Graph | None:
    values = [i.value for i in graph.params]
    found = [(p, v) for p, n in enumerate(graph.nodes) for v in n.operands if v in values and alike(values, v)]
    if not found:
        return None
    p, value = rng.choice(found)
    return put(graph, p, graph.nodes[p].substitute({value.name: rng.choice(alike(values, value))}))


def _members(graph: Graph, rng: Random, ops: Sequence[str], of: str) -> Graph | None:
    """Two members of a bucket, or of a grouped call, in each other's place."""
    p = at(graph, rng, lambda n: n.op in ops and len(getattr(n, of)) > 1)
    if p is None:
        return None
    node = graph.nodes[p]
    a, b = rng.sample(range(len(getattr(node, of))), 2)
    found = list(getattr(node, of))
    found[a], found[b] = found[b], found[a]
    if of == "results":
        return put(graph, p, replace(node, results=tuple(found)))
    return put(graph, p, replace(node, args=tuple(found)))


@kind
def members_swapped_before_a_collective(graph: Graph, rng: Random) -> Graph | None:
    return _members(graph, rng, ("pack", *STARTS), "args")


@kind
def members_swapped_behind_a_collective(graph: Graph, rng: Random) -> Graph | None:
    return _members(graph, rng, ("unpack", *STARTS), "results")


@kind
def a_collective_run_again(graph: Graph, rng: Random) -> Graph | None:
    """Gathered once more for nothing, or a value sent twice."""
    p = at(graph, rng, op(*STARTS))
    if p is None:
        return None
    node = graph.nodes[p]
    starts = replace(node, results=tuple(replace(r, name=f"{r.name}_more") for r in node.results))
    waits = [
        Node("wait", (r,), (Value(f"{r.name}_over", r.tensor.delivered()),), phase=node.phase) for r in starts.results
    ]
    return put(graph, p, node, starts, *waits)


@kind
def a_keep_flag_flipped(graph: Graph, rng: Random) -> Graph | None:
    p = at(
        graph,
        rng,
        lambda n: n.op == "all_gather_start" or (n.op == "reshard" and n.operands[0].tensor.is_sharded),
    )
    if p is None:
        return None
    node = graph.nodes[p]
    return put(graph, p, option(node, "keep", None if node.option("keep") else True))


@kind
def a_start_moved_to_an_earlier_phase(graph: Graph, rng: Random) -> Graph | None:
    p = at(graph, rng, lambda n: n.op in STARTS and n.phase is Phase.update)
    if p is None:
        return None
    names = {r.name for r in graph.nodes[p].results}
    nodes = list(graph.nodes)
    for i, node in enumerate(nodes):
        if i == p or (node.op == "wait" and node.operands[0].name in names):
            nodes[i] = replace(node, phase=Phase.backward)
    return graph.with_nodes(nodes)


# --- gradients and outputs -------------------------------------------------------------------------------------------


@kind
def two_outputs_swapped(graph: Graph, rng: Random) -> Graph | None:
    found = outputs(graph, OutputKind.grad, OutputKind.mutation, OutputKind.output)
    values = {i: graph.outputs[i].value for i in found}
    pairs = [
        (a, b) for a in found for b in found if a < b and values[a] != values[b] and values[a].type == values[b].type
    ]
    if not pairs:
        return None
    a, b = rng.choice(pairs)
    changed = list(graph.outputs)
    changed[a] = replace(changed[a], value=graph.outputs[b].value)
    changed[b] = replace(changed[b], value=graph.outputs[a].value)
    return replace(graph, outputs=tuple(changed))


@kind
def an_output_missing(graph: Graph, rng: Random) -> Graph | None:
    found = outputs(graph, OutputKind.grad, OutputKind.mutation)
    if not found:
        return None
    index = rng.choice(found)
    changed = list(graph.outputs)
    changed[index] = replace(changed[index], value=None)
    return replace(graph, outputs=tuple(changed))


@kind
def an_output_for_another_target(graph: Graph, rng: Random) -> Graph | None:
    found = outputs(graph, OutputKind.grad, OutputKind.mutation)
    if len(found) < 2:
        return None
    a, b = rng.sample(found, 2)
    changed = list(graph.outputs)
    changed[a] = replace(changed[a], target=graph.outputs[b].target)
    return None if changed[a] == graph.outputs[a] else replace(graph, outputs=tuple(changed))


@kind
def an_addend_dropped(graph: Graph, rng: Random) -> Graph | None:
    found = live(graph)

    def adds(node: Node) -> bool:
        kinds = {v.type for v in (*node.operands, *node.results)}
        return node.op == "aten.add.Tensor" and len(node.operands) == 2 and len(kinds) == 1 and node.name in found

    p = at(graph, rng, adds)
    return None if p is None else without(graph, p)


@kind
def an_accumulation_for_another_parameter(graph: Graph, rng: Random) -> Graph | None:
    p = at(graph, rng, op("accumulate"))
    others = [i.target for i in graph.params if p is None or i.target != graph.nodes[p].option("target")]
    return None if p is None or not others else put(graph, p, option(graph.nodes[p], "target", rng.choice(others)))


@kind
def an_accumulation_dropped(graph: Graph, rng: Random) -> Graph | None:
    p = at(graph, rng, op("accumulate"))
    return None if p is None else without(graph, p)


@kind
def an_accumulation_at_a_stage_without(graph: Graph, rng: Random) -> Graph | None:
    if any(n.op == "accumulate" for n in graph.nodes):
        return None
    p = at(
        graph,
        rng,
        lambda n: (
            n.op in (*REDUCES, "reshard")
            and n.phase is Phase.backward
            and not n.operands[0].tensor.is_sharded
            and isinstance(n.operands[0].tensor.placement[-1:], tuple)
            and any(isinstance(e, Partial | Varying) for e in n.operands[0].tensor.placement)
        ),
    )
    if p is None:
        return None
    node, value = graph.nodes[p], graph.nodes[p].operands[0]
    made = replace(value, name=f"{value.name}_held")
    held = Node("accumulate", (value,), (made,), (("target", graph.params[0].target),), node.phase)
    return put(graph, p, held, node.substitute({value.name: made}))


# --- dataflow --------------------------------------------------------------------------------------------------------


def _rewired(graph: Graph, rng: Random, which: Callable[[Node], object], old: Phase | None = None) -> Graph | None:
    """A node that reads another value of the same type, made in phase `old` if one is given."""
    found = list(range(len(graph.nodes)))
    rng.shuffle(found)
    phases = {r.name: n.phase for n in graph.nodes for r in n.results}
    for p in found:
        node = graph.nodes[p]
        if not which(node) or not node.operands:
            continue
        value = rng.choice(node.operands)
        if old is not None and phases.get(value.name) is not old:
            continue
        others = [v for v in alike(before(graph, p), value) if old is None or phases.get(v.name) is old]
        if others and not _is_the_same(graph, other := rng.choice(others), value):
            return put(graph, p, node.substitute({value.name: other}))
    return None


def _is_the_same(graph: Graph, a: Value, b: Value) -> bool:
    """Whether two values are the same numbers, by construction: made by the same op of the same operands."""
    numbers: dict[object, int] = {}
    found: dict[str, int] = {}
    for node in graph.nodes:
        row = graph.foreign.get(node.op)
        inner = tuple(found.get(v.name, v.name) for v in node.operands)
        is_name = node.op in ("wait", "copy", "aten.detach.default", "aten.alias.default", "pending", *STARTS)
        for at, result in enumerate(node.results):
            if is_name and len(node.operands) in (1, len(node.results)):
                source = node.operands[at if len(node.operands) > 1 else 0].name
                found[result.name] = found.get(source, numbers.setdefault(source, len(numbers)))
            elif row is not None and not row.is_pure:
                found[result.name] = numbers.setdefault(result.name, len(numbers))
            else:
                rest = repr([a for a in node.args if not isinstance(a, Value)]) + repr(node.kwargs)
                found[result.name] = numbers.setdefault((node.op, at, inner, rest), len(numbers))
    return found.get(a.name, a.name) == found.get(b.name, b.name)


@kind
def another_operand(graph: Graph, rng: Random) -> Graph | None:
    return _rewired(graph, rng, computes(graph))


@kind
def another_value_saved(graph: Graph, rng: Random) -> Graph | None:
    found = computes(graph)
    return _rewired(graph, rng, lambda n: n.phase is Phase.backward and found(n), Phase.forward)


@kind
def another_value_sent(graph: Graph, rng: Random) -> Graph | None:
    return _rewired(graph, rng, lambda n: n.op in ("pack", "reshard", "cast", "pending", "accumulate", *STARTS))


@kind
def operands_swapped(graph: Graph, rng: Random) -> Graph | None:
    found = computes(graph)

    def differ(node: Node) -> bool:
        if node.op in COMMUTES or not found(node) or len(node.args) < 2:
            return False
        a, b = node.args[:2]
        return isinstance(a, Value) and isinstance(b, Value) and a != b and not _is_the_same(graph, a, b)

    p = at(graph, rng, differ)
    if p is None:
        return None
    a, b, *others = graph.nodes[p].args
    return put(graph, p, replace(graph.nodes[p], args=(b, a, *others)))


@kind
def results_swapped(graph: Graph, rng: Random) -> Graph | None:
    found = live(graph)
    p = at(graph, rng, lambda n: n.op not in OPS and len(n.results) > 1 and n.results[0].name in found)
    if p is None:
        return None
    a, b, *others = graph.nodes[p].results
    return put(graph, p, replace(graph.nodes[p], results=(b, a, *others)))


REPLACED = {
    "aten.add.Tensor": "aten.sub.Tensor",
    "aten.mul.Tensor": "aten.div.Tensor",
    "aten.neg.default": "aten.abs.default",
    "aten.silu.default": "aten.gelu.default",
    "aten.gelu.default": "aten.silu.default",
    "aten.cos.default": "aten.sin.default",
    "aten.rsqrt.default": "aten.sqrt.default",
    "aten.relu.default": "aten.sigmoid.default",
    "aten.sum.dim_IntList": "aten.mean.dim",
    "aten.t.default": "aten.detach.default",
}


@kind
def another_op(graph: Graph, rng: Random) -> Graph | None:
    found = computes(graph)
    p = at(graph, rng, lambda n: n.op in REPLACED and found(n) and not n.kwargs)
    if p is None:
        return None
    new = REPLACED[graph.nodes[p].op]
    row = ExternalOp(views=(0,)) if new == "aten.detach.default" else ExternalOp()
    return replace(put(graph, p, replace(graph.nodes[p], op=new)), foreign={**graph.foreign, new: row})


@kind
def a_node_dropped(graph: Graph, rng: Random) -> Graph | None:
    found = computes(graph)

    def passes_on(node: Node) -> bool:
        is_name = node.op in (
            "aten.detach.default",
            "aten.alias.default",
            "aten.clone.default",
            "aten._to_copy.default",
        )
        return (
            found(node)
            and len(node.results) == 1
            and bool(node.operands)
            and not is_name
            and (node.operands[0].type == node.results[0].type)
        )

    p = at(graph, rng, passes_on)
    return None if p is None else without(graph, p)


def _constant(graph: Graph, rng: Random, wanted: type, change: Callable[[Arg], Arg]) -> Graph | None:
    found = computes(graph)

    def has(node: Node) -> list[int]:
        return [i for i, a in enumerate(node.args) if type(a) is wanted]

    p = at(graph, rng, lambda n: found(n) and has(n) and n.op not in ("aten.empty.memory_format",))
    if p is None:
        return None
    node = graph.nodes[p]
    i = rng.choice(has(node))
    return put(graph, p, replace(node, args=(*node.args[:i], change(node.args[i]), *node.args[i + 1 :])))


@kind
def another_integer(graph: Graph, rng: Random) -> Graph | None:
    return _constant(graph, rng, int, lambda a: a + 1)


@kind
def another_float(graph: Graph, rng: Random) -> Graph | None:
    return _constant(graph, rng, float, lambda a: a * 1.5 + 0.25)


@kind
def another_flag(graph: Graph, rng: Random) -> Graph | None:
    return _constant(graph, rng, bool, lambda a: not a)


@kind
def another_kernel(graph: Graph, rng: Random) -> Graph | None:
    def other(node: Node) -> str:
        text = node.args[-1] if node.op.startswith("zgraph.") and isinstance(node.args[-1], str) else ""
        return re.sub(r"\bmul\(", "add(", text, count=1)

    p = at(graph, rng, lambda n: isinstance(n.args[-1:], tuple) and n.args and other(n) not in ("", n.args[-1]))
    return (
        None
        if p is None
        else put(graph, p, replace(graph.nodes[p], args=(*graph.nodes[p].args[:-1], other(graph.nodes[p]))))
    )


@kind
def a_random_op_drawn_again(graph: Graph, rng: Random) -> Graph | None:
    p = at(graph, rng, lambda n: n.op not in OPS and graph.foreign[n.op].random and n.phase is Phase.forward)
    if p is None:
        return None
    node = graph.nodes[p]
    users = [u for r in node.results for u in graph.users.get(r.name, ()) if graph.nodes[u].phase is Phase.backward]
    if not users:
        return None
    again = tuple(replace(r, name=f"{r.name}_drawn") for r in node.results)
    new = dict(zip((r.name for r in node.results), again, strict=True))
    nodes = list(graph.nodes)
    first = min(users)
    nodes[first:] = [replace(node, results=again, phase=Phase.backward), *(n.substitute(new) for n in nodes[first:])]
    return graph.with_nodes(nodes)


@kind
def random_ops_in_another_order(graph: Graph, rng: Random) -> Graph | None:
    found = [p for p, n in enumerate(graph.nodes) if n.op not in OPS and graph.foreign[n.op].random]
    rng.shuffle(found)
    for p in found:
        node = graph.nodes[p]
        for q in range(p + 1, len(graph.nodes)):
            other = graph.nodes[q]
            if other.phase is not node.phase or any(r in other.operands for r in node.results):
                break
            if other.op not in OPS and graph.foreign[other.op].random:
                return moved(graph, p, q)
    return None


# --- types and effects -----------------------------------------------------------------------------------------------


def _retyped(graph: Graph, rng: Random, change: Callable[[TensorType], TensorType | None]) -> Graph | None:
    found = [
        (p, i)
        for p, n in enumerate(graph.nodes)
        for i, r in enumerate(n.results)
        if n.op not in OPS and isinstance(r.type, TensorType) and change(r.type) not in (None, r.type)
    ]
    if not found:
        return None
    p, i = rng.choice(found)
    old = graph.nodes[p].results[i]
    new = replace(old, type=change(old.tensor))
    results = graph.nodes[p].results
    changed = put(graph, p, replace(graph.nodes[p], results=(*results[:i], new, *results[i + 1 :])))
    return replace(
        changed,
        nodes=tuple(renamed(changed.nodes, old, new)),
        outputs=tuple(o.substitute({old.name: new}) for o in changed.outputs),
    )


@kind
def a_shape_that_is_a_lie(graph: Graph, rng: Random) -> Graph | None:
    return _retyped(graph, rng, lambda k: replace(k, shape=(k.shape[0] + 1, *k.shape[1:])) if k.shape else None)


@kind
def a_dtype_that_is_a_lie(graph: Graph, rng: Random) -> Graph | None:
    return _retyped(graph, rng, lambda k: replace(k, dtype=DType.f16 if k.dtype is not DType.f16 else DType.f32))


@kind
def strides_that_are_a_lie(graph: Graph, rng: Random) -> Graph | None:
    def other(kind: TensorType) -> TensorType | None:
        if len(kind.shape) < 2 or any(d in (0, 1) for d in kind.shape[-2:]):
            return None
        return (
            replace(kind, strides=None)
            if kind.strides
            else replace(kind, strides=(*(1 for _ in kind.shape[:-1]), kind.shape[-1]))
        )

    return _retyped(graph, rng, other)


@kind
def a_dtype_argument(graph: Graph, rng: Random) -> Graph | None:
    p = at(graph, rng, lambda n: n.op == "aten._to_copy.default" and n.option("dtype") in (DType.f32, DType.bf16))
    return None if p is None else put(graph, p, option(graph.nodes[p], "dtype", DType.f16))


@kind
def an_undeclared_effect(graph: Graph, rng: Random) -> Graph | None:
    used = {n.op for n in graph.nodes}
    rows = [op for op, r in graph.foreign.items() if op in used and (r.views or r.writes or r.random)]
    if not rows:
        return None
    name = rng.choice(sorted(rows))
    row = graph.foreign[name]
    kept = {"views": ()} if row.views else {"writes": ()} if row.writes else {"random": False}
    less = replace(row, **kept)
    return replace(graph, foreign={**graph.foreign, name: less})


@kind
def a_placement_that_is_a_lie(graph: Graph, rng: Random) -> Graph | None:
    def other(kind: TensorType) -> TensorType | None:
        if Varying() not in kind.placement:
            return None
        return kind.at(*(Replicate() if isinstance(e, Varying) else e for e in kind.placement))

    return _retyped(graph, rng, other)


# --- rounding --------------------------------------------------------------------------------------------------------


@kind
def a_cast_dropped(graph: Graph, rng: Random) -> Graph | None:
    p = at(graph, rng, op("cast"))
    return None if p is None else without(graph, p)


def _rounded(graph: Graph, position: int, value: Value, through: DType) -> Graph:
    low = Value(f"{value.name}_low", replace(value.tensor.contiguous(), dtype=through))
    back = Value(f"{value.name}_back", value.tensor.contiguous())
    phase = graph.nodes[position].phase
    nodes = [
        Node("cast", (value,), (low,), (("dtype", through),), phase),
        Node("cast", (low,), (back,), (("dtype", value.tensor.dtype),), phase),
    ]
    after = renamed(graph.nodes[position + 1 :], value, back)
    changed = tuple(o.substitute({value.name: back}) for o in graph.outputs)
    return replace(graph, nodes=(*graph.nodes[: position + 1], *nodes, *after), outputs=changed)


@kind
def a_value_rounded(graph: Graph, rng: Random) -> Graph | None:
    found = computes(graph)

    def fits(node: Node) -> bool:
        value = node.results[0] if len(node.results) == 1 else None
        is_float = value is not None and isinstance(value.type, TensorType) and value.type.dtype is DType.f32
        return bool(is_float and found(node) and value.type.strides is None)

    p = at(graph, rng, fits)
    if p is None:
        return None
    return _rounded(graph, p, graph.nodes[p].results[0], rng.choice((DType.bf16, DType.f8e4m3, DType.f16)))


@kind
def gradients_rounded_before_they_are_reduced(graph: Graph, rng: Random) -> Graph | None:
    p = at(
        graph,
        rng,
        lambda n: (
            n.op in (*REDUCES, "reshard", "accumulate")
            and n.phase is not Phase.forward
            and not n.operands[0].tensor.is_sharded
            and n.operands[0].tensor.dtype is DType.f32
            and n.operands[0].name in graph.producers
        ),
    )
    if p is None:
        return None
    value = graph.nodes[p].operands[0]
    maker = next(i for i, n in enumerate(graph.nodes) if value in n.results)
    return _rounded(graph, maker, value, DType.f16)


# --- what a graph says of its inputs ---------------------------------------------------------------------------------


def _inputs(graph: Graph, index: int, **changes: object) -> Graph:
    found = list(graph.inputs)
    found[index] = replace(found[index], **changes)
    return replace(graph, inputs=tuple(found))


@kind
def two_inputs_swapped(graph: Graph, rng: Random) -> Graph | None:
    """Two parameters under each other's name in the model."""
    pairs = [
        (a, b)
        for a, x in enumerate(graph.inputs)
        for b, y in enumerate(graph.inputs)
        if a < b and x.kind is y.kind is InputKind.param and x.value.type == y.value.type
    ]
    if not pairs:
        return None
    a, b = rng.choice(pairs)
    return _inputs(_inputs(graph, a, target=graph.inputs[b].target), b, target=graph.inputs[a].target)


@kind
def another_stage(graph: Graph, rng: Random) -> Graph | None:
    found = [i for i, e in enumerate(graph.inputs) if e.kind is InputKind.param and e.stage is not None]
    if not found or not graph.mesh:
        return None
    index = rng.choice(found)
    stage = graph.inputs[index].stage
    assert stage is not None
    return _inputs(graph, index, stage={0: 2, 1: 0, 2: 1, 3: 0}[stage])


@kind
def a_parameter_placed_elsewhere(graph: Graph, rng: Random) -> Graph | None:
    found = [i for i, e in enumerate(graph.inputs) if e.kind is InputKind.param and graph.mesh]
    if not found:
        return None
    index = rng.choice(found)
    old = graph.inputs[index].value
    other = Replicate() if old.tensor.is_sharded else Shard(0)
    new = replace(old, type=old.tensor.at(*old.tensor.placement[:-1], other))
    changed = _inputs(graph, index, value=new)
    return replace(changed, nodes=tuple(renamed(changed.nodes, old, new)))


@kind
def a_gradient_left_on_the_device(graph: Graph, rng: Random) -> Graph | None:
    """A gradient whose master lies on the host."""
    for index in outputs(graph, OutputKind.grad):
        output = graph.outputs[index]
        assert output.value is not None
        if output.value.tensor.space != HOST:
            continue
        maker = graph.producers[output.value.name]
        while maker.op not in ("offload_start", "reshard"):
            maker = graph.producers[maker.operands[0].name]
        changed = list(graph.outputs)
        changed[index] = replace(output, value=maker.operands[0])
        return replace(graph, outputs=tuple(changed))
    return None


@kind
def another_value_brought_back(graph: Graph, rng: Random) -> Graph | None:
    return _rewired(graph, rng, op("reload_start"))


@kind
def a_value_brought_back_before_it_is_there(graph: Graph, rng: Random) -> Graph | None:
    p = at(graph, rng, lambda n: n.op == "reload_start" and n.operands[0].name in graph.producers)
    if p is None:
        return None
    wait = next(i for i, n in enumerate(graph.nodes) if graph.nodes[p].operands[0] in n.results)
    return moved(graph, wait, p)


@kind
def another_mesh(graph: Graph, rng: Random) -> Graph | None:
    if not graph.mesh:
        return None
    last = graph.mesh[-1]
    return replace(graph, mesh=(*graph.mesh[:-1], replace(last, size=2 * last.size)))


@kind
def a_buffer_of_each_ranks_own(graph: Graph, rng: Random) -> Graph | None:
    """A buffer's new value that is not shared."""
    found = [i for i in outputs(graph, OutputKind.mutation) if graph.mesh]
    rng.shuffle(found)
    for index in found:
        output = graph.outputs[index]
        assert output.value is not None
        maker = graph.producers.get(output.value.name)
        if maker is not None and maker.op in OPS:
            stem = output.value.name.split("_root")[0]
            raw = next((r for n in graph.nodes for r in n.results if r.name == stem), None)
            if raw is not None and raw != output.value:
                changed = list(graph.outputs)
                changed[index] = replace(output, value=raw)
                return replace(graph, outputs=tuple(changed))
    return None


def mutants(graph: Graph, rng: Random, kinds: Sequence[str] | None = None) -> Iterator[tuple[str, Graph]]:
    """One mutant of each kind that finds a place."""
    for name in kinds or KINDS:
        changed = KINDS[name](graph, rng)
        if changed is not None and changed != graph:
            yield name, changed
