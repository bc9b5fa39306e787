"""The private corners of torch that capture needs, in one place. Tried on torch 2.11.0 and 2.13.0."""

from __future__ import annotations

import gc
import logging
import re
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
import torch._dynamo
from torch import fx
from torch._decomp import get_decompositions
from torch._dynamo import callback
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.eval_frame import reset_code  # type: ignore[attr-defined]
from torch._dynamo.exc import (
    BackendCompilerFailed,
    FailOnRecompileLimitHit,
    TorchDynamoException,
    TorchRuntimeError,
    Unsupported,
    UserError,
)
from torch._functorch import config as functorch_config
from torch._functorch._aot_autograd import descriptors
from torch._guards import TracingContext
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack
from torch.utils._python_dispatch import _disable_current_modes as without_modes
from torch.utils.checkpoint import CheckpointPolicy

from zgraph.bridge.private_fake import FakeTensor, FakeTensorMode
from zgraph.bridge.private_told import told_afterwards
from zgraph.errors import UsageError

__all__ = [
    "DECOMPOSED",
    "BackendCompilerFailed",
    "FailOnRecompileLimitHit",
    "TorchDynamoException",
    "TorchRuntimeError",
    "Unsupported",
    "UserError",
    "WhenCaptured",
    "aot_autograd",
    "capturing",
    "checkpoint_region",
    "compiled_backward_node",
    "dynamo_is_off",
    "fake_mode_of",
    "grad_target",
    "input_index",
    "last_guard",
    "mark_dynamic",
    "mutation_target",
    "never_captured",
    "on_break",
    "on_capture",
    "raised_without_data",
    "reset_code",
    "seeing_subclasses",
    "tangents_of_any_size",
    "without_checkpoints",
    "without_modes",
]


def input_index(placeholder: torch.fx.Node) -> int | None:
    """The position among the captured function's inputs; None for a tangent or an input that AOTAutograd made."""
    return _plain_index(placeholder.meta.get("desc"))


def grad_target(desc: Any) -> int | None:
    """The position of the input whose gradient an output is; None for an output that is no gradient."""
    return _plain_index(desc.grad_of) if isinstance(desc, descriptors.GradAOTOutput) else None


def mutation_target(desc: Any) -> int | None:
    """The position of the input whose new value an output is; None for any other output."""
    return _plain_index(desc.mutated_input) if isinstance(desc, descriptors.InputMutationAOTOutput) else None


def _plain_index(desc: Any) -> int | None:
    return desc.idx if isinstance(desc, descriptors.PlainAOTInput) else None


def checkpoint_region(node: torch.fx.Node) -> int:
    """The number of the `torch.utils.checkpoint` region that wants a node computed again; 0 for none.

    torch counts them from the start of the process.
    """
    if node.meta.get("recompute") not in (CheckpointPolicy.MUST_RECOMPUTE, CheckpointPolicy.PREFER_RECOMPUTE):
        return 0
    return int(node.meta.get("ac_graph_id", 0)) + 1


def fake_mode_of(gm: torch.fx.GraphModule) -> Any:
    """The fake tensor mode that the graph was traced under."""
    for node in gm.graph.find_nodes(op="placeholder"):
        if isinstance(value := node.meta.get("val"), FakeTensor):
            return value.fake_mode
    return None


def dynamo_is_off() -> str | None:
    """Why torch.compile would run a function eagerly now; None where it would capture it."""
    if torch._dynamo.config.disable:
        return "torch._dynamo.config.disable (or TORCHDYNAMO_DISABLE / TORCH_COMPILE_DISABLE) is set"
    stance = torch._dynamo.eval_frame._stance.stance
    if stance not in ("default", "fail_on_recompile"):
        return f"torch.compiler.set_stance({stance!r}) is in force"
    return None


@contextmanager
def capturing(*, in_pieces: bool = False, dynamic: bool | None = None) -> Iterator[None]:
    """Settings of torch.compile for the length of a `with`, so that fewer forwards break the graph.

    Recurrent layers, inner calls of `torch.autograd.grad`, and integers that a module counts with are captured. What
    `print`, `warnings.warn` and loggers are given is told when the graph has run. Left out is what transformers would
    log once (`warning_once`). Nor does torch log what an error says in any case, or that it could not write its own
    metrics. Garbage is collected rarely.
    """
    config = torch._dynamo.config
    found = {getattr(logging.Logger, name, None) for name in ("warning_once", "warning_advice", "info_once")}
    settings: dict[str, Any] = {
        "ignore_logger_methods": config.ignore_logger_methods | (found - {None}),
        "reorderable_logging_functions": config.reorderable_logging_functions | {print, warnings.warn},
        "allow_rnn": True,
        "allow_unspec_int_on_nn_module": dynamic is not True,  # a number of heads is no size
        "trace_autograd_ops": True,
    }
    if in_pieces:  # each layer is captured with its own parameters; what is printed keeps its order
        settings |= {"allow_rnn": False, "recompile_limit": 4096, "accumulated_recompile_limit": 65536}
        del settings["reorderable_logging_functions"]
    loggers = [logging.getLogger(name) for name in _NOISY]
    before, collects = [logger.disabled for logger in loggers], gc.get_threshold()
    for logger in loggers:
        logger.disabled = True
    gc.set_threshold(*map(max, collects, _RARELY) if collects[0] else collects)
    try:
        in_order = _hearing_breaks() if _breaks.told else nullcontext()
        breaks = in_order if in_pieces else told_afterwards()
        with breaks, config.patch({name: value for name, value in settings.items() if hasattr(config, name)}):
            yield
    finally:
        gc.set_threshold(*collects)
        for logger, was in zip(loggers, before, strict=True):
            logger.disabled = was


class WhenCaptured:
    """The settings of `capturing` for the length of a `with`, from when torch begins to capture a call in it.

    They take some 60 us to set, which a call that is not captured need not wait for.
    """

    def __init__(self, dynamic: bool | None) -> None:
        self.dynamic = dynamic

    def __enter__(self) -> None:
        if _begin_settings not in callback.callback_handler.start_callbacks:  # torch.compiler.reset forgets them
            callback.on_compile_start(_begin_settings)
            callback.callback_handler.end_callbacks.insert(0, _end_settings)  # others may raise
        _here.wanted.append(self)

    def __exit__(self, *_: object) -> None:
        _here.wanted.pop()
        if not _here.wanted:
            _here.settings.close()  # if a callback before ours raised, or a reset took ours away


class _Here(threading.local):
    """The calls of models that this thread is in, and the settings that are in force for a capture."""

    def __init__(self) -> None:
        self.wanted: list[WhenCaptured] = []
        self.settings = ExitStack()


_here = _Here()


def _begin_settings(_args: Any) -> None:
    if _here.wanted:
        _here.settings.enter_context(capturing(dynamic=_here.wanted[-1].dynamic))


def _end_settings(_args: Any) -> None:
    _here.settings.close()


_RARELY = (100_000, 50, 1_000)
"""Thresholds of the garbage collector for a capture, which makes many objects that stay."""


_NOISY = ("torch._dynamo.metrics_context", "torch._subclasses.fake_tensor", "torch._dynamo.variables.tensor")
"""Loggers that write tracebacks: torch 2.11 fails to sort functions; operands that do not fit; a break by `.item()`."""


class _Reasons(logging.Handler):
    """Keeps why torch.compile captured a function once too often, which it says to its log alone."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.last = ""

    def emit(self, record: logging.LogRecord) -> None:
        if "last reason" in str(record.msg) and isinstance(record.args, tuple):
            self.last = next((str(a) for a in record.args if re.match(r"\d+/\d+: ", str(a))), "")


_reasons = _Reasons()
logging.getLogger("torch._dynamo.convert_frame").addHandler(_reasons)


def last_guard() -> str:
    """The guard that failed when a function was captured once too often, as text; empty if torch did not say."""
    first = _reasons.last.splitlines()[:1]
    return re.sub(r"^\d+/\d+: |\s+#.*$", "", first[0]).strip() if first else ""


Function = TypeVar("Function", bound=Callable[..., Any])


def never_captured(function: Function) -> Function:
    """`function`, which torch.compile runs as it is, with all that it calls."""
    return cast(Function, torch.compiler.disable(function))  # type: ignore[no-untyped-call]


def seeing_subclasses(gm: fx.GraphModule) -> Callable[..., Any]:
    """A graph, run eagerly with `__torch_function__` of its arguments heeded, which torch.compile's code switches off.

    What it has for `.data` would not heed it in any case.
    """
    for node in gm.graph.nodes:
        if node.target is torch._C._autograd._get_data_attr:  # type: ignore[attr-defined]
            node.target = _data
    gm.recompile()

    def seeing(*args: Any) -> Any:
        with torch._C._EnableTorchFunction():
            return gm.forward(*args)

    return seeing


def _data(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.data


@contextmanager
def without_checkpoints(why: str) -> Iterator[None]:
    """Refuse `torch.utils.checkpoint` for the length of a `with`, but in what is captured: it raises UsageError."""
    module: Any = torch.utils.checkpoint

    def refusing(run: Callable[..., Any]) -> Callable[..., Any]:
        def refuse(*args: Any, **kwargs: Any) -> Any:
            if TracingContext.try_get() is None:
                raise UsageError(why)
            return run(*args, **kwargs)

        return refuse

    names = [n for n in ("CheckpointFunction", "_checkpoint_without_reentrant_generator") if hasattr(module, n)]
    before = {name: getattr(module, name) for name in names}
    for name, found in before.items():
        if name == "CheckpointFunction":
            setattr(module, name, type(name, (), {"apply": staticmethod(refusing(found.apply))}))
        else:
            setattr(module, name, refusing(found))
    try:
        yield
    finally:
        for name, found in before.items():
            setattr(module, name, found)


DECOMPOSED = get_decompositions([torch.ops.aten.softplus_backward])
"""Ops that are captured as simpler ones: the strides that torch says this one's result has are not the real ones."""


@contextmanager
def tangents_of_any_size(is_so: bool) -> Iterator[None]:
    """Have AOTAutograd take gradients of outputs in a format of memory, and not in the sizes and strides of these."""
    with functorch_config.patch(guess_tangent_strides_as_outputs=False) if is_so else nullcontext():
        yield


def raised_without_data(run: Callable[[], Any]) -> Exception | None:
    """Error that a function raises on tensors without data; None if it raises none, or would have to see data.

    No tensor is changed by it.
    """
    is_fake = any(isinstance(mode, FakeTensorMode) for mode in _get_current_dispatch_mode_stack())
    try:
        with capturing(), nullcontext() if is_fake else _without_data():
            run()
    except Exception as error:
        return None if type(error).__module__.startswith(("torch._", "torch.fx")) else error
    return None


@contextmanager
def _without_data() -> Iterator[None]:
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, _Converting(mode):
        yield


class _Converting(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Hands on tensors without data: by itself, torch's mode runs an op in place on what has data."""

    def __init__(self, mode: FakeTensorMode) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.mode = mode

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = pytree.tree_map_only(torch.Tensor, self._fake, (args, kwargs or {}))
        return func(*args, **kwargs)

    def _fake(self, tensor: torch.Tensor) -> torch.Tensor:
        is_fake = isinstance(tensor, FakeTensor)
        return tensor if is_fake else self.mode.from_tensor(tensor, static_shapes=True)


@dataclass(frozen=True)
class _Told:
    """Callback for torch when it begins to capture; two for one function are equal."""

    begun: Callable[[], None]

    def __call__(self, _args: Any) -> None:
        self.begun()


def on_capture(begun: Callable[[], None]) -> None:
    """Have a function called whenever torch begins to capture a call; a second time for the same does nothing.

    `torch.compiler.reset` forgets it.
    """
    if (told := _Told(begun)) not in callback.callback_handler.start_callbacks:
        callback.on_compile_start(told)


class _Breaks(logging.Handler):
    """Hears of graph breaks, which torch.compile says to a log for debugging alone."""

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.told: list[Callable[[str, str], None]] = []

    def emit(self, record: logging.LogRecord) -> None:
        said = record.getMessage()
        place = re.search(r"in user code at (.+:\d+)", said)
        reason = re.sub(r"Encountered graph break when attempting to trace [^\n]*\n+", "", said)
        what = re.search(r"Graph Break Reason: ([^\n]*)", reason)
        for tell in self.told:
            tell(place[1] if place else "", what[1] if what else "")


_breaks = _Breaks()


def on_break(told: Callable[[str, str], None]) -> None:
    """Have a function called with the place, as FILE:LINE, and the reason of each graph break from now on."""
    if told not in _breaks.told:
        _breaks.told.append(told)


@contextmanager
def _hearing_breaks() -> Iterator[None]:
    """Have torch write of breaks to `_breaks`, and to nobody else who has not asked for it by TORCH_LOGS."""
    logger = logging.getLogger("torch._dynamo.symbolic_convert.__graph_breaks")
    before = logger.level, logger.propagate
    if not logger.isEnabledFor(logging.DEBUG):
        logger.setLevel(logging.DEBUG)
        logger.propagate = False
    logger.addHandler(_breaks)
    try:
        yield
    finally:
        logger.removeHandler(_breaks)
        logger.setLevel(before[0])
        logger.propagate = before[1]


def mark_dynamic(tensor: torch.Tensor, dim: int) -> None:
    """Have the next capture take a size of this tensor for a symbol, unless the model allows one size alone."""
    torch._dynamo.maybe_mark_dynamic(tensor, dim)


def compiled_backward_node(tensor: torch.Tensor) -> Any:
    """The autograd node of AOTAutograd's compiled backward behind an output; None if it is not close by."""
    todo, seen = [tensor.grad_fn], 0
    while todo and seen < 16:
        node, seen = todo.pop(0), seen + 1
        if node is None:
            continue
        if node.name().startswith("CompiledFunction"):
            return node
        todo.extend(following for following, _ in node.next_functions)
    return None
