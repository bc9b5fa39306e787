"""Kept plans: run files of the first and the last graph, with what it takes to call them without capturing a model.

Beside what any run file has, a kept plan has

    reuse.json    the key that it was made for, to which parameter, buffer or argument each input of the program is
                  bound, which output is which tensor of the result, and a hash of all that with the graphs

Nothing in it is run as code, and a plan is not used unless its hash and its key are right, its graphs parse and keep to
the rules, and the last one computes what was captured.
"""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from zgraph.errors import RunFileError
from zgraph.ir import DType, Graph, Input, InputKind, OutputKind, Phase
from zgraph.passes.core.instruments import PassSummary
from zgraph.runfile.archive import opened
from zgraph.runfile.format import CAPTURED, RunFile, load_run

REUSE = "reuse.json"

MAX_BYTES = 256 << 20
"""A file that is longer is not read; one of 80 layers has some 300 KB."""


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")


class Step(_Frozen):
    """Summary of a pass: its text, seconds, nodes, and how many of each op there are more or less."""

    text: str = Field(max_length=10_000)
    seconds: float = Field(ge=0)
    num_nodes: int = Field(ge=0)
    changed: dict[str, int] = Field(max_length=10_000)

    @classmethod
    def of(cls, summary: PassSummary) -> Step:
        """The step of a summary."""
        changed = dict(summary.changed)
        return cls(text=summary.text, seconds=summary.seconds, num_nodes=summary.num_nodes, changed=changed)

    @property
    def summary(self) -> PassSummary:
        return PassSummary(self.text, self.seconds, self.num_nodes, self.changed)


class Bound(_Frozen):
    """Binding of an input of the program: a parameter or a buffer by name, or an argument by its number."""

    value: str = Field(max_length=10_000)
    kind: Literal["param", "buffer", "input"]
    target: str = Field(max_length=10_000)


class Constant(_Frozen):
    """A small tensor that the model's code made while it was captured: its bytes in base64, in order."""

    name: str = Field(max_length=1000)
    dtype: DType
    shape: tuple[int, ...] = Field(max_length=64)
    data: str = Field(max_length=1 << 17)


class Reuse(_Frozen):
    """Contents of `reuse.json`.

    Args:
        key: the lines that a model and a call must have for the plan to be theirs.
        inputs: of the program, tangents and constants left out, in its order.
        constants: of the program.
        outputs: for each tensor of the result the number of the program's output, or None for an argument.
        requires_grad: of each output of the program.
        steps: what the passes did.
        said: what the report says of codecs and float8.
        digest: a hash of all that, of the graphs and of what the passes knew.
    """

    format: Literal[1] = 1
    key: str = Field(max_length=100 << 20)
    inputs: tuple[Bound, ...]
    constants: tuple[Constant, ...] = Field(default=(), max_length=10_000)
    outputs: tuple[int | None, ...]
    requires_grad: tuple[bool, ...]
    steps: tuple[Step, ...] = Field(max_length=1000)
    said: tuple[str, str] = ("", "")
    digest: str = Field(default="", max_length=64)


@dataclass(frozen=True)
class Kept:
    """A kept plan: its run file, and how it is called."""

    run: RunFile
    reuse: Reuse

    @property
    def name(self) -> str:
        return name_of(self.reuse.key)

    @property
    def final(self) -> Graph:
        """The graph after all passes. Raises ZirError if its text does not parse."""
        return self.run.graph()

    @property
    def captured(self) -> Graph:
        """The graph as captured. Raises ZirError if its text does not parse."""
        return self.run.graph(CAPTURED)

    def signed(self) -> Kept:
        """The same, with its digest."""
        return Kept(self.run, self.reuse.model_copy(update={"digest": self._digest()}))

    def to_bytes(self) -> bytes:
        """The file."""
        stream = BytesIO()
        self.run.save(stream)
        with zipfile.ZipFile(stream, "a", zipfile.ZIP_DEFLATED, compresslevel=6) as archive:
            archive.writestr(REUSE, self.reuse.model_dump_json())
        return stream.getvalue()

    def check(self, key: str) -> None:
        """Raise RunFileError unless the file is whole and of this key."""
        if self.reuse.digest != self._digest():
            raise RunFileError("its hash is not that of what it holds")
        if self.reuse.key != key:
            raise RunFileError("it is of another model, call, option or version")

    def check_program(self, graph: Graph, num_leaves: int, num_results: int) -> None:
        """Raise RunFileError unless the inputs and outputs of a graph are bound as its own text says.

        Args:
            graph: the last one.
            num_leaves: of the arguments.
            num_results: tensors in the result.
        """
        inputs = arguments(graph)
        held = {i.target: i.value.tensor for i in graph.inputs if i.kind is InputKind.constant}
        given = {constant.name: constant for constant in self.reuse.constants}
        if held.keys() != given.keys() or any(
            (held[name].dtype, held[name].shape) != (c.dtype, c.shape) for name, c in given.items()
        ):
            raise RunFileError("its constants are not those of its program")
        if [i.value.name for i in inputs] != [b.value for b in self.reuse.inputs]:
            raise RunFileError("its inputs are not those of its program")
        for entry, binding in zip(inputs, self.reuse.inputs, strict=True):
            is_leaf = binding.kind == "input" and binding.target.isdecimal() and len(binding.target) < 7
            if entry.kind.value != binding.kind or not (
                (is_leaf and int(binding.target) < num_leaves)
                if binding.kind == "input"
                else entry.target == binding.target
            ):
                raise RunFileError(f"%{entry.value.name} is bound to {binding.kind} {binding.target[:60]!r}")
        outputs = [o for o in graph.outputs if o.phase is Phase.forward and o.kind is OutputKind.output]
        if len(outputs) != len(self.reuse.requires_grad) or num_results != len(self.reuse.outputs):
            raise RunFileError("its outputs are not those of its program")
        if not all(o is None or 0 <= o < len(outputs) for o in self.reuse.outputs):
            raise RunFileError("a result is an output that its program has not")

    def _digest(self) -> str:
        made = hashlib.sha256(self.reuse.model_dump_json(exclude={"digest"}).encode())
        made.update(self.run.manifest.model_dump_json().encode())
        for member, text in sorted(self.run.texts.items()):
            made.update(f"\0{member}\0{len(text)}\0".encode())
            made.update(text.encode())
        return made.hexdigest()


def arguments(graph: Graph) -> list[Input]:
    """The inputs of a graph that a call gives: neither tangents nor constants."""
    return [i for i in graph.inputs if i.kind not in (InputKind.tangent, InputKind.constant)]


def name_of(key: str) -> str:
    """The name of the file of a key."""
    return f"{hashlib.sha256(key.encode()).hexdigest()}.zg"


def load_kept(held: bytes, key: str) -> Kept:
    """Read a file that `Kept.to_bytes` made, for this key.

    Raises:
        RunFileError: it is damaged, is none, holds more than a run does, or is of another key.
    """
    run = load_run(BytesIO(held))
    with opened(BytesIO(held), "the kept plan") as archive:
        text = archive.read(REUSE)
    try:
        found = Kept(run, Reuse.model_validate_json(text))
    except ValidationError as error:
        raise RunFileError(f"its {REUSE} is damaged ({error.error_count()} problems)") from None
    found.check(key)
    return found


def steps_of(summaries: Sequence[PassSummary]) -> tuple[Step, ...]:
    """The steps of a file."""
    return tuple(Step.of(summary) for summary in summaries)
