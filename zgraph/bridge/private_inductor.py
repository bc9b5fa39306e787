"""Inductor: functions are lowered one after another, while the kernels of all of them are built in torch's pool.

Tried on torch 2.13.0.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch

__all__ = [
    "Example",
    "Lowered",
    "Tensors",
    "direct",
    "inductor",
    "inductor_problem",
    "lowered",
    "spell",
    "traced",
    "warm",
    "warmed",
]

OLDEST_GPU = (7, 0)
"""The compute capability that Triton asks of NVIDIA's GPUs."""

POOL_SECONDS = 60
"""The longest wait for the processes that compile Triton's kernels to start."""

Tensors = Callable[[list[torch.Tensor]], Sequence[torch.Tensor]]
"""A function from a list of tensors, which it empties, to its results."""


class Example(NamedTuple):
    """A tensor to compile for, which need not exist yet."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, tensor: torch.Tensor) -> Example:
        return cls(tuple(tensor.shape), tuple(tensor.stride()), tensor.dtype, tensor.device)


@dataclass
class _Wait:
    """A generated module that waits for its kernels, and puts them in its namespace; done once."""

    pool: Any
    scope: dict[str, Any]
    error: BaseException | None = None
    is_over: bool = False

    def __call__(self) -> None:
        if self.error is None and not self.is_over:
            try:
                _wait_now()(self.pool, self.scope)
            except Exception as error:
                self.error = error
            self.is_over = True
        if self.error is not None:
            raise self.error


_spelled: dict[Any, Callable[..., Any]] = {}
"""Functions that Inductor sees in the place of ops."""

_waits: ContextVar[list[_Wait] | None] = ContextVar("zgraph_waits", default=None)
"""Waits that were put off, in a context that lowers."""

_by_module: dict[str, _Wait] = {}
"""The wait of each generated module that was loaded here. Functions whose code is the same share a module."""


@dataclass(frozen=True)
class Lowered:
    """A function that Inductor has lowered. Its kernels may still be building.

    Args:
        run: runs it, once they are built.
        wait: what is to be waited for.
    """

    run: Tensors
    wait: Callable[[], None]

    def ready(self) -> Tensors:
        """The function, once its kernels are built. Raises what building them raised."""
        self.wait()
        return self.run


def lowered(
    function: Callable[..., Sequence[torch.Tensor]],
    examples: Sequence[Example | torch.Tensor],
    *,
    checks_inputs: bool = True,
) -> Lowered:
    """A function of tensors, lowered for shapes and strides as these. Building its kernels has begun.

    Args:
        function: is traced.
        examples: what it will be given.
        checks_inputs: whether the compiled function raises AssertionError for inputs of other shapes and strides.
    """
    from torch._inductor.compile_fx import compile_fx_inner
    from torch.compiler import config

    _put_off()
    settings: Any = config
    tag = settings.cache_key_tag if checks_inputs else f"{settings.cache_key_tag} unchecked"  # not torch's own code
    waits: list[_Wait] = []
    tokens = _waits.set(waits), _checks_inputs.set(checks_inputs)
    try:
        with settings.patch(cache_key_tag=tag), traced(function, examples) as (graph, fakes):
            compiled: Any = compile_fx_inner(graph, fakes)
    finally:
        _waits.reset(tokens[0])
        _checks_inputs.reset(tokens[1])
    module = str(getattr(compiled, "cache_key", ""))
    if waits:
        _by_module[module] = waits[-1]
    elif module in _by_module:
        waits = [_by_module[module]]

    def wait() -> None:
        for each in waits:
            each()

    return Lowered(compiled, wait)


@contextmanager
def traced(
    function: Callable[..., Sequence[torch.Tensor]], examples: Sequence[Example | torch.Tensor]
) -> Iterator[tuple[torch.fx.GraphModule, list[torch.Tensor]]]:
    """A function as a graph for Inductor, and its inputs without memory, in a context in which Inductor may lower it.

    Args:
        function: of tensors.
        examples: what it will be given.
    """
    from torch._guards import tracing
    from torch._inductor.decomposition import select_decomp_table
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx
    from torch.utils._python_dispatch import _disable_current_modes

    mode = FakeTensorMode()
    kinds = [Example.of(e) if isinstance(e, torch.Tensor) else e for e in examples]
    outside = tracing(None)  # a capture that may be under way has its own mode
    with torch.no_grad(), outside, _disable_current_modes(), mode:
        fakes = [torch.empty_strided(size, stride, dtype=dtype, device=at) for size, stride, dtype, at in kinds]
        graph = make_fx(function, decomposition_table={**select_decomp_table(), **_spelled})(*fakes)
        results: Any = graph.graph.output_node()
        results.meta["user_visible_output_idxs"] = [*range(len(results.args[0]))]  # their strides are kept
        yield graph, fakes


def spell(op: torch._ops.OpOverload, function: Callable[..., Any]) -> None:
    """Have Inductor see an op as a function of torch's own, and fuse that with what is around it."""
    _spelled[op] = function


def inductor(function: Callable[..., Sequence[torch.Tensor]], examples: Sequence[Example | torch.Tensor]) -> Tensors:
    """A function of tensors, compiled for shapes and strides as these."""
    return lowered(function, examples).ready()


def direct(run: Tensors) -> Tensors:
    """The function inside a compiled one, for calls after the first, which ends the bookkeeping of autotuning."""
    inner: Tensors = getattr(run, "current_callable", None) or run
    return inner


def warm() -> None:
    """Start the processes that compile Triton's kernels, so that they are there when kernels come."""
    from torch._inductor.async_compile import AsyncCompile

    AsyncCompile.warm_pool()
    AsyncCompile.wakeup()


def warmed() -> None:
    """Wait until these processes are there: until then torch compiles kernels in this one, one after another."""
    from torch._inductor.async_compile import AsyncCompile

    with suppress(TimeoutError):
        AsyncCompile.wait_pool_ready(POOL_SECONDS)


def inductor_problem(device: torch.device) -> str:
    """Why Inductor cannot compile for a device here; empty if it can, as far as can be told without compiling."""
    if device.type == "cpu":
        compiler = os.environ.get("CXX", "g++")
        return "" if shutil.which(compiler) else f"it needs a C++ compiler, and there is no {compiler}"
    if torch.version.cuda is None and torch.version.hip is None:
        return "this torch is built without a compiler for GPUs"
    if find_spec("triton") is None:
        return "it needs Triton, which is not installed"
    compiler = os.environ.get("CC", "")
    if not any(map(shutil.which, (compiler,) if compiler else ("gcc", "clang", "cc"))):
        return f"Triton needs a C compiler, and there is no {compiler or 'gcc or clang'}"
    if torch.version.hip is None and (found := torch.cuda.get_device_capability(device)) < OLDEST_GPU:
        return f"Triton needs a GPU of compute capability 7.0, and this one has {found[0]}.{found[1]}"
    return ""


# --- inside torch ---------------------------------------------------------------------------------------------------

_checks_inputs: ContextVar[bool] = ContextVar("zgraph_checks_inputs", default=True)


@cache
def _wait_now() -> Callable[[Any, dict[str, Any]], None]:
    """Torch's own wait of a generated module for its kernels."""
    from torch._inductor.async_compile import AsyncCompile

    return AsyncCompile.wait


@cache
def _put_off() -> None:
    """Have generated modules wait for their kernels later, and check no inputs, in contexts that ask for it."""
    from torch._inductor.async_compile import AsyncCompile
    from torch._inductor.codegen.wrapper import PythonWrapperCodegen

    at_once, checked = _wait_now(), PythonWrapperCodegen.codegen_input_size_asserts

    def wait(self: Any, scope: dict[str, Any]) -> None:
        if (waits := _waits.get()) is None:
            at_once(self, scope)
        else:
            waits.append(_Wait(self, scope))

    def checks(self: Any) -> None:
        if _checks_inputs.get():
            checked(self)

    torch_class: Any = AsyncCompile
    torch_class.wait = wait
    torch_class = PythonWrapperCodegen
    torch_class.codegen_input_size_asserts = checks
