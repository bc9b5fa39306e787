"""The meaning of a graph as terms over the captured ops, hash-consed: equal terms are equal numbers, for all inputs.

A term is a number in a table of keys; a key holds an op, its constants, and the terms of its operands. Axioms say what
zgraph's own ops do to a value:

    wait(start x) = x                      gather(shards of x) = x             unpack_i(pack(x_0, ...)) = x_i
    reload(offload x) = x                  copy(x) = x                         cast(x, its own dtype) = x
    to_float8(x) = float8_cast(x, s), s where s = float8_scale(amax(x))
    decode(encode(x)) = x                  decode(exchange(encode(x))) = reduction of x, but for what the codec rounds
    pending(x) = x                         reduction of x = mean(x), sum(x) or root(x), as the type of x says

Along a model axis, parts of a value, a partial sum and the whole are one term, and an op on parts is the op on the
whole that its sharding rule says it is (`zgraph.ir.rules`): whether it may compute on such parts is for the verifier to
say. An op that has a definition is read as that (`zgraph.ir.rules.definitions`).

A term says nothing of where a value is: that is in its type, which `zgraph.ir.verifier` checks. Ops that draw random
numbers take the state of the generator as an operand and leave another, so that neither their number nor their order
can change. What shares memory with what is written to reads as another term afterwards. Casts and gathers commute, as
a term has no placement.

Value numbering: Alpern, Wegman, Zadeck, "Detecting equality of variables in programs", POPL 1988. Translation
validation: Pnueli, Siegel, Singerman, TACAS 1998.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import repeat

from zgraph.ir import (
    OPS,
    Arg,
    DType,
    ExternalOp,
    Graph,
    Input,
    InputKind,
    Node,
    Phase,
    TensorType,
    Value,
    fingerprint,
    model_axes,
)
from zgraph.ir.aliases import Aliases
from zgraph.ir.axis_rules import changed_axis, collective
from zgraph.ir.coded_rules import coded_rows
from zgraph.ir.external_ops import FLOAT8, facts
from zgraph.ir.ops import transfer, views
from zgraph.ir.rules import PARTS, ROUTED, meant, whole_node
from zgraph.ir.rules.definitions import defined

ZERO = 0
"""The term of a tangent that is zero, and of all that only carries it."""

_RANKED = frozenset(PARTS.values())

_SAME = frozenset({"wait", "copy", "release", "pending", "slice", "first_rank"})


class Terms:
    """A table of terms that several graphs share, so that equal terms are equal numbers."""

    def __init__(self) -> None:
        self._numbers: dict[Hashable, int] = {("zero",): ZERO}
        self._calls: dict[int, tuple[Node, int]] = {}

    def call(self, node: Node) -> int:
        """The number of an op with its constants: what is left of a node without its operands."""
        known = self._calls.get(id(node))
        if known is not None:
            return known[1]
        args = tuple(constant(a, repeat("%")) for a in node.args)
        kwargs = tuple((name, constant(a, repeat("%"))) for name, a in node.kwargs)
        number = self.of("call", node.op, args, kwargs)
        self._calls[id(node)] = node, number  # the node stays, so that no other has its id
        return number

    def of(self, *key: Hashable) -> int:
        """The number of the term with this key."""
        return self._numbers.setdefault(key, len(self._numbers))

    def param(self, target: str, at_rest: DType, dtype: DType) -> int:
        """A parameter in a dtype, made of its master in another."""
        return self.cast(self.of("param", target), at_rest, dtype)

    def cast(self, term: int, old: DType, new: DType) -> int:
        """A value in another dtype."""
        return term if old is new or term == ZERO else self.of("cast", new.value, term)

    def reduced(self, how: str, term: int) -> int:
        """A value of each rank's own as what all ranks have of it together."""
        return self.of(how, term)


@dataclass
class Meaning:
    """Meaning of a graph: the terms of all that it computes.

    Args:
        terms: of each value, when it was made.
        outputs: of each output; None where there is none.
        sent: the collectives: kind, phase, and the term of each value that they move.
        effects: the state that random, writing and opaque ops leave behind in the end.
    """

    terms: dict[str, int] = field(default_factory=dict)
    outputs: list[int | None] = field(default_factory=list)
    sent: list[tuple[str, Phase, int]] = field(default_factory=list)
    effects: int = ZERO


def meaning(
    graph: Graph,
    terms: Terms,
    masters: Mapping[str, DType],
    zeros: frozenset[str] = frozenset(),
    *,
    unsynced: bool = False,
) -> Meaning:
    """Meaning of a graph, in terms of its inputs.

    Args:
        graph: before or after any pass.
        terms: the table.
        masters: the dtype of each parameter's master, by the parameter's name in the model.
        zeros: tangents that are taken as zero.
        unsynced: an `accumulate` adds nothing of earlier micro-steps.
    """
    return Reader(graph, terms, masters, zeros, unsynced).run()


class Reader:
    """Walks a graph in order."""

    def __init__(
        self, graph: Graph, terms: Terms, masters: Mapping[str, DType], zeros: frozenset[str], unsynced: bool
    ) -> None:
        self.graph, self.table, self.masters, self.zero_tangents, self.unsynced = graph, terms, masters, zeros, unsynced
        self.found = Meaning()
        self.dtypes: dict[int, DType] = {}
        self.buckets: dict[int, tuple[tuple[int, Hashable], ...]] = {}
        self.codes: dict[int, tuple[int, Hashable, str]] = {}
        self.within: dict[int, int] = {}
        self.largest: dict[int, int] = {}
        self.aliases = Aliases(graph)
        self.written: dict[str, int] = {}
        self.seen: dict[str, int] = {}
        self.state = terms.of("effects")
        self.num_defined = 0

    def run(self) -> Meaning:
        terms = self.found.terms
        for entry in self.graph.inputs:
            terms[entry.value.name] = self.entry(entry)
        has_writes = any(row.writes for row in self.graph.foreign.values())
        for node in self.graph.nodes:
            for result, term in zip(node.results, self.node(node), strict=True):
                terms[result.name] = term
            if has_writes:
                self.remember(node)
        self.found.outputs = [None if o.value is None else self.read(o.value.name) for o in self.graph.outputs]
        self.found.effects = self.state
        return self.found

    def entry(self, entry: Input) -> int:
        name, kind = entry.value.name, entry.value.type
        if name in self.zero_tangents:
            return ZERO
        if entry.kind is InputKind.param and isinstance(kind, TensorType):
            return self.table.param(entry.target, self.masters.get(entry.target, kind.dtype), kind.dtype)
        return self.table.of("input", entry.kind.value, name, entry.target)

    def read(self, name: str) -> int:
        """Term of a value now: another than when it was made, if its memory was written to since."""
        term = self.found.terms[name]
        if not self.written:
            return term
        made = self.seen.get(name, 0)
        since = sorted({w for root in self.aliases.roots(name) if (w := self.written.get(root)) and w != made})
        return self.table.of("written", term, *since) if since else term

    def remember(self, node: Node) -> None:
        """Which memory the results share, and what the node wrote to."""
        self.aliases.add(node)
        for result in node.results:
            for root in self.aliases.roots(result.name):
                if root in self.written:
                    self.seen[result.name] = self.written[root]
        row = self.graph.foreign.get(node.op)
        if row is None or not row.writes:
            return
        mark = self.state
        for position in row.writes:
            arg = node.args[position] if position < len(node.args) else None
            if isinstance(arg, Value):
                self.written.update(dict.fromkeys(self.aliases.roots(arg.name), mark))
        for result in node.results:
            self.seen[result.name] = mark

    # --- nodes -------------------------------------------------------------------------------------------------

    def node(self, node: Node) -> Sequence[int]:
        operands = [self.read(v.name) for v in node.operands]
        if node.op in ROUTED.values():
            return self.routed(node, operands)
        if node.op in _RANKED:
            return self.foreign(meant(node), operands)
        return self.own(node, operands) if node.op in OPS else self.foreign(node, operands)

    def own(self, node: Node, operands: list[int]) -> Sequence[int]:
        op, table = node.op, self.table
        if op == "release":
            return ()
        is_exchange = op == "outer_all_to_all_start" or (op == "all_to_all_start" and node.option("axis") is None)
        if op in ("encode", "decode") or is_exchange:
            return (self.coded(node, operands[0]),)
        if op == "inner_reduce_scatter_start":
            made = table.of("within", str(node.operands[0].tensor.reduction), operands[0])
            self.within[made] = operands[0]
            return (made,)
        if op in ("all_gather_start", "outer_all_gather_start") and operands[0] in self.codes:
            if node.option("codec") is not None:
                self.changed(node, "gather", self.codes[operands[0]][0])
            return operands
        if op == "all_gather_start" and self.is_reduced_by_codes(node):
            return operands
        if op == "reshard" or _is_meant(node):
            return [self.moved(node, v, r, t) for v, r, t in zip(node.operands, node.results, operands, strict=True)]
        if op in _SAME:
            return operands
        if op == "cast":
            kind, dtype = node.operands[0].tensor, node.option("dtype")
            assert isinstance(dtype, DType)
            return (table.cast(operands[0], kind.dtype, dtype),)
        if op == "pack":
            members = tuple(zip(operands, (_laid(v) for v in node.operands), strict=True))
            term = table.of("pack", *members)
            self.buckets[term] = members
            return (term,)
        if op == "unpack":
            return self.unpacked(node, operands[0])
        if op in ("amax", "float8_scale", "float8_cast"):
            return (self.in_float8(node, operands),)
        if op == "accumulate":
            return (operands[0] if self.unsynced else table.of("sum", str(node.option("target")), operands[0]),)
        if OPS[op].lane != "compute":
            self.found.sent += [(op, node.phase, term) for term in operands]
        return [table.of(op, i, *operands, str(node.kwargs)) for i in range(len(node.results))]

    def is_reduced_by_codes(self, gather: Node) -> bool:
        """Whether a gather only makes shards whole that codes have reduced: that is the end of one reduction."""
        maker = self.graph.producers.get(gather.operands[0].name)
        return maker is not None and maker.op == "decode" and gather.operands[0].tensor.is_sharded

    def routed(self, node: Node, operands: list[int]) -> Sequence[int]:
        """Term of rows that are looked up, or added, on other ranks: that of the op on the whole."""
        made = self.foreign(meant(node), operands[:-1])
        self.found.sent.append((node.op, node.phase, made[0]))
        return made

    def moved(self, node: Node, value: Value, result: Value, term: int) -> int:
        """Term of a value after a collective, or after a reshard that will become one."""
        old, new = value.tensor, result.tensor
        if (index := changed_axis(old, new, self.graph.mesh)) is not None:
            how = collective(old.placement[index], new.placement[index])
            self.found.sent += [(how, node.phase, term)] if how.endswith("_start") else []
            return term
        if old.placement == new.placement:
            if old.space != new.space:
                self.found.sent.append(("copy", node.phase, term))
            return term
        return self.changed(node, "gather" if old.is_sharded else old.reduction or "unknown", term)

    def changed(self, node: Node, how: str, term: int) -> int:
        """Term of a value that a collective of this kind has gathered or reduced; of a bucket, each member's."""
        members = self.buckets.get(term)
        self.found.sent += [(how, node.phase, one) for one in ([m for m, _ in members] if members else [term])]
        if how == "gather":
            return term
        if members is None:
            return self.table.reduced(how, term)
        made = tuple((self.table.reduced(how, one), laid) for one, laid in members)
        bucket = self.table.of("pack", *made)
        self.buckets[bucket] = made
        return bucket

    def coded(self, node: Node, term: int) -> int:
        """Term of codes, of codes that are exchanged, or of the numbers that codes stand for.

        Codes of a value are told from the value, so that only what was coded by the same codec is decoded, and only
        what was exchanged is reduced.
        """
        table, codec = self.table, f"{node.option('codec')} {node.option('copies')}"
        if node.op.endswith("all_to_all_start"):
            code = self.codes.get(term)
            made = table.of("exchanged", term)
            if code is not None and code[2] == "own":
                self.codes[made] = (code[0], code[1], "exchanged")
            return made
        if node.op == "encode":
            kind = node.operands[0].tensor
            pending, laid = kind.reduction, coded_rows(kind, self.graph.mesh, of_shard=kind.reduction is not None)
            made = table.of("coded", codec, pending, term, laid)
            self.codes[made] = (term, (codec, pending, laid), "own" if pending else "part")
            return made
        reduce = node.option("reduce")
        laid = coded_rows(node.results[0].tensor, self.graph.mesh, of_shard=reduce is None)
        is_whole = self.codes.get(term, ())[1:] == ((codec, reduce, laid), "exchanged" if reduce else "part")
        if not is_whole:
            return table.of("decoded", codec, str(reduce), term)
        source = self.codes[term][0]
        source = self.within.get(source, source) if reduce else source
        return self.changed(node, str(reduce), source) if reduce else source

    def in_float8(self, node: Node, operands: list[int]) -> int:
        """Term of a part in float8, and of what it is scaled with: those of the whole, if the scale is the whole's."""
        table = self.table
        if node.op == "amax":
            made = table.of("amax", operands[0])
            self.largest[made] = operands[0]
            return made
        call = table.of("call", FLOAT8, ("%", constant(node.option("dtype"), iter(())), None), ())
        if node.op == "float8_scale":
            source = self.largest.get(operands[0])
            return table.of("scale", *operands, call) if source is None else table.of(1, (call, source))
        value, scale = operands
        is_its_own = scale == table.of(1, (call, value))
        return table.of(0, (call, value)) if is_its_own else table.of("part in float8", call, value, scale)

    def unpacked(self, node: Node, bucket: int) -> Sequence[int]:
        members = self.buckets.get(bucket)
        laid = [_laid(r) for r in node.results]
        if members is not None and [m for _, m in members] == laid:
            return [term for term, _ in members]
        return [self.table.of("unpack", i, bucket, *laid) for i in range(len(node.results))]

    def foreign(self, node: Node, operands: list[int]) -> Sequence[int]:
        unknown = ExternalOp(opaque=not node.op.startswith("aten."))  # of an op that another stands for
        row = self.graph.foreign.get(node.op, unknown)
        for index in reversed(range(len(model_axes(self.graph.mesh)))):
            node = whole_node(node, index, self.graph.mesh[index].size)
        if ZERO in operands and (zero := self.carried(node, operands)) is not None:
            return zero
        if steps := defined(node, self.fresh):
            return self.defined(node, steps, operands)
        is_one = len(operands) == 1 and node.operands[0].type == node.results[0].type
        if is_one and facts(node.op).elements == "itself":
            return operands
        key: tuple[Hashable, ...] = (self.table.call(node), *operands)
        if not row.is_pure:
            self.state = self.table.of("state", self.state, key)
            key = (self.state, *key)
        if len(node.results) == 1:
            return (self.table.of(key),)
        return [self.table.of(i, key) for i in range(len(node.results))]

    def defined(self, node: Node, steps: Sequence[Node], operands: list[int]) -> Sequence[int]:
        """The term of a node by its definition."""
        known = dict(zip((v.name for v in node.operands), operands, strict=True))
        for step in steps:
            made = self.foreign(step, [known[v.name] for v in step.operands])
            known.update(zip((r.name for r in step.results), made, strict=True))
        return [known[r.name] for r in node.results]

    def fresh(self, stem: str) -> str:
        """A name in a definition."""
        self.num_defined += 1
        return f"{stem} {self.num_defined}"

    def carried(self, node: Node, operands: list[int]) -> Sequence[int] | None:
        """The results of a node that reads a zero, where they follow from that; None where they do not."""
        zero = facts(node.op).zero
        if zero == "all" and not node.kwargs and len(operands) == 2:
            other = operands[operands[0] == ZERO]
            kept = node.operands[operands[0] == ZERO]
            return (other,) if other == ZERO or kept.type == node.results[0].type else None
        if zero == "any" or (operands[0] == ZERO and (zero == "first" or views(self.graph, node))):
            return [ZERO] * len(node.results)
        return None


def _is_meant(node: Node) -> bool:
    """Whether the axioms say what a start does to a value: a copy nothing, a reduction what its type says."""
    moves = transfer(node)
    return moves is not None and (OPS[node.op].lane != "comm" or moves.brings or moves.reduces or moves.exchanges)


def constant(arg: Arg, values: Iterator[Hashable]) -> Hashable:
    """An argument in a key: values as what comes next of `values`, numbers told apart by their type."""
    match arg:
        case Value():
            return next(values)
        case tuple():
            return ("list", *(constant(a, values) for a in arg))
        case bool() | int():
            return (type(arg).__name__, arg)
        case float():
            return ("float", arg.hex())
        case str():
            return ("str", arg)
        case Graph():
            return ("graph", fingerprint(arg))
    return arg


def _laid(value: Value) -> Hashable:
    """How a member lies in a bucket."""
    return value.tensor.dtype.value, tuple(map(str, value.tensor.shape))
