"""Send codes of gradients, and of parameters, in the place of their numbers; what codes leave out, the next step sends.

    bwd %g_mean: f32[64, 32]<S0> = reshard(%g)                     where %g: f32[64, 32]<P(mean)>
->
    bwd %g_mean_code: u8[2, 2056]<S0> = encode(%g, codec="q8(block=256)", feedback=["lin.weight"])
    bwd %g_mean_start: future u8[2, 2056]<S1> = all_to_all_start(%g_mean_code)
    bwd %g_mean_codes: u8[2, 2056]<S1> = wait(%g_mean_start)
    bwd %g_mean: f32[64, 32]<S0> = decode(%g_mean_codes, codec="q8(block=256)", reduce="mean")

Each rank codes its own gradient, with the rest of the step before added, and sends every other rank the part that is
that one's; the owner of a part adds in fp32 what the codes stand for. What every rank keeps whole (stage 0) is coded
once more by its owner, and gathered.

On a mesh of two data axes numbers are summed along the inner one, as within a host, and codes are sent along the outer
one: each rank codes its shard for those that hold the same one.

With feedback, what one step leaves out the next ones send: 1-bit SGD (Seide et al., Interspeech 2014); its two stages,
with the owner of a part as the server: 1-bit Adam (Tang et al., ICML 2021, section 3).

With `gradients=auto` a graph gets the mildest of `AUTO` that hides what is sent about as well as any, and none where
what it saves is less than `LEAST_SAVED` of the step: so predicted, with the time that codes themselves take.

With `parameters`, gathers send codes, too. At stages 1 and 2 all ranks keep the copy of the gather before, and codes
are of the difference from it: what one leaves out is part of the next (EF21: Richtarik et al., 2021).

    fwd %w_full: f32[64, 32]<R> = reshard(%w)                      where %w: f32[64, 32]<S0>
->
    fwd %w_full_code: u8[8240]<S0> = encode(%w, codec="difference(q8(block=256))", copies=["lin.weight"])
    fwd %w_full_start: future u8[8240]<R> =
        all_gather_start(%w_full_code, codec="difference(q8(block=256))", dtype=f32)
    fwd %w_full_codes: u8[8240]<R> = wait(%w_full_start)
    fwd %w_full: f32[64, 32]<R> = decode(%w_full_codes, codec="difference(q8(block=256))", copies=["lin.weight"])

At stage 3 nothing is kept, and codes are of the numbers, in 8 or 4 bits, as the weights of ZeRO++ (Wang et al., 2023):
masters stay as they are, and what a gather rounds is not there in the next.

Values that are no parameter's gradient stay as they are, and so do those whose code would be no smaller, and those of
fewer bytes than `at_least_bytes`, of which the latency counts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar

from zgraph.errors import CodecError, ContractError
from zgraph.ir import (
    Arg,
    Builder,
    DType,
    Graph,
    Node,
    OutputKind,
    Phase,
    Replicate,
    Shard,
    TensorType,
    Value,
    Varying,
    model_axes,
    num_data_ranks,
    num_shards,
)
from zgraph.ir.codecs import LOSSY, Q2, Codec, Difference, Raw, Sign, TopK, parse_codec
from zgraph.ir.coded_rules import CODED, outer_numel
from zgraph.ir.layout import bucket_layout
from zgraph.ir.ops import padded_bytes
from zgraph.passes.analysis import coded_gathers
from zgraph.passes.analysis.lookahead import times_with
from zgraph.passes.analysis.lowering import reduces
from zgraph.passes.core.base import Context, Numerics, Pass

AUTO = ("q8(block=256)", "q4(block=128)")
"""Codecs that `auto` chooses from, the mildest first."""

LEAST_SAVED = 0.05
"""Share of a step that codes must save to be chosen."""

ABOUT_AS_GOOD = 0.02
"""Share of a step that a milder codec may take longer than the best."""

_CARRIES = frozenset({"cast", "copy", "reshard", "wait", "offload_start"})
"""Ops between what was reduced and the gradient that the graph returns."""


@dataclass(frozen=True)
class Compress(Pass):
    """Send codes of gradients and parameters for their numbers, and what codes leave out with the next step.

    Args:
        gradients: the codec, `auto` or `none`.
        parameters: the codec, or `none`. What is gathered again for the backward is coded by `q8` or `q4` alone.
        at_least_bytes: values of fewer bytes, all members of a bucket together, are sent as they are.
    """

    gradients: str = field(default="q8(block=256)", metadata={"always_printed": True})
    at_least_bytes: int = 1024
    parameters: str = "none"

    name: ClassVar[str] = "compress"
    numerics: ClassVar[Numerics] = Numerics.approximate
    requires: ClassVar[frozenset[str]] = frozenset({"placed"})
    provides: ClassVar[frozenset[str]] = frozenset({"lowered"})

    def __post_init__(self) -> None:
        for option in ("gradients", "parameters"):
            text = getattr(self, option)
            if text == "none" or (text == "auto" and option == "gradients"):
                continue
            try:
                codec = parse_codec(text)
            except CodecError as error:
                raise ValueError(str(error).splitlines()[0]) from None
            if codec.name not in LOSSY and codec.name != Raw.name:
                raise ValueError(f"{option} must be coded by {', '.join(LOSSY)}, not by {codec.name}")
            object.__setattr__(self, option, str(codec))

    @property
    def copied(self) -> tuple[DType, ...]:
        """Dtypes of the parameters of which all ranks keep copies."""
        return () if self.parameters == "none" else Difference.dtypes

    def times_us(self, graph: Graph, context: Context) -> dict[str, float]:
        """Predicted times of a step, with each codec of `auto` and with none, whose text is empty."""
        return times_with(replace(self, parameters="none"), "gradients", AUTO, graph, context)

    @staticmethod
    def chosen(times_us: Mapping[str, float]) -> str:
        """The codec that `auto` takes, with these times; empty for none."""
        best = min(times_us.values())
        if times_us[""] * (1 - LEAST_SAVED) <= best:
            return ""
        return next(text for text in AUTO if times_us[text] <= best * (1 + ABOUT_AS_GOOD))

    @property
    def codec(self) -> Codec:
        """The codec of gradients."""
        return parse_codec(self.gradients)

    def run(self, graph: Graph, context: Context) -> Graph:
        if num_data_ranks(graph.mesh) == 1:
            return graph
        if model_axes(graph.mesh) or len(graph.mesh) > 2:
            raise ContractError(
                "compress codes gradients along one or two data axes of ranks, and the mesh has "
                f"{', '.join(a.name for a in graph.mesh)}; leave compress out of the recipe, or take such a mesh"
            )
        if self.gradients == "auto":
            found = self.chosen(self.times_us(graph, context))
            return replace(self, gradients=found or "none").run(graph, context)
        builder = Builder(graph, self.name)
        nodes: list[Node] = []
        for node in graph.nodes:
            if names := self.targets(graph, node):
                nodes += _coded(node, names, self.gradients, builder)
            elif gather := self.gathered(graph, node):
                nodes += coded_gathers.coded(node, *gather, builder)
            else:
                nodes.append(node)
        return graph.with_nodes(nodes)

    def gathered(self, graph: Graph, node: Node) -> tuple[Codec, list[str]] | None:
        """The codec of what a reshard gathers, and the parameters, if it is to send codes.

        Raises:
            ContractError: what is gathered again for the backward would be coded by what needs the copy before.
        """
        if self.parameters == "none":
            return None
        codec = parse_codec(self.parameters)
        for coding in (Difference(codec), codec):
            if names := coded_gathers.targets(graph, node, coding, self.at_least_bytes):
                if isinstance(coding, Q2 | Sign | TopK):
                    raise ContractError(
                        f"{codec} codes what changed in a parameter that all ranks still have (stages 1 and 2), and "
                        f"{names[0]} is gathered again for the backward; take q8 or q4, or stage 2"
                    )
                return coding, names
        return None

    def targets(self, graph: Graph, node: Node) -> tuple[str, ...]:
        """The parameters whose gradients a reshard reduces, if it is to send codes; else none."""
        if self.gradients == "none" or not (
            reduces(node, Shard(0), "sum", "mean") or reduces(node, Replicate(), "sum", "mean")
        ):
            return ()
        kinds = [v.tensor for v in node.operands]
        found = tuple(_target(graph, r) for r in node.results)
        is_coded = all(found) and len(set(found)) == len(found) and kinds[0].dtype in CODED
        is_coded = is_coded and len({*kinds[0].placement}) == 1  # along each data axis in the same way
        if not is_coded or sum(padded_bytes(k, graph.num_shards) for k in kinds) < self.at_least_bytes:
            return ()
        part = TensorType(kinds[0].dtype, (graph.num_shards * bucket_layout(kinds, graph.num_shards).part_numel,))
        numel = outer_numel(part, graph.mesh)
        if self.codec.num_bytes(numel, part.dtype) >= numel * part.dtype.itemsize:
            return ()
        return found


def _target(graph: Graph, value: Value) -> str:
    """The name in the model of the only parameter whose gradient a value becomes; empty if it is none's."""
    names = {i.value.name: i.target for i in graph.params}
    found: set[str] = set()
    waiting = [value.name]
    while waiting:
        name = waiting.pop()
        found |= {
            names.get(o.target, "") if o.kind is OutputKind.grad else ""
            for o in graph.outputs
            if o.value is not None and o.value.name == name
        }
        for user in (graph.nodes[p] for p in graph.users.get(name, ())):
            if user.op in _CARRIES and user.phase is not Phase.forward:
                index = next(i for i, v in enumerate(user.operands) if v.name == name)
                waiting.append(user.results[index].name)
            else:
                found.add("")
    return found.pop() if len(found) == 1 else ""


def _coded(node: Node, targets: tuple[str, ...], codec: str, builder: Builder) -> Iterator[Node]:
    """The nodes in the place of a reshard that reduces gradients."""
    stem, phase, origin = node.name, node.phase, node.origin
    is_bucket, source = len(node.operands) > 1, node.operands[0]
    if is_bucket:
        yield (packed := builder.node("pack", node.args, f"{stem}_pack", phase, origin))
        source = packed.results[0]
    feedback: dict[str, Arg] = {"codec": codec, "feedback": targets}
    if len(builder.mesh) > 1:
        yield from _coded_outside(node, source, feedback, builder)
        return
    yield (own := builder.node("encode", (source,), f"{stem}_code", phase, origin, **feedback))
    yield (start := builder.node("all_to_all_start", own.results, f"{stem}_start", phase, origin))
    yield (codes := builder.node("wait", start.results, f"{stem}_codes", phase, origin))
    shape, result = source.tensor.contiguous(), node.results[0]
    ends_here = result.tensor.is_sharded and not is_bucket
    part = result if ends_here else builder.value(f"{stem}_part", shape.at(Shard(0)))
    yield builder.typed("decode", codes.results, (part,), phase, origin, codec=codec, reduce=shape.reduction)
    if not result.tensor.is_sharded:
        yield (own := builder.node("encode", (part,), f"{stem}_part_code", phase, origin, **feedback))
        yield (start := builder.node("all_gather_start", own.results, f"{stem}_part_start", phase, origin))
        yield (codes := builder.node("wait", start.results, f"{stem}_part_codes", phase, origin))
        part = builder.value(f"{stem}_flat", shape.at(Replicate())) if is_bucket else result
        yield builder.typed("decode", codes.results, (part,), phase, origin, codec=codec)
    if is_bucket:
        yield builder.typed("unpack", (part,), node.results, phase, origin)


def _coded_outside(node: Node, source: Value, feedback: dict[str, Arg], builder: Builder) -> Iterator[Node]:
    """The nodes in the place of a reshard that reduces gradients over two axes: sums along the inner one, and codes
    along the outer one."""
    stem, phase, origin, mesh = node.name, node.phase, node.origin, builder.mesh
    result, reduction = node.results[0], source.tensor.reduction
    coding = {"codec": feedback["codec"]}
    yield (start := builder.node("inner_reduce_scatter_start", (source,), f"{stem}_inner_start", phase, origin))
    yield (inner := builder.node("wait", start.results, f"{stem}_inner", phase, origin))
    yield (own := builder.node("encode", inner.results, f"{stem}_code", phase, origin, **feedback))
    yield (start := builder.node("outer_all_to_all_start", own.results, f"{stem}_start", phase, origin))
    yield (codes := builder.node("wait", start.results, f"{stem}_codes", phase, origin))
    shard = inner.results[0].tensor
    numel = num_shards(mesh) * outer_numel(shard, mesh)
    part = builder.value(f"{stem}_part", TensorType(shard.dtype, (numel,), placement=(Varying(), Shard(0))))
    yield builder.typed("decode", codes.results, (part,), phase, origin, **coding, reduce=reduction)
    yield (own := builder.node("encode", (part,), f"{stem}_part_code", phase, origin, **feedback))
    yield (start := builder.node("outer_all_gather_start", own.results, f"{stem}_part_start", phase, origin))
    yield (codes := builder.node("wait", start.results, f"{stem}_part_codes", phase, origin))
    is_bucket, is_whole = len(node.operands) > 1, not result.tensor.is_sharded
    reduced = result if not is_bucket and not is_whole else builder.value(f"{stem}_shard", shard.reduced())
    yield builder.typed("decode", codes.results, (reduced,), phase, origin, **coding)
    if is_whole:
        yield (start := builder.node("all_gather_start", (reduced,), f"{stem}_whole_start", phase, origin))
        whole = result if not is_bucket else builder.value(f"{stem}_whole", start.results[0].tensor.delivered())
        yield builder.typed("wait", start.results, (whole,), phase, origin)
        reduced = whole
    if is_bucket:
        yield builder.typed("unpack", (reduced,), node.results, phase, origin)
