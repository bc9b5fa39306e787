"""Regions compiled by Inductor: each different one once, whatever layer it is in.

The time to compile follows the number of different regions and not that of layers.
"""

from __future__ import annotations

import os
import shutil
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import Context, copy_context
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from zgraph.bridge import private_runtime
from zgraph.bridge.aten import TO_TORCH, resolve, to_torch
from zgraph.bridge.private_runtime import Example
from zgraph.errors import KernelError, in_one_line
from zgraph.ir import Graph, Instruction, Program, TensorType, Value
from zgraph.ir.layout import chunk_numel, dense_strides
from zgraph.runtime.collectives import EXECUTORS
from zgraph.runtime.region import Compute, Region, cut

if TYPE_CHECKING:
    from zgraph.runtime.session import Session

MAX_SIZES = 8
"""Sizes that one region is compiled for; for others it runs op by op."""


@dataclass
class Regions:
    """The regions of a model, each different one compiled when it is first linked; where its sizes are not known then,
    when it is first run.

    Args:
        num_regions: how many there are, in all programs.
        seconds: time that compiling them has taken.
        context: in which they are compiled. In it are the user's settings of Inductor: on GPUs, backwards run in a
            thread of autograd's, which has a context of its own.
    """

    is_shown: ClassVar[bool] = True

    num_regions: int = 0
    seconds: float = 0.0
    context: Context = field(default_factory=copy_context)
    _by_text: dict[str, Compute] = field(default_factory=dict)

    @property
    def num_different(self) -> int:
        return len(self._by_text)

    def __str__(self) -> str:
        return f"{self.num_regions} regions, {self.num_different} of them different, {self.seconds:.1f} s"

    def cut(self, program: Program, graph: Graph) -> Iterator[Instruction | Region]:
        """The program's instructions, with regions in the place of those that they hold."""
        return cut(program, graph)

    def runner(self, region: Region, session: Session) -> Compute:
        """The function that runs a region, shared by all regions that compute the same."""
        self.num_regions += 1
        if region.text not in self._by_text:
            own = {n.name: EXECUTORS[n.op](n, session) for n in region.nodes if n.op in EXECUTORS}
            steps, compiled = Steps(region, session.device, own), dict[Any, Compute]()
            if (examples := _examples(region, session)) is not None:
                compiled[tuple((e.size, e.stride) for e in examples)] = self._compile(steps, examples)
            self._by_text[region.text] = self._compiling(steps, compiled)
        return self._by_text[region.text]

    def take_context(self) -> None:
        """Compile as this thread is set, from now on."""
        self.context = copy_context()

    def _compiling(self, steps: Steps, compiled: dict[Any, Compute]) -> Compute:

        def run(args: list[Any]) -> Sequence[Any]:
            key = tuple((tuple(a.shape), a.stride()) if isinstance(a, torch.Tensor) else a for a in args)
            found = compiled.get(key)
            if found is None:
                if len(compiled) == MAX_SIZES:
                    warnings.warn(
                        f"a region was compiled for {MAX_SIZES} sizes, and came with another: op by op for that and "
                        'more. Pad inputs to few sizes, or compile with kernels="aten".',
                        stacklevel=2,
                    )
                is_due, examples = len(compiled) < MAX_SIZES, [_example(a) for a in args]
                found = compiled[key] = self._compile(steps, examples) if is_due else steps
            return found(args)

        return run

    def _compile(self, steps: Steps, examples: Sequence[Any]) -> Compute:
        begin = time.perf_counter()
        tensors = [e for e in examples if isinstance(e, Example)]
        numbers = [None if isinstance(e, Example) else e for e in examples]

        def of_tensors(*given: torch.Tensor) -> list[Any]:
            rest = iter(given)
            return steps([next(rest) if n is None else n for n in numbers])

        try:
            compiled = self.context.copy().run(private_runtime.inductor, of_tensors, tensors)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            what = f"Inductor cannot compile {len(steps.calls)} ops of {steps.origin}"
            if not has_inductor(steps.device):
                raise KernelError(
                    f'{what}: {error}. On processors it needs a C++ compiler (g++); kernels="aten" needs none.'
                ) from error
            warnings.warn(f"{what} ({in_one_line(error)}); they run op by op, in all layers like it", stacklevel=2)
            return steps
        self.seconds += time.perf_counter() - begin
        if len(tensors) == len(examples):
            return compiled
        return lambda args: compiled([a for a in args if isinstance(a, torch.Tensor)])


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
    """Whether Inductor can compile for a device: on processors it needs a C++ compiler."""
    return device.type != "cpu" or shutil.which(os.environ.get("CXX", "g++")) is not None


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
