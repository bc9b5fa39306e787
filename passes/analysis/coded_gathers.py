"""Gathers of parameters that send codes: which of them can, and the nodes in their place."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from zgraph.ir import Arg, Builder, Graph, Node, Replicate, Shard
from zgraph.ir.codecs import Codec, Difference, Sized
from zgraph.ir.coded_rules import CODED
from zgraph.ir.ops import padded_bytes
from zgraph.passes.analysis.gathers import gathered, is_gather
from zgraph.passes.analysis.lowering import placement_change


def targets(graph: Graph, node: Node, codec: Codec, at_least_bytes: int) -> list[str]:
    """The parameters that a reshard gathers, if it can gather their codes; else none.

    Args:
        graph: the graph.
        node: any node of it.
        codec: whose codes; one of changes is for what all ranks still have from the gather before, and others are not.
        at_least_bytes: values of fewer bytes, all members of a bucket together, are sent as they are.
    """
    if placement_change(node) != (Shard(0), Replicate()) or not is_gather(graph, node):
        return []
    kinds = [v.tensor for v in node.operands]
    if any(k.is_on_host or r.tensor.is_on_host for k, r in zip(kinds, node.results, strict=True)):
        return []
    dtypes = codec.dtypes if isinstance(codec, Sized) else CODED
    if kinds[0].dtype not in dtypes or sum(padded_bytes(k, graph.num_shards) for k in kinds) < at_least_bytes:
        return []
    if is_of_changes(codec) != bool(node.option("keep")):
        return []
    names = {i.value.name: i.target for i in graph.params}
    return [names[gathered(graph, replace(node, args=(v,)))] for v in node.operands]


def is_of_changes(codec: Codec) -> bool:
    """Whether codes are of what changed since the copy that all ranks still have."""
    return isinstance(codec, Sized) and codec.changes


def coded(node: Node, codec: Codec, names: list[str], builder: Builder) -> Iterator[Node]:
    """The nodes in the place of a reshard that gathers parameters.

    Args:
        node: the reshard.
        codec: whose codes are gathered.
        names: of the parameters, as `targets` has them.
        builder: of the graph.
    """
    stem, phase, origin = node.name, node.phase, node.origin
    is_bucket, source = len(node.operands) > 1, node.operands[0]
    if is_bucket:
        yield (packed := builder.node("pack", node.args, f"{stem}_pack", phase, origin))
        source = packed.results[0]
    options: dict[str, Arg] = {"codec": str(codec)}
    sent: dict[str, Arg] = options | ({"dtype": source.tensor.dtype} if isinstance(codec, Difference) else {})
    copies: dict[str, Arg] = {"copies": tuple(names)} if is_of_changes(codec) else {}
    yield (own := builder.node("encode", (source,), f"{stem}_code", phase, origin, **options, **copies))
    yield (start := builder.node("all_gather_start", own.results, f"{stem}_start", phase, origin, **sent))
    yield (codes := builder.node("wait", start.results, f"{stem}_codes", phase, origin))
    kind = source.tensor.contiguous()
    whole = builder.value(f"{stem}_flat", kind.at(*kind.placement[:-1], Replicate())) if is_bucket else node.results[0]
    yield builder.typed("decode", codes.results, (whole,), phase, origin, **options, **copies)
    if is_bucket:
        yield builder.typed("unpack", (whole,), node.results, phase, origin)
