"""Rules of a valid graph: SSA, phases, effects, types, placements, futures, lifetimes. One rule, one function."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping

from zgraph.errors import VerifyError
from zgraph.ir.aliases import Memory
from zgraph.ir.arena import ALIGN_BYTES, Buffer, buffers, clashes, offsets, runs_in, sizes
from zgraph.ir.graph import PROGRAMS, Arg, Graph, Input, InputKind, Node, Output, OutputKind, Phase, graphs_in
from zgraph.ir.names import COLLECTIVES, HIGHER_ORDER
from zgraph.ir.ops import OPS
from zgraph.ir.orders import orders
from zgraph.ir.printer import print_arg, print_node
from zgraph.ir.rules.kept import broken_rule
from zgraph.ir.symbols import Dim, simplify
from zgraph.ir.type_rules import TypeRuleError
from zgraph.ir.types import (
    DEVICE,
    HOST,
    Grouped,
    Mesh,
    Own,
    Partial,
    Replicate,
    Shard,
    TensorType,
    Type,
    Varying,
    model_axes,
    num_data_ranks,
)

Fault = tuple[int | None, str]
"""Position of the node at fault (None: the graph as a whole) and what is wrong."""


def verify(graph: Graph) -> None:
    """Check every rule.

    Raises:
        VerifyError: for the first rule broken, with the op, the lines around it, the user's source line and the pass.
    """
    for rule in CHECKS:
        for position, message in rule(graph):
            raise VerifyError(describe(graph, rule.__name__, position, message))


def ssa(graph: Graph) -> Iterator[Fault]:
    """Every value is defined once, before it is used, and always carries the type it was defined with."""
    defined = {i.value.name: i.value for i in graph.inputs}
    if len(defined) != len(graph.inputs):
        yield None, "two inputs share a name"
    for position, node in enumerate(graph.nodes):
        for value in node.operands:
            if value.name not in defined:
                yield position, f"reads %{value.name}, which nothing above it defines"
            elif defined[value.name].type != value.type:
                yield position, f"reads %{value.name} as {value.type}, but it is {defined[value.name].type}"
        for result in node.results:
            if result.name in defined:
                yield position, f"defines %{result.name}, which is defined already"
            defined[result.name] = result
    for output in graph.outputs:
        if output.value is not None and defined.get(output.value.name) != output.value:
            yield None, f"returns %{output.value.name}, which nothing defines with that type"


def phases(graph: Graph) -> Iterator[Fault]:
    """Forward comes before backward, backward before update, and the forward reads no tangent."""
    tangents = {i.value.name for i in graph.inputs if i.kind is InputKind.tangent}
    last = 0
    for position, node in enumerate(graph.nodes):
        if node.phase.rank < last:
            yield position, f"is in phase {node.phase.value}, but stands after a later phase"
        last = max(last, node.phase.rank)
        if node.phase is Phase.forward and any(v.name in tangents for v in node.operands):
            yield position, "is in the forward but reads a tangent"
    for output in graph.outputs:
        if output.phase is Phase.forward and output.value is not None and output.value.name in tangents:
            yield None, f"returns the tangent %{output.value.name} from the forward"
    ready = {n.name: node.phase.rank for node in graph.nodes for n in node.results}
    for output in graph.outputs:
        if output.value is not None and ready.get(output.value.name, 0) > output.phase.rank:
            yield None, f"returns %{output.value.name} in phase {output.phase.value}, before it is made"


def known_ops(graph: Graph) -> Iterator[Fault]:
    """Every op is one of zgraph's own or declared by the graph."""
    for position, node in enumerate(graph.nodes):
        if node.op not in OPS and node.op not in graph.foreign:
            yield position, f"{node.op} is neither an op of zgraph's nor declared with: op {node.op}"


def types(graph: Graph) -> Iterator[Fault]:
    """The results of zgraph's own ops have the types that the ops table demands."""
    for position, node in enumerate(graph.nodes):
        if op := OPS.get(node.op):
            try:
                wanted = op.rule(node, graph.mesh)
            except (TypeRuleError, VerifyError, TypeError, ValueError, IndexError) as error:
                yield position, f"{node.op}: {error}"
                continue
            if (got := tuple(r.type for r in node.results)) != wanted:
                yield position, f"gives {_list(got)}, but {node.op} makes {_list(wanted)} of these operands"


def subgraphs(graph: Graph) -> Iterator[Fault]:
    """Only higher-order ops call functions. These are valid graphs of one device's ops, and write to nothing."""
    faults: dict[Graph, str] = {}
    named: dict[str, Graph] = {}
    for position, node in enumerate(graph.nodes):
        found = [sub for arg in (*node.args, *(a for _, a in node.kwargs)) for sub in graphs_in(arg)]
        if found and node.op.split(".")[0] != HIGHER_ORDER:
            yield position, f"{node.op} is no higher-order op, so it calls no function"
        for sub in found:
            if named.setdefault(sub.name, sub) != sub:
                yield position, f'calls "{sub.name}", which is another function than one above of this name'
            if sub not in faults:
                faults[sub] = next(_not_a_function(sub), "")
            if faults[sub]:
                yield position, f'calls "{sub.name}", which {faults[sub]}'


def _not_a_function(graph: Graph) -> Iterator[str]:
    """Mistakes in a function that a higher-order op calls."""
    if graph.mesh or graph.arenas:
        yield "has a mesh or an arena; a function is what one device computes"
    for entry in graph.inputs:
        if entry != Input(InputKind.input, entry.value):
            yield f"has the input %{entry.value.name}, a {entry.kind.value}; whatever it reads is an operand of the op"
    if any(output.kind is not OutputKind.output for output in graph.outputs):
        yield "has an output that is a gradient or a mutation"
    for node in graph.nodes:
        namespace = node.op.split(".")[0]
        if node.op in OPS or namespace in COLLECTIVES:
            yield f"has {node.op}, which is between ranks or of a plan; call collectives outside of functions"
        if node.phase is not Phase.forward or node.checkpoint:
            yield f"has %{node.name} in another phase, or in a region of its own"
        if (row := graph.foreign.get(node.op)) is not None and row.writes:
            yield f"has {node.op}, which writes to memory"
    for rule in CHECKS:
        for position, message in rule(graph):
            where = f" at {_title(graph.nodes[position])}" if position is not None else ""
            yield f"is no valid graph{where}: {message}"


def placements(graph: Graph) -> Iterator[Fault]:
    """One placement a mesh axis on every tensor. Along data axes, an op that is not zgraph's own sees only whole or own
    values; along a model axis, it keeps to its sharding rule."""
    rank, num_model = len(graph.mesh), len(model_axes(graph.mesh))
    if wrong := _wrong_mesh(graph.mesh):
        yield None, wrong
        return
    for entry in graph.inputs:
        if unknown := _unknown_size(entry.value.type):
            yield None, f"the input %{entry.value.name} is sharded, but its size {unknown} is not known"
        if isinstance(entry.value.type, TensorType) and len(entry.value.type.placement) != rank:
            yield None, f"the input %{entry.value.name} has {len(entry.value.type.placement)} placements, not {rank}"
    for position, node in enumerate(graph.nodes):
        for result in node.results:
            if unknown := _unknown_size(result.type):
                yield position, f"%{result.name} is sharded, but its size {unknown} is not known"
            if isinstance(result.type, TensorType) and len(result.type.placement) != rank:
                yield position, f"%{result.name} has {len(result.type.placement)} placements for {rank} mesh axes"
        if node.op in OPS:
            continue
        kinds = [v.type.placement[num_model:] for v in node.operands if isinstance(v.type, TensorType)]
        made = [(r, r.type.placement[num_model:]) for r in node.results if isinstance(r.type, TensorType)]
        if any(isinstance(p, Shard | Partial | Grouped | Own) for own in kinds for p in own):
            yield position, f"{node.op} computes on one rank alone, so a sharded or partial operand must be resharded"
        for result, own in made:
            if any(isinstance(p, Shard | Partial | Grouped | Own) for p in own):
                yield position, f"%{result.name} is called {result.type}, but {node.op} computes on one rank alone"
        varies = any(isinstance(p, Varying) for own in kinds for p in own)
        for result, own in made:
            if varies and Replicate() in own:
                yield position, f"%{result.name} is called replicated, but it is made of values that vary"
        for index in range(num_model):
            if wrong := broken_rule(node, graph.mesh, index):
                yield position, wrong


def _wrong_mesh(mesh: Mesh) -> str:
    """Mistake in the axes of a mesh; empty if there is none."""
    num_model = len(model_axes(mesh))
    if model_axes(mesh[:num_model]) != mesh[:num_model]:
        return "has a data axis before a model axis; model axes come first"
    return "has no data axis" if num_model and num_model == len(mesh) else ""


def _unknown_size(kind: Type) -> Dim | None:
    """A size of a sharded tensor that is a symbol; None where all are numbers."""
    if not isinstance(kind, TensorType) or not kind.is_sharded:
        return None
    return next((size for size in kind.shape if not isinstance(simplify(size), int)), None)


def spaces(graph: Graph) -> Iterator[Fault]:
    """Ops that compute read and make values on the device."""
    for position, node in enumerate(graph.nodes):
        if node.op in OPS:
            continue
        for value in (*node.operands, *node.results):
            if isinstance(value.type, TensorType) and value.type.space != DEVICE:
                yield position, f"{node.op} computes on the device, but %{value.name} is {value.type}; reload it first"


def futures(graph: Graph) -> Iterator[Fault]:
    """Every future is waited for exactly once, in its own phase, and read by nothing else."""
    waited = Counter(v.name for n in graph.nodes if n.op == "wait" for v in n.operands)
    for position, node in enumerate(graph.nodes):
        for value in node.operands:
            if isinstance(value.type, TensorType) and value.type.future and node.op != "wait":
                yield position, f"reads the future %{value.name} without waiting for it"
            elif node.op == "wait" and (start := graph.producers.get(value.name)) and start.phase is not node.phase:
                yield position, f"waits in {node.phase.value} for what {start.phase.value} started"
        for result in node.results:
            if not (isinstance(result.type, TensorType) and result.type.future):
                continue
            if node.op not in OPS:
                yield position, f"%{result.name} is called a future, but {node.op} starts nothing"
            if result.name in graph.output_names:
                yield position, f"the future %{result.name} is returned"
            if waited[result.name] != 1:
                yield position, f"the future %{result.name} is waited for {waited[result.name]} times, not once"


def lifetimes(graph: Graph) -> Iterator[Fault]:
    """Nothing reads a released value, or one that shares its memory, after the release."""
    memory, released = Memory(graph), dict[str, str]()
    for position, node in enumerate(graph.nodes):
        for value in node.operands:
            if gone := memory.roots(value.name) & released.keys():
                yield position, f"reads %{value.name}, whose memory was released by {released[min(gone)]}"
        if node.op in OPS and OPS[node.op].consumes:
            released.update({m: f"{node.op}(%{v.name})" for v in node.operands for m in memory.roots(v.name)})
    for output in graph.outputs:
        if output.value is not None and memory.roots(output.value.name) & released.keys():
            yield None, f"returns %{output.value.name}, whose memory was released"


def targets(graph: Graph) -> Iterator[Fault]:
    """A gradient or a new value belongs to an input, has its shape and dtype, or its master's dtype, and on a mesh lies
    as it does."""
    by_name: dict[str, Input] = {i.value.name: i for i in graph.inputs}
    for output in graph.outputs:
        if output.kind is OutputKind.output or output.value is None:
            continue
        if output.target not in by_name:
            yield None, f'returns a {output.kind.value} of "{output.target}", which is no input'
            continue
        entry = by_name[output.target]
        kind, target = output.value.type, entry.value.type
        if not isinstance(kind, TensorType) or not isinstance(target, TensorType):
            continue
        if kind.shape != target.shape or kind.dtype not in (target.dtype, entry.master):
            yield None, f"the {output.kind.value} of %{output.target} is {kind}, but it is {target}"
        elif graph.mesh and (message := _misplaced(output, kind, entry, target, num_data_ranks(graph.mesh) > 1)):
            makers = (p for p, node in enumerate(graph.nodes) if output.value in node.results)
            yield next(makers, None), message


def _misplaced(output: Output, kind: TensorType, entry: Input, target: TensorType, is_sharded: bool) -> str:
    """Mistake in the placement, memory or phase of a parameter's gradient or a buffer's new value; empty if none.

    `is_sharded` says whether there are several data ranks, for which gradients are reduced.
    """
    is_gradient = output.kind is OutputKind.grad and entry.kind is InputKind.param
    if not is_gradient and not (output.kind is OutputKind.mutation and entry.kind is InputKind.buffer):
        return ""
    what = f"the {output.kind.value} of %{output.target} is {kind}"
    if any(isinstance(p, Partial) for p in kind.placement):
        return f"{what}: it is pending, and must be reduced to {target.contiguous(kind.dtype)}"
    if kind.placement != target.placement or (is_gradient and kind.varies):
        return f"{what}, but it must lie as %{output.target} does, which is {target}"
    space = target.space if not is_gradient else HOST if entry.offload else DEVICE
    if kind.space != space:
        return f"{what}, but its {'master' if is_gradient else 'memory'} is the {space}'s"
    due = Phase.update if entry.stage == 1 else Phase.backward
    if is_gradient and entry.stage is not None and output.phase is not due and is_sharded:
        return f"{what} of stage {entry.stage}, and returned in phase {output.phase.value}, not {due.value}"
    return ""


def arenas(graph: Graph) -> Iterator[Fault]:
    """A buffer in an arena dies in the program that made it, overlaps no live buffer, and ends inside the arena."""
    if not graph.arenas and all(node.option("at") is None for node in graph.nodes):
        return
    misplaced = False
    for position, node in enumerate(graph.nodes):
        if (at := node.option("at")) is not None and (wrong := _wrong_offsets(node, at)):
            misplaced = True
            yield position, wrong
    if misplaced:
        return
    laid: dict[Phase, list[Buffer]] = {}
    for program in PROGRAMS:
        laid[program] = found = buffers(graph, program)
        places = {b.name for b in found}
        for position, node in enumerate(graph.nodes):
            for result in node.results if runs_in(node, program) and offsets(node) else ():
                if result.name not in places:
                    yield position, f"%{result.name} outlives its arena, or is nothing that can lie in one"
        for one, other in clashes(found):
            yield other.node, f"lies in the memory of %{one.name}, which is still needed"
    yield from _arena_sizes(graph, laid)


def _wrong_offsets(node: Node, at: Arg) -> str:
    """Mistake in the arena offsets of a node's results; empty if there is none."""
    where = offsets(node)
    if not where or not isinstance(at, tuple) or len(where) != len(at) or len(where) != len(node.results):
        return f"needs an offset for each result, not at={print_arg(at)}"
    if any(offset < 0 or offset % ALIGN_BYTES for offset in where):
        return f"lies at {print_arg(at)}, but in an arena every offset is a multiple of {ALIGN_BYTES} bytes"
    return ""


def _arena_sizes(graph: Graph, laid: Mapping[Phase, list[Buffer]]) -> Iterator[Fault]:
    """Where the arenas are not as large as the graph says."""
    needed = sizes(graph)
    for program, size in graph.arenas.items():
        if program not in needed:
            yield None, f"states an arena of {size:,} bytes for {program.value}, but nothing lies in it"
        elif size > needed[program]:
            yield None, f"states an arena of {size:,} bytes for {program.value}, but {needed[program]:,} are needed"
    for program in needed:
        size = graph.arenas.get(program, 0)
        for buffer in laid[program]:
            if buffer.offset is None or (end := buffer.offset + buffer.num_bytes) <= size:
                continue
            stated = f"which has {size:,}" if size else f"whose size is not stated: arena {program.value}={end}"
            yield buffer.node, f"%{buffer.name} ends at byte {end:,} of the arena, {stated}"


CHECKS: tuple[Callable[[Graph], Iterator[Fault]], ...] = (
    ssa,
    phases,
    known_ops,
    types,
    subgraphs,
    placements,
    orders,
    spaces,
    futures,
    lifetimes,
    targets,
    arenas,
)


def _list(kinds: tuple[object, ...]) -> str:
    return ", ".join(map(str, kinds)) or "nothing"


def describe(graph: Graph, rule: str, position: int | None, message: str) -> str:
    if position is None:
        return f"[{rule}] {message}"
    node = graph.nodes[position]
    lines = [f"[{rule}] {_title(node)} {message}", ""]
    for i in range(max(0, position - 2), min(len(graph.nodes), position + 3)):
        text = print_node(graph.nodes[i], origins=False)
        lines.append(f"  {'>' if i == position else ' '} {text if len(text) <= 160 else text[:157] + '...'}")
    origin = node.origin
    if origin.file:
        lines.append(f"  from {origin.place}" + (f" in {origin.module}" if origin.module else ""))
    if origin.made_by:
        lines.append(f"  put there by the pass {origin.made_by}")
    return "\n".join(lines)


def _title(node: Node) -> str:
    return f"%{node.results[0].name}" if node.results else node.op
