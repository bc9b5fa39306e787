"""A failing graph made small: what is left fails as the whole did.

Nodes go first, in chunks (`ddmin.py`): what is left reads what others made as inputs, and returns what others read.
Then outputs, inputs that nothing reads, and nodes that one of their operands can stand for; and all again, until
nothing changes.
"""

from __future__ import annotations

import shlex
import subprocess
import tempfile
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol, TypeVar

from zgraph.debugging.bisection import Tell, run_steps
from zgraph.debugging.check import NUM_MICRO_STEPS, examine, reference
from zgraph.debugging.ddmin import minimal
from zgraph.debugging.outcome import Failure
from zgraph.errors import BudgetError, UsageError, VerifyError
from zgraph.ir import DType, Graph, Input, InputKind, Node, Output, OutputKind, Phase, TensorType, Value, verify
from zgraph.ir.arena import sized
from zgraph.passes import Context, Pipeline
from zgraph.runfile.format import CAPTURED, Provenance, run_file

Part = TypeVar("Part")


class Check(Protocol):
    """Check that a graph must pass."""

    def failure(self, graph: Graph) -> Failure | None:
        """How the graph fails; None where it does not, or where that cannot be told."""


@dataclass(frozen=True)
class Passed:
    """Fails where the passes raise an error, make a graph that is not valid, or change its numbers.

    Args:
        pipeline: the passes.
        context: what they know.
        num_ranks: how many are simulated.
        seed: of the random inputs.
        dtype: f64 or f32, which all floating-point numbers are taken to be; None for those that the graph says.
        tolerance: how much of its largest number an output may differ; by default what `known.TOLERANCES` says.
        max_bytes: memory to use at most; by default half of what is free.
        micro_steps: how many run under no_sync at most.
        program: the one program to look at; empty for all.
    """

    pipeline: Pipeline
    context: Context
    num_ranks: int = 1
    seed: int = 0
    dtype: DType | None = DType.f64
    tolerance: float | None = None
    max_bytes: int | None = None
    micro_steps: int = NUM_MICRO_STEPS
    program: str = ""

    def failure(self, graph: Graph) -> Failure | None:
        """How the graph fails. Raises BudgetError if checking it takes too much memory."""
        steps = run_steps(graph, self.pipeline, self.context)
        if steps.crash is not None:
            return broken(steps.graphs[-1][1]) or steps.crash[1]
        try:
            known = reference(
                graph,
                self.num_ranks,
                self.seed,
                self.context.hints,
                self.dtype,
                self.max_bytes,
                reduce_dtype=self.context.reduce_dtype,
            )
        except BudgetError:
            raise
        except Exception:  # what was cut off may be what made sense of its operands
            return None
        return examine(
            known, steps.graphs[-1][1], tolerance=self.tolerance, micro_steps=self.micro_steps, only=self.program
        )

    def narrowed(self, failure: Failure) -> Passed:
        """The check of the program that fails."""
        return replace(self, program=failure.program)


@dataclass(frozen=True)
class Commanded:
    """Fails where a command does: with an exit code other than 0.

    Args:
        command: with `{}` for the run file that holds the graph.
        context: what the passes know, for the run file.
        provenance: who made it, likewise.
        timeout_s: seconds after which the command counts as one that cannot tell.
    """

    command: str
    context: Context
    provenance: Provenance
    timeout_s: float = 120.0

    def failure(self, graph: Graph) -> Failure | None:
        """How the command ends. Raises UsageError if there is no such command."""
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "candidate.zg"
            run_file([(CAPTURED, graph, 0.0)], self.provenance, self.context).save(file)
            args = [arg.replace("{}", str(file)) for arg in shlex.split(self.command)]
            try:
                ended = subprocess.run(args, capture_output=True, timeout=self.timeout_s, check=False)
            except OSError as error:
                raise UsageError(f"cannot run {args[0]}: {error.strerror}") from None
            except subprocess.TimeoutExpired:
                return None
        if ended.returncode == 0:
            return None
        lines = ended.stderr.decode(errors="replace").strip().splitlines()
        message = f"exit code {ended.returncode}" + (f": {lines[-1]}" if lines else "")
        return Failure("raises", f"exit code {ended.returncode}", message)


def reduce(graph: Graph, check: Check, *, tell: Tell = lambda text: None) -> tuple[Graph, Failure]:
    """The graph made small, and how it still fails: as the whole did. Interrupted, it gives what it has until then.

    Args:
        graph: a valid graph.
        check: what it fails.
        tell: is told what is done, for those who wait.

    Raises:
        UsageError: the graph does not fail, or the check is no command.
        BudgetError: checking takes too much memory.
        VerifyError: it is not valid.
    """
    verify(graph)
    failure = check.failure(graph)
    if failure is None:
        raise UsageError("nothing fails on this graph, so there is nothing to reduce")
    if isinstance(check, Passed):
        check = check.narrowed(failure)
    return _Reduction(graph, check, failure, tell).run(), failure


class _Reduction:
    def __init__(self, graph: Graph, check: Check, failure: Failure, tell: Tell) -> None:
        self.graph, self.check, self.failure, self.tell = graph, check, failure, tell
        self.num_checks = 0

    def run(self) -> Graph:
        try:
            self.shrink()
        except KeyboardInterrupt:  # those who do not want to wait have what there is
            self.tell("interrupted")
        return self.graph

    def shrink(self) -> None:
        before: Graph | None = None
        while self.graph != before:
            before = self.graph
            self.least(range(len(self.graph.nodes)), window)
            self.least(range(len(self.graph.outputs)), _with_outputs)
            self.least(_idle_inputs(self.graph), _with_idle_inputs)
            self.least([n.name for n in self.graph.nodes if _stand_in(n) is not None], _bypassing)

    def least(self, items: Sequence[Part], part: Callable[[Graph, Sequence[Part]], Graph]) -> None:
        """Keep as few of the items as still make a graph that fails."""
        whole = self.graph

        def fails(kept: Sequence[Part]) -> bool:
            found = part(whole, kept)
            if not self.is_failing(found):
                return False
            self.graph = found
            return True

        if items:
            minimal(items, fails)

    def is_failing(self, graph: Graph) -> bool:
        """Whether a graph is valid and fails as the first one did."""
        self.num_checks += 1
        size = f"{len(self.graph.nodes):,} nodes left, {len(graph.nodes):,} tried"
        self.tell(f"check {self.num_checks}: {size}")
        if any(isinstance(i.value.type, TensorType) and i.value.type.future for i in graph.inputs):
            return False
        if broken(graph) is not None:
            return False
        found = self.check.failure(graph)
        return found is not None and found.is_like(self.failure)


def broken(graph: Graph) -> Failure | None:
    """The first rule of the IR that a graph breaks, if it does."""
    try:
        verify(graph)
    except VerifyError as error:
        return Failure.raised(error)
    return None


def window(graph: Graph, kept: Collection[int]) -> Graph:
    """Some nodes of a graph as a graph: what others made is an input, what others read is returned."""
    chosen = frozenset(kept)
    nodes = [node for at, node in enumerate(graph.nodes) if at in chosen]
    made = {r.name for node in nodes for r in node.results}
    given = {i.value.name for i in graph.inputs}
    read = [v for node in nodes for v in node.operands] + [o.value for o in graph.outputs if o.value is not None]
    cut = {v.name: v for v in read if v.name not in made | given}
    inputs = [Input(_kind(graph.producers[name]), value) for name, value in cut.items()]
    outputs = [
        Output(OutputKind.output, result, phase=node.phase)
        for node in nodes
        for result in node.results
        if result.name not in graph.output_names and not chosen.issuperset(graph.users.get(result.name, ()))
    ]
    found = replace(graph, inputs=(*graph.inputs, *inputs), nodes=tuple(nodes), outputs=(*graph.outputs, *outputs))
    return sized(found.with_used_ops())


def _kind(producer: Node) -> InputKind:
    return InputKind.input if producer.phase is Phase.forward else InputKind.tangent


def _with_outputs(graph: Graph, kept: Sequence[int]) -> Graph:
    return replace(graph, outputs=tuple(graph.outputs[at] for at in kept))


def _idle_inputs(graph: Graph) -> list[str]:
    """Inputs that nothing reads or is for."""
    needed = graph.users.keys() | graph.output_names | {o.target for o in graph.outputs}
    return [i.value.name for i in graph.inputs if i.value.name not in needed]


def _with_idle_inputs(graph: Graph, kept: Sequence[str]) -> Graph:
    dropped = set(_idle_inputs(graph)) - set(kept)
    return replace(graph, inputs=tuple(i for i in graph.inputs if i.value.name not in dropped))


def _stand_in(node: Node) -> Value | None:
    """The operand that can stand for what a node makes."""
    if len(node.results) != 1:
        return None
    return next((v for v in node.operands if v.type == node.results[0].type), None)


def _bypassing(graph: Graph, kept: Sequence[str]) -> Graph:
    """The graph without nodes that an operand can stand for, but for those that are kept."""
    stays = set(kept)
    env: dict[str, Value] = {}
    nodes = []
    for node in graph.nodes:
        node = node.substitute(env)
        operand = _stand_in(node)
        if operand is not None and node.name not in stays:
            env[node.name] = operand
        else:
            nodes.append(node)
    outputs = tuple(output.substitute(env) for output in graph.outputs)
    return sized(replace(graph, nodes=tuple(nodes), outputs=outputs).with_used_ops())
