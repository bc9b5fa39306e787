"""Gather weights in float8 where only products in float8 read them: half of the bytes of bf16, a quarter of fp32.

    fwd %w_full: bf16[64, 32]<R> = reshard(%w)                                      where %w: bf16[64, 32]<S0>
    fwd %w_f8: f8e4m3[64, 32]<R>, %w_scale: f32[]<R> = zgraph.to_float8.default(%w_full, f8e4m3, none)
->
    fwd %w_amax: f32[2]<S0> = amax(%w)                                              at the beginning of the forward
    fwd %w_amaxes: f32[2]<R> = reshard(%w_amax)                                     for all such weights at once
    fwd %w_scale: f32[]<R> = float8_scale(%w_amaxes, dtype=f8e4m3)
    fwd %w_f8_part: f8e4m3[64, 32]<S0> = float8_cast(%w, %w_scale, dtype=f8e4m3)
    fwd %w_f8: f8e4m3[64, 32]<R> = reshard(%w_f8_part)

The scale of the whole is that of the largest of its parts, so that numbers are the same to the last bit. torchao's
`enable_fsdp_float8_all_gather` moves float8 in the same way, with scales from an all-reduce. A member of a bucket
leaves it for one of float8. Scales by rows or columns are not of a part, and rowwise stays as it is.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

from zgraph.ir import Arg, Builder, Graph, Node, Phase, Replicate, Shard, Value, model_axes
from zgraph.ir.external_ops import FLOAT8
from zgraph.passes.analysis.gathers import casts_before
from zgraph.passes.analysis.lowering import placement_change
from zgraph.passes.core.base import Context, Pass
from zgraph.passes.dce import DeadCode


@dataclass(frozen=True)
class Float8Gathers(Pass):
    """Gather weights in float8 where only products in float8 read them."""

    name: ClassVar[str] = "float8-gathers"
    requires: ClassVar[frozenset[str]] = frozenset({"placed"})
    conflicts: ClassVar[frozenset[str]] = frozenset({"lowered"})

    def run(self, graph: Graph, context: Context) -> Graph:
        if model_axes(graph.mesh):
            return graph
        chosen = {r.name: casts for node in graph.nodes for r, casts in _eligible(graph, node)}
        if not chosen:
            return graph
        return DeadCode().run(_Rewriter(graph, chosen).run(), context)


def _eligible(graph: Graph, node: Node) -> Iterator[tuple[Value, list[Node]]]:
    """The results of a gather that can be moved in float8, and the casts to it that they are read by."""
    if placement_change(node) != (Shard(0), Replicate()):
        return
    for operand, result in zip(node.operands, node.results, strict=True):
        readers = [reader for reader in graph.readers(result) if reader.op != "release"]
        casts = [r for r in readers if r.op == FLOAT8 and r.args[2] is None]
        is_here = not operand.tensor.is_on_host and not result.tensor.is_on_host
        is_alike = len({r.args[1] for r in casts}) == 1 and len(casts) == len(readers)
        if is_here and is_alike and result.name not in graph.output_names and _parameter(graph, operand):
            yield result, casts


def _parameter(graph: Graph, value: Value) -> str:
    """The parameter that a shard is of, or is a cast of; empty if it is none's."""
    casts = casts_before(graph, Node("reshard", (value,), ()))
    source = graph.producers[casts[-1]].operands[0].name if casts else value.name
    return source if source in graph.param_names else ""


class _Rewriter:
    """One run of the pass."""

    def __init__(self, graph: Graph, chosen: dict[str, list[Node]]) -> None:
        self.graph, self.chosen = graph, chosen
        self.builder = Builder(graph, Float8Gathers.name)
        self.first: list[Node] = []
        self.renamed: dict[str, Value] = {}
        self.scales: dict[tuple[str, Arg], Value] = {}

    def run(self) -> Graph:
        gone = {cast.name for casts in self.chosen.values() for cast in casts}
        self.amaxes()
        nodes = list(self.first)
        for node in self.graph.nodes:
            if any(r.name in self.chosen for r in node.results):
                nodes += self.gather(node)
            elif node.name not in gone:
                nodes.append(node.substitute(self.renamed))
        outputs = tuple(output.substitute(self.renamed) for output in self.graph.outputs)
        return replace(self.graph, nodes=tuple(nodes), outputs=outputs).with_used_ops()

    def amaxes(self) -> None:
        """The largest magnitude of each weight's parts on all ranks, and the scales that they give: one gather, or one
        more of those that are kept over micro-steps."""
        wanted: dict[bool, dict[tuple[str, Arg], tuple[Value, Node]]] = {True: {}, False: {}}
        for node in self.graph.nodes:
            for operand, result in zip(node.operands, node.results, strict=False):
                if result.name in self.chosen:
                    key = _parameter(self.graph, operand), self.dtype(result)
                    if not any(key in found for found in wanted.values()):
                        wanted[bool(node.option("keep"))][key] = operand, node
        for keeps, found in wanted.items():
            parts = {key: self.amax(operand, node) for key, (operand, node) in found.items()}
            if not parts:
                continue
            results = tuple(
                self.builder.value(f"{part.name}es", part.tensor.at(*part.tensor.placement[:-1], Replicate()))
                for part in parts.values()
            )
            origin = next(iter(found.values()))[1].origin
            options: dict[str, Arg] = {"keep": True} if keeps else {}
            self.first.append(
                self.builder.typed("reshard", tuple(parts.values()), results, Phase.forward, origin, **options)
            )
            for key, amaxes in zip(parts, results, strict=True):
                made = self.builder.node(
                    "float8_scale", (amaxes,), f"{key[0]}_scale", Phase.forward, origin, dtype=key[1]
                )
                self.first.append(made)
                self.scales[key] = made.results[0]

    def amax(self, operand: Value, node: Node) -> Value:
        """The largest magnitude of this rank's part, with the casts before it again, so that these need not wait."""
        value, origin = operand, node.origin
        for name in reversed(casts_before(self.graph, Node("reshard", (operand,), ()))):
            cast = self.graph.producers[name]
            source = cast.operands[0] if value is operand else value
            options = dict(cast.kwargs)
            self.first.append(self.builder.node("cast", (source,), f"{name}_early", Phase.forward, origin, **options))
            value = self.first[-1].results[0]
        self.first.append(self.builder.node("amax", (value,), f"{value.name}_amax", Phase.forward, origin))
        return self.first[-1].results[0]

    def gather(self, node: Node) -> Iterator[Node]:
        """A gather in the place of one: what stays as it is, and what is moved in float8."""
        pairs = list(zip(node.operands, node.results, strict=True))
        rest = [pair for pair in pairs if pair[1].name not in self.chosen]
        if rest:
            yield replace(node, args=tuple(v for v, _ in rest), results=tuple(r for _, r in rest))
        parts, wholes = list[Value](), list[Value]()
        for operand, result in pairs:
            if result.name not in self.chosen:
                continue
            casts, dtype = self.chosen[result.name], self.dtype(result)
            scale = self.scales[_parameter(self.graph, operand), dtype]
            stem = casts[0].name
            made = self.builder.node(
                "float8_cast", (operand, scale), f"{stem}_part", node.phase, node.origin, dtype=dtype
            )
            yield made
            parts.append(made.results[0])
            wholes.append(casts[0].results[0])
            for cast in casts:
                self.renamed |= {cast.results[0].name: wholes[-1], cast.results[1].name: scale}
        yield self.builder.typed("reshard", tuple(parts), tuple(wholes), node.phase, node.origin, **dict(node.kwargs))

    def dtype(self, result: Value) -> Arg:
        return self.chosen[result.name][0].args[1]
