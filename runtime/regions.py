"""Runs of ops between collectives, compiled by Inductor: each different one once, whichever layer it stands in.

A region is a run of ops of one layer with nothing in between that moves data between ranks or to the host. It is known
by its text, in which values are numbered as they come: layers that are alike have regions of the same text, so that the
time to compile follows the number of different regions and not that of layers.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

from zgraph.bridge import private_runtime
from zgraph.bridge.aten import resolve, to_torch
from zgraph.errors import KernelError
from zgraph.ir import Arg, Graph, Instruction, Node, Program, Value
from zgraph.runtime.collectives import MAKERS

if TYPE_CHECKING:
    from zgraph.runtime.session import Session

MIN_OPS = 2
"""Ops that are no views; a region with fewer has nothing to fuse."""

MAX_SIZES = 8
"""Sizes that one region is compiled for; for others it runs op by op."""

Compute = Callable[[list[Any]], Sequence[Any]]
"""From a list of arguments, which may be emptied, to results."""


@dataclass(frozen=True)
class Region:
    """Instructions that are run as one.

    Args:
        nodes: what they compute.
        inputs: what they read, in the order in which they read it first.
        outputs: what they make that is read afterwards.
        frees: values made before that nothing reads afterwards.
    """

    nodes: tuple[Node, ...]
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    frees: tuple[str, ...]

    @cached_property
    def text(self) -> str:
        """What it computes: the same text for all regions that compute the same."""
        numbers = {v.name: i for i, v in enumerate(self.inputs)}
        lines = [", ".join(str(v.type) for v in self.inputs)]
        for node in self.nodes:
            args = [*(_text(a, numbers) for a in node.args), *(f"{k}={_text(a, numbers)}" for k, a in node.kwargs)]
            for result in node.results:
                numbers[result.name] = len(numbers)
            lines.append(f"{node.op}({', '.join(args)}) -> {', '.join(str(r.type) for r in node.results)}")
        return "\n".join([*lines, ", ".join(str(numbers[v.name]) for v in self.outputs)])


def _text(arg: Arg, numbers: dict[str, int]) -> str:
    if isinstance(arg, Value):
        return f"%{numbers[arg.name]}"
    return f"[{', '.join(_text(a, numbers) for a in arg)}]" if isinstance(arg, tuple) else repr(arg)


# --- where they lie ------------------------------------------------------------------------------------------------


def cut(program: Program, graph: Graph) -> Iterator[Instruction | Region]:
    """The program's instructions, with regions in the place of those that they hold.

    Copies into memory of their own, which a gradient may be handed out in, do not end a region: they come after it.
    """
    run, copies = list[Instruction](), list[Instruction]()
    layer = ""
    for instruction in program.instructions:
        node = instruction.node
        touched = {*(v.name for v in node.operands), *instruction.frees}
        if copies and any(v.name in touched for copy in copies for v in (*copy.node.operands, *copy.node.results)):
            yield from _ended(run, copies, graph)
        if node.op == "copy" and run:
            copies.append(instruction)
            continue
        if not _is_computing(node, graph) or (node.origin.module and node.origin.layer != layer):
            yield from _ended(run, copies, graph)
        layer = node.origin.layer if node.origin.module else layer
        if _is_computing(node, graph):
            run.append(instruction)
        else:
            yield instruction
    yield from _ended(run, copies, graph)


def _is_computing(node: Node, graph: Graph) -> bool:
    row = graph.foreign.get(node.op)
    return row.is_pure if row is not None else node.op in ("cast", "release")


def _ended(run: list[Instruction], copies: list[Instruction], graph: Graph) -> Iterator[Instruction | Region]:
    """A run as a region, if it is worth one, and the copies after it; both lists are empty then."""
    ops = [i.node for i in run if i.node.op != "release"]
    if sum(not (n.op in graph.foreign and graph.foreign[n.op].views) for n in ops) < MIN_OPS:
        yield from run
    else:
        made = {r.name: r for n in ops for r in n.results}
        freed = dict.fromkeys(name for i in run for name in i.frees)
        inputs = {v.name: v for n in ops for v in n.operands if v.name not in made}
        outputs = tuple(v for name, v in made.items() if name not in freed)
        yield Region(tuple(ops), tuple(inputs.values()), outputs, tuple(name for name in freed if name not in made))
    yield from copies
    run.clear()
    copies.clear()


# --- how they run --------------------------------------------------------------------------------------------------


@dataclass
class Regions:
    """The regions of a model, each different one compiled when it is first run.

    Args:
        num_regions: how many there are, in all programs.
        seconds: what compiling them has taken.
    """

    num_regions: int = 0
    seconds: float = 0.0
    _by_text: dict[str, Compute] = field(default_factory=dict)

    @property
    def num_different(self) -> int:
        return len(self._by_text)

    def __str__(self) -> str:
        return f"{self.num_regions} regions, {self.num_different} of them different, {self.seconds:.1f} s"

    def runner(self, region: Region, session: Session) -> Compute:
        """What runs a region: the same for all that compute the same."""
        self.num_regions += 1
        if region.text not in self._by_text:
            own = {n.name: MAKERS[n.op](n, session) for n in region.nodes if n.op in MAKERS}
            self._by_text[region.text] = self._compiling(Steps(region, session.device, own))
        return self._by_text[region.text]

    def _compiling(self, steps: Steps) -> Compute:
        compiled: dict[tuple[Any, ...], Compute] = {}

        def run(args: list[Any]) -> Sequence[Any]:
            key = tuple((a.shape, a.stride()) if isinstance(a, torch.Tensor) else a for a in args)
            found = compiled.get(key)
            if found is None:
                if len(compiled) == MAX_SIZES:
                    warnings.warn(
                        f"a region was compiled for {MAX_SIZES} sizes, and came with another: op by op for that and "
                        'more. Pad inputs to few sizes, or compile with kernels="aten".', stacklevel=2,
                    )  # fmt: skip
                found = compiled[key] = self._compile(steps, args) if len(compiled) < MAX_SIZES else steps
            return found(args)

        return run

    def _compile(self, steps: Steps, args: Sequence[Any]) -> Compute:
        begin = time.perf_counter()
        tensors = [a for a in args if isinstance(a, torch.Tensor)]
        numbers = [None if isinstance(a, torch.Tensor) else a for a in args]

        def of_tensors(*given: torch.Tensor) -> list[Any]:
            rest = iter(given)
            return steps([next(rest) if n is None else n for n in numbers])

        try:
            compiled = private_runtime.inductor(of_tensors, tensors)
        except Exception as error:
            raise KernelError(
                f"Inductor cannot compile {len(steps.calls)} ops of {steps.origin}: {error}. On processors it needs a "
                'C++ compiler (g++); kernels="aten" needs none.'
            ) from error
        self.seconds += time.perf_counter() - begin
        if len(tensors) == len(args):
            return compiled
        return lambda args: compiled([a for a in args if isinstance(a, torch.Tensor)])


class Steps:
    """A region op by op.

    Args:
        region: what to run.
        device: of this rank.
        own: what runs zgraph's own ops, by the names of their nodes.
    """

    def __init__(self, region: Region, device: torch.device, own: Mapping[str, Callable[..., Any]]) -> None:
        self.inputs = [v.name for v in region.inputs]
        self.outputs = [v.name for v in region.outputs]
        self.origin = next((n.origin.module for n in region.nodes if n.origin.module), "the model")
        self.device = device
        self.calls = [(n, own.get(n.name) or resolve(n.op)) for n in region.nodes]

    def __call__(self, args: list[Any]) -> list[Any]:
        values = dict(zip(self.inputs, args, strict=True))
        args.clear()

        def of(value: Value) -> Any:
            return values[value.name]

        for node, function in self.calls:
            if node.op == "cast":
                made = function(*map(of, node.operands))
            else:
                given = [to_torch(a, self.device, of) for a in node.args]
                made = function(*given, **{k: to_torch(a, self.device, of) for k, a in node.kwargs})
            results = made if isinstance(made, list | tuple) else [made]
            values.update((r.name, m) for r, m in zip(node.results, results, strict=True))
        return [values[name] for name in self.outputs]
