"""Gather parameters as exact codes: what changed since the copy that all ranks still have, or exponents in few bits.

    fwd %w_full: bf16[64, 32]<R> = reshard(%w_cast)                where %w_cast: bf16[64, 32]<S0>
->
    fwd %w_full_code: u8[4144]<S0> = encode(%w_cast, codec="delta", copies=["lin.weight"])
    fwd %w_full_start: future u8[4144]<R> = all_gather_start(%w_full_code, codec="delta")
    fwd %w_full_codes: u8[4144]<R> = wait(%w_full_start)
    fwd %w_full: bf16[64, 32]<R> = decode(%w_full_codes, codec="delta", copies=["lin.weight"])

An optimizer's step leaves most numbers in bf16 as they are, and moves the others by a few units of the last place: in
small steps the change has a tenth of the bits. At stages 1 and 2 all ranks hold the last copy until the backward ends;
`delta` keeps it until the next gather, and a micro-step that changes nothing sends next to nothing. `exponent` needs no
copy: it is for gathers of stage 3. What is computed with is the same to the last bit. A code that would be longer than
the numbers is the numbers.

With `codec=auto` a graph gets each codec that saves `LEAST_SAVED` of the step: so predicted, with the time that coding
itself takes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar

from zgraph.errors import CodecError, ContractError
from zgraph.ir import Builder, DType, Graph, Node, model_axes
from zgraph.ir.codecs import Delta, Exact, Exponent, parse_codec
from zgraph.passes.analysis.coded_gathers import coded, targets
from zgraph.passes.analysis.lookahead import times_with
from zgraph.passes.core.base import Context, Pass

EXACT = ("delta", "exponent")
"""Codecs that `auto` chooses from."""

LEAST_SAVED = 0.02
"""Share of a step that exact codes must save to be chosen."""


@dataclass(frozen=True)
class CodeGathers(Pass):
    """Gather parameters as exact codes of variable length.

    Args:
        codec: `delta`, for gathers that are kept over micro-steps; `exponent`, for the others; or `auto`.
        at_least_bytes: values of fewer bytes, all members of a bucket together, are sent as they are.
    """

    codec: str = field(default="auto", metadata={"always_printed": True})
    at_least_bytes: int = 1024

    name: ClassVar[str] = "code-gathers"
    requires: ClassVar[frozenset[str]] = frozenset({"placed"})
    provides: ClassVar[frozenset[str]] = frozenset({"lowered"})

    def __post_init__(self) -> None:
        if self.codec == "auto":
            return
        try:
            found = parse_codec(self.codec)
        except CodecError as error:
            raise ValueError(str(error).splitlines()[0]) from None
        if not isinstance(found, Exact):
            raise ValueError(f"codec must be {', '.join(EXACT)} or auto, not {self.codec}")

    @property
    def copied(self) -> tuple[DType, ...]:
        """Dtypes of the parameters of which all ranks keep copies."""
        return () if self.codec == Exponent.name else Delta.dtypes

    def times_us(self, graph: Graph, context: Context) -> dict[str, float]:
        """Predicted times of a step, with each codec and with none, whose text is empty."""
        return times_with(self, "codec", EXACT, graph, context)

    @staticmethod
    def chosen(times_us: Mapping[str, float]) -> tuple[str, ...]:
        """The codecs that `auto` takes, with these times."""
        return tuple(text for text in EXACT if times_us[text] < times_us[""] * (1 - LEAST_SAVED))

    def run(self, graph: Graph, context: Context) -> Graph:
        if graph.num_shards == 1:
            return graph
        if model_axes(graph.mesh):
            raise ContractError(
                "code-gathers codes whole parameters, and the mesh cuts them along "
                f"{', '.join(a.name for a in model_axes(graph.mesh))}; leave it out of the recipe"
            )
        if self.codec == "auto":
            for text in self.chosen(self.times_us(graph, context)):
                graph = replace(self, codec=text).run(graph, context)
            return graph
        builder, nodes, codec = Builder(graph, self.name), list[Node](), parse_codec(self.codec)
        for node in graph.nodes:
            names = targets(graph, node, codec, self.at_least_bytes)
            nodes += coded(node, codec, names, builder) if names else [node]
        return graph.with_nodes(nodes)
