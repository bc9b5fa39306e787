"""Kept plans: what the passes made of one captured graph, as text, for the next run and for the other ranks.

A kept plan is JSON: the key of what it was made from, the steps with their figures, the last graph and those that its
certificate needs, the predicted step, and what reports say. Nothing in it is run as code. Whoever reads one compares
the key, parses the graphs, and certifies them against the graph that it captured itself.
"""

from __future__ import annotations

import base64
import binascii
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from zgraph.certify.certificate import Certifier, landmarks
from zgraph.cost import Timeline, TimelineRecord
from zgraph.errors import RunFileError, ZirError
from zgraph.ir import Graph, parse_graph, print_graph
from zgraph.passes.core.instruments import PassSummary
from zgraph.passes.core.pipeline import uncollected

FORMAT = 1

MAX_BYTES = 256 << 20
"""Of a plan's text; one of 80 layers has some 7 MB."""


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Step(_Frozen):
    """Record of a pass that ran.

    Args:
        name: of the pass.
        text: the pass as a recipe writes it.
        seconds, num_nodes, changed: as in `PassSummary`.
        graph: the number of the text of the graph after it; None where only its figures are kept.
    """

    name: str = Field(max_length=1000)
    text: str = Field(max_length=100_000)
    seconds: float = Field(ge=0, allow_inf_nan=False)
    num_nodes: int = Field(ge=0)
    changed: dict[str, int] = Field(max_length=10_000)
    graph: int | None = Field(default=None, ge=0)

    @classmethod
    def of(cls, name: str, summary: PassSummary, graph: int | None) -> Step:
        """The record of a pass by its summary."""
        return cls(
            name=name,
            text=summary.text,
            seconds=summary.seconds,
            num_nodes=summary.num_nodes,
            changed=dict(summary.changed),
            graph=graph,
        )


class Said(_Frozen):
    """Words of reports on what the passes chose.

    Args:
        codecs: of gradients and parameters, and why; empty if there was no choice.
        float8: names of the layers that are in float8.
        left_out: why each of the others is not, by name.
    """

    codecs: str = ""
    float8: tuple[str, ...] = ()
    left_out: dict[str, str] = {}


class _Record(_Frozen):
    """Contents of a kept plan."""

    format: int
    key: str = Field(max_length=64)
    steps: tuple[Step, ...] = Field(min_length=1, max_length=1000)
    graphs: tuple[str, ...] = Field(min_length=1, max_length=1000)
    timeline: TimelineRecord
    said: Said


@dataclass(frozen=True)
class Kept:
    """A plan that is kept.

    Args:
        key: of what the passes read.
        steps: the passes that ran, in order; the last has a graph.
        texts: of the graphs.
        timeline: the predicted step.
        said: what reports say of it.
    """

    key: str
    steps: tuple[Step, ...]
    texts: tuple[str, ...]
    timeline: Timeline
    said: Said

    @cached_property
    def graphs(self) -> tuple[Graph, ...]:
        """The graphs of the texts. Raises ZirError if one does not parse."""
        with uncollected():
            return tuple(map(parse_graph, self.texts))

    @property
    def final(self) -> Graph:
        """The graph after all passes."""
        number = self.steps[-1].graph
        assert number is not None, "a plan without its last graph is refused"
        return self.graphs[number]

    @property
    def summaries(self) -> tuple[PassSummary, ...]:
        """Summaries of the passes as they ran."""
        return tuple(PassSummary(s.text, s.seconds, s.num_nodes, s.changed) for s in self.steps)

    def tell(self, certifier: Certifier) -> None:
        """Tell a certifier of the graphs, in the place of those passes that are not kept the one before."""
        _, graph = certifier.steps[-1]
        for step in self.steps:
            graph = graph if step.graph is None else self.graphs[step.graph]
            certifier.add(step.name, graph)

    def to_bytes(self) -> bytes:
        """The plan as a file has it: its text, compressed."""
        record = _Record(
            format=FORMAT,
            key=self.key,
            steps=self.steps,
            graphs=self.texts,
            timeline=TimelineRecord.of(self.timeline),
            said=self.said,
        )
        return zlib.compress(record.model_dump_json().encode(), 6)

    def to_word(self) -> str:
        """The plan as the job's key-value store has it: letters, digits and signs."""
        return base64.b85encode(self.to_bytes()).decode()


def kept(key: str, certifier: Certifier, summaries: Sequence[PassSummary], timeline: Timeline, said: Said) -> Kept:
    """The plan that passes have made, to be kept.

    Args:
        key: of what they read.
        certifier: saw the graph after each of them.
        summaries: of the passes.
        timeline: the predicted step of the last graph.
        said: what reports say.
    """
    _, *ran = certifier.steps
    wanted = landmarks(certifier.steps)
    numbers: dict[int, int] = {}
    texts: list[str] = []
    steps: list[Step] = []
    for position, ((name, graph), summary) in enumerate(zip(ran, summaries, strict=True), 1):
        number = None
        if position in wanted or position == len(ran):
            if id(graph) not in numbers:
                numbers[id(graph)] = len(texts)
                texts.append(print_graph(graph))
            number = numbers[id(graph)]
        steps.append(Step.of(name, summary, number))
    return Kept(key, tuple(steps), tuple(texts), timeline, said)


def read_word(word: str, key: str) -> Kept:
    """Read what `Kept.to_word` has written, for a key. Raises RunFileError, as `read_kept`."""
    try:
        return read_kept(base64.b85decode(word), key)
    except (ValueError, binascii.Error):
        raise RunFileError("it is no word that a rank gives of a plan") from None


def read_kept(held: bytes, key: str) -> Kept:
    """Read what `Kept.to_bytes` has written, for a key.

    Raises:
        RunFileError: it is damaged, is none, is of another key or format, is too long, or a graph does not parse.
    """
    unpacking = zlib.decompressobj()
    try:
        text = unpacking.decompress(held, MAX_BYTES)
    except zlib.error as error:
        raise RunFileError(f"it cannot be unpacked: {error}") from None
    if not unpacking.eof or unpacking.unused_data:
        raise RunFileError(f"it is not whole, or has more than {MAX_BYTES >> 20} MiB")
    try:
        record = _Record.model_validate_json(text)
    except ValidationError as error:
        raise RunFileError(f"it is no kept plan ({error.error_count()} problems)") from None
    if record.format != FORMAT:
        raise RunFileError(f"it has format {record.format}, and this zgraph reads {FORMAT}")
    if record.key != key:
        raise RunFileError("it was made from something else")
    numbers = [step.graph for step in record.steps if step.graph is not None]
    if record.steps[-1].graph is None or max(numbers) >= len(record.graphs):
        raise RunFileError("it lacks a graph")
    found = Kept(record.key, record.steps, record.graphs, record.timeline.timeline(), record.said)
    try:
        _ = found.graphs
    except ZirError as error:
        raise RunFileError(f"a graph of it does not parse: {error}") from None
    return found
