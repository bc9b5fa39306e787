"""The two ways between torch's things and their names in the IR: ops, dtypes, devices, arguments."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import torch

from zgraph.ir import Arg, DType, Foreign, Token, Value

TO_TORCH: dict[DType, torch.dtype] = {
    DType.f64: torch.float64, DType.f32: torch.float32, DType.f16: torch.float16, DType.bf16: torch.bfloat16,
    DType.f8e4m3: torch.float8_e4m3fn, DType.f8e5m2: torch.float8_e5m2, DType.c64: torch.complex64,
    DType.c128: torch.complex128, DType.i64: torch.int64, DType.i32: torch.int32, DType.i16: torch.int16,
    DType.i8: torch.int8, DType.u8: torch.uint8, DType.u16: torch.uint16, DType.u32: torch.uint32,
    DType.u64: torch.uint64, DType.bool: torch.bool,
}  # fmt: skip
FROM_TORCH: dict[torch.dtype, DType] = {theirs: ours for ours, theirs in TO_TORCH.items()}


def compute_dtype(tensor: torch.Tensor, param_dtype: torch.dtype | None) -> torch.dtype:
    """The dtype that a parameter is computed with: `param_dtype`, if there is one and the parameter is a float."""
    return param_dtype if param_dtype is not None and tensor.is_floating_point() else tensor.dtype


_LAYOUTS = {str(x).removeprefix("torch."): x for x in (torch.strided, torch.sparse_coo)}
_MEMORY_FORMATS = {
    str(x).removeprefix("torch."): x
    for x in (torch.contiguous_format, torch.preserve_format, torch.channels_last, torch.channels_last_3d)
}
_MODULES = {"py": operator, "math": math, "torch": torch}
_FUNCTIONS = {
    "py": frozenset(
        {
            "abs", "add", "and_", "eq", "floordiv", "ge", "getitem", "gt", "index", "invert", "le", "lshift", "lt",
            "matmul", "mod", "mul", "ne", "neg", "not_", "or_", "pos", "pow", "rshift", "sub", "truediv", "truth",
            "xor",
        }
    ),
    "math": frozenset({"ceil", "floor", "sqrt", "trunc"}),
    "torch": frozenset(
        {
            "sym_float", "sym_int", "sym_ite", "sym_max", "sym_min", "sym_not", "sym_sum", "_sym_sqrt", "_sym_ceil",
            "_sym_floor",
        }
    ),
}  # fmt: skip
"""The functions on numbers that a graph may call. A file names them, so that the list is closed."""

_NAMESPACES = {"aten", "prims", "prim", "zgraph", "torchvision"}
"""Libraries of ops that a graph may name: these, and those that a model of this process was captured with."""

_ALIASING = frozenset({"aten._unsafe_view.default", "aten._reshape_alias.default"})
"""Ops whose schema promises a fresh result, but whose result lies in the memory of their first argument."""


def op_name(target: Any) -> str | None:
    """The IR's name for what an FX node calls; None for what the IR does not know (a higher-order op, say)."""
    if isinstance(target, torch._ops.OpOverload):
        _NAMESPACES.add(target.namespace)
        return f"{target.namespace}.{target._opname}.{target._overloadname}"
    for prefix, module in _MODULES.items():
        name = getattr(target, "__name__", "")
        if name in _FUNCTIONS[prefix] and getattr(module, name, None) is target:
            return f"{prefix}.{name}"
    return None


@cache
def resolve(name: str) -> Callable[..., Any]:
    """The callable that `op_name` named. Nothing else can be named: a graph may come from a file.

    Raises:
        LookupError: this torch has no such op, or a graph may not name it.
    """
    prefix, *rest = name.split(".")
    if prefix in _MODULES:
        if len(rest) != 1 or rest[0] not in _FUNCTIONS[prefix] or not hasattr(_MODULES[prefix], rest[0]):
            raise LookupError(f"{name} is no function on numbers that a graph may call")
        return getattr(_MODULES[prefix], rest[0])  # type: ignore[no-any-return]
    if prefix not in _NAMESPACES or len(rest) != 2:
        raise LookupError(f"{name} is no op: a graph names ops of {', '.join(sorted(_NAMESPACES))}, with an overload")
    packet = getattr(getattr(torch.ops, prefix), rest[0], None)
    found = getattr(packet, rest[1], None) if isinstance(packet, torch._ops.OpOverloadPacket) else None
    if not isinstance(found, torch._ops.OpOverload):
        raise LookupError(f"this torch ({torch.__version__}) has no op called {name}")
    return found


def effects(target: Any, name: str, args: Sequence[Any], kwargs: Mapping[str, Any], *, multi: bool) -> Foreign:
    """What the schema says about the effects of a call. An op outside ATen has effects that no schema tells."""
    if not isinstance(target, torch._ops.OpOverload):
        return Foreign(multi=multi)
    views: list[int] = []
    writes: list[int] = []
    for position, argument in enumerate(target._schema.arguments):
        if argument.alias_info is not None:
            (writes if argument.alias_info.is_write else views).append(position)
    if name in _ALIASING:
        views = [0]
    if writes and any(r.alias_info is not None for r in target._schema.returns):
        views += writes
    return Foreign(
        views=tuple(views), writes=tuple(writes), random=draws(target, args, kwargs), multi=multi,
        opaque=target.namespace not in ("aten", "prims", "prim"),
    )  # fmt: skip


def draws(target: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether a call draws random numbers: an attention without dropout does not."""
    if torch.Tag.nondeterministic_seeded not in getattr(target, "tags", ()):
        return False
    names = [a.name for a in target._schema.arguments]
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    return "dropout_p" not in names or bool(given.get("dropout_p"))


def from_torch(arg: Any, value: Callable[[Any], Value]) -> Arg:
    """An FX argument as the IR's. `value` turns an `fx.Node` into a value. Raises TypeError for what has no form."""
    match arg:
        case None | bool() | int() | float() | str():
            return math.nan if isinstance(arg, float) and math.isnan(arg) else arg
        case torch.dtype():
            return FROM_TORCH[arg]
        case torch.device():
            return Token("device", arg.type)
        case torch.layout():
            return Token("layout", str(arg).removeprefix("torch."))
        case torch.memory_format():
            return Token("memory_format", str(arg).removeprefix("torch."))
        case list() | tuple():
            return tuple(from_torch(item, value) for item in arg)
        case torch.fx.Node():
            return value(arg)
    raise TypeError(f"an argument of type {type(arg).__name__} has no form in the IR")


def to_torch(arg: Arg, device: torch.device, value: Callable[[Value], Any]) -> Any:
    """An argument of the IR as torch's. `value` says what stands for a value; `device` is this rank's."""
    match arg:
        case Value():
            return value(arg)
        case DType():
            return TO_TORCH[arg]
        case Token(kind="device", name=name):
            return device if name == device.type else torch.device(name)
        case Token(kind="layout", name=name):
            return _LAYOUTS[name]
        case Token(name=name):
            return _MEMORY_FORMATS[name]
        case tuple():
            return [to_torch(item, device, value) for item in arg]
    return arg
