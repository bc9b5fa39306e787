"""Regions compiled by Inductor: each different one once, whatever layer it is in.

The time to compile follows the number of different regions and not that of layers. They are lowered one after another,
while the kernels of all of them are built together.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextvars import Context, copy_context
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from zgraph.bridge import private_inductor
from zgraph.bridge.aten import TO_TORCH, resolve, to_torch
from zgraph.bridge.private_inductor import Example
from zgraph.errors import KernelError, in_one_line
from zgraph.ir import Graph, Instruction, Program, TensorType, Value
from zgraph.ir.layout import chunk_numel, dense_strides
from zgraph.runtime.collectives import EXECUTORS
from zgraph.runtime.libraries import Libraries
from zgraph.runtime.region import Compute, Region, cut

if TYPE_CHECKING:
    from zgraph.runtime.session import Session

MAX_SIZES = 8
"""Sizes that one region is compiled for; for others it runs op by op."""


@dataclass
class Regions:
    """The regions of a model, each different one compiled before the first of them runs; where its sizes are not known
    then, when it is first run.

    Args:
        num_regions: how many there are, in all programs.
        seconds: time that compiling them has taken.
        context: in which they are compiled. In it are the user's settings of Inductor: on GPUs, backwards run in a
            thread of autograd's, which has a context of its own.
        strides_vary: whether a region has been given other strides than its types state.
        libraries: regions that are libraries of C++; None where none is to be one.
        makes_libraries: whether new regions become libraries, where their sizes are known.
        remark: why they do not, in words; empty where nobody asked for it.
    """

    is_shown: ClassVar[bool] = True

    num_regions: int = 0
    seconds: float = 0.0
    context: Context = field(default_factory=copy_context)
    strides_vary: bool = False
    libraries: Libraries | None = None
    makes_libraries: bool = True
    remark: str = ""
    _by_text: dict[str, _Sized] = field(default_factory=dict)

    @property
    def num_different(self) -> int:
        return len(self._by_text)

    def __str__(self) -> str:
        found = f"{self.num_regions} regions, {self.num_different} of them different, {self.seconds:.1f} s"
        return "; ".join(filter(None, [found, str(self.libraries or ""), self.remark]))

    def cut(self, program: Program, graph: Graph) -> Iterator[Instruction | Region]:
        """The program's instructions, with regions in the place of those that they hold."""
        return cut(program, graph)

    def compile(self, programs: Iterable[Program], graph: Graph, session: Session) -> None:
        """Compile the regions of programs that are new and whose sizes are known, their kernels in parallel."""
        if session.device.type != "cpu":
            private_inductor.warmed()
        parts = (part for program in programs for part in self.cut(program, graph))
        self._compile([part for part in parts if isinstance(part, Region)], session)

    def _compile(self, regions: Sequence[Region], session: Session) -> None:
        begin = time.perf_counter()
        begun = [finish for region in regions if (finish := self._begun(region, session)) is not None]
        for finish in begun:
            finish()
        self.seconds += time.perf_counter() - begin

    def runner(self, region: Region, session: Session, loose: Sequence[int]) -> Compute:
        """The function that runs a region; what is compiled is shared by all regions that compute the same.

        Args:
            region: the region.
            session: what it works on.
            loose: positions of inputs whose strides may be others in a later call than in the first.
        """
        self.num_regions += 1
        self._compile([region], session)
        return self._by_text[region.text].runner(loose)

    def take_context(self) -> None:
        """Compile as this thread is set, from now on."""
        self.context = copy_context()

    def _begun(self, region: Region, session: Session) -> Callable[[], None] | None:
        """Begin to compile a region that is new; what is returned ends it."""
        if region.text in self._by_text:
            return None
        own = {n.name: EXECUTORS[n.op](n, session) for n in region.nodes if n.op in EXECUTORS}
        sized = self._by_text[region.text] = _Sized(self, Steps(region, session.device, own))
        libraries = self.libraries if self.makes_libraries else None
        if (examples := _examples(region, session)) is None:
            if libraries is not None:
                libraries.left["sizes that change from call to call"] += 1
            return None
        ready = sized.begin(examples) if libraries is None else sized.begin_library(examples, libraries)

        def finish() -> None:
            sized.are_static(examples, ready())

        return finish


class _Sized:
    """A region compiled for each size that it comes with.

    Args:
        regions: those that it is one of.
        steps: the region op by op.
    """

    def __init__(self, regions: Regions, steps: Steps) -> None:
        self.regions, self.steps = regions, steps
        self.compiled: dict[Any, Compute] = {}
        self.strides: list[tuple[int, ...]] | None = None
        self.run: Compute = self.by_size

    def are_static(self, examples: Sequence[Example], compiled: Compute) -> None:
        """The region's sizes are always these, as the graph says: only strides that the caller chose can be others."""
        self.compiled[tuple((e.size, e.stride) for e in examples)] = self.run = compiled
        self.strides = [e.stride for e in examples]

    def runner(self, loose: Sequence[int]) -> Compute:
        """Function that runs one region of this kind: see `Regions.runner`.

        The first call looks at all strides, later ones at those that may differ; once any region found others, at all.
        """
        if (strides := self.strides) is None:
            return self.by_size
        regions, wanted, is_first = self.regions, [strides[i] for i in loose], True

        def run(args: list[Any]) -> Sequence[Any]:
            nonlocal is_first
            if is_first or regions.strides_vary:
                if [a.stride() for a in args] != strides:
                    regions.strides_vary = True
                    return self.by_size(args)
                made, is_first = self.run(args), False
                self.run = private_inductor.direct(self.run)
                return made
            if wanted and [args[i].stride() for i in loose] != wanted:
                regions.strides_vary = True
                return self.by_size(args)
            return self.run(args)

        return run

    def by_size(self, args: list[Any]) -> Sequence[Any]:
        """Run what is compiled for the sizes at hand, or compile it."""
        key = tuple((tuple(a.shape), a.stride()) if isinstance(a, torch.Tensor) else a for a in args)
        found = self.compiled.get(key)
        if found is None:
            if len(self.compiled) == MAX_SIZES:
                warnings.warn(
                    f"a region was compiled for {MAX_SIZES} sizes, and came with another: op by op for that and more. "
                    'Pad inputs to few sizes, or compile with kernels="aten".',
                    stacklevel=2,
                )
            is_due, begin = len(self.compiled) < MAX_SIZES, time.perf_counter()
            found = self.compiled[key] = self.begin([_example(a) for a in args])() if is_due else self.steps
            self.regions.seconds += time.perf_counter() - begin
        return found(args)

    def begin_library(self, examples: Sequence[Example], libraries: Libraries) -> Callable[[], Compute]:
        """Begin to make a library for inputs like these; where that cannot be, to compile as `begin` does.

        Raises:
            CacheError: there is no folder for what is kept.
        """
        context = self.regions.context.copy()
        return libraries.begin(lambda *given: self.steps([*given]), examples, context, lambda: self.begin(examples))

    def begin(self, examples: Sequence[Any]) -> Callable[[], Compute]:
        """Begin to compile for inputs like these. The function that is returned waits, and gives what runs them: the
        region op by op, after a warning, if Inductor fails.

        Raises:
            KernelError: there is no compiler.
            torch.OutOfMemoryError: compiling has no room.
        """
        tensors = [e for e in examples if isinstance(e, Example)]
        numbers = [None if isinstance(e, Example) else e for e in examples]

        def of_tensors(*given: torch.Tensor) -> list[Any]:
            rest = iter(given)
            return self.steps([next(rest) if n is None else n for n in numbers])

        context = self.regions.context.copy()
        try:
            lowered = context.run(private_inductor.lowered, of_tensors, tensors, checks_inputs=False)
        except Exception as error:
            failed = self.failed(error)
            return lambda: failed

        def ready() -> Compute:
            try:
                compiled = context.run(lowered.ready)
            except Exception as error:
                return self.failed(error)
            if len(tensors) == len(examples):
                return compiled
            return lambda args: compiled([a for a in args if isinstance(a, torch.Tensor)])

        return ready

    def failed(self, error: Exception) -> Compute:
        """The region op by op. Raises what `begin` does."""
        if isinstance(error, torch.OutOfMemoryError):
            raise error
        what = f"Inductor cannot compile {len(self.steps.calls)} ops of {self.steps.origin}"
        if not has_inductor(self.steps.device):
            raise KernelError(
                f'{what}: {error}. On processors it needs a C++ compiler (g++); kernels="aten" needs none.'
            ) from error
        warnings.warn(f"{what} ({in_one_line(error)}); they run op by op, in all layers like it", stacklevel=2)
        return self.steps


def _example(argument: Any) -> Any:
    return Example.of(argument) if isinstance(argument, torch.Tensor) else argument


def _examples(region: Region, session: Session) -> list[Example] | None:
    """The tensors that a region will be given; None where they are not known before it runs."""
    found = []
    for value in region.inputs:
        kind = value.type
        if not isinstance(kind, TensorType) or kind.is_on_host:
            return None
        size: tuple[Any, ...] = kind.shape
        stride: tuple[Any, ...] | None = kind.strides
        if kind.is_sharded:
            size, stride = (chunk_numel(size, session.num_shards),), None
        if not all(isinstance(number, int) for number in (*size, *(stride or ()))):
            return None
        found.append(
            Example(size, dense_strides(size) if stride is None else stride, TO_TORCH[kind.dtype], session.device)
        )
    return found


def has_inductor(device: torch.device) -> bool:
    """Whether Inductor can compile for a device, as far as can be told without compiling."""
    return not private_inductor.inductor_problem(device)


class Steps:
    """A region op by op.

    Args:
        region: the region to run.
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
