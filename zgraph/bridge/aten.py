"""The two ways between torch's things and their names in the IR: ops, dtypes, devices, arguments."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import torch

from zgraph.bridge.private_higher_order import CALLS, HigherOrderOperator
from zgraph.errors import UnknownOpError
from zgraph.ir import HIGHER_ORDER, Arg, DType, ExternalOp, Graph, Token, Value, allow_namespace
from zgraph.ir.external_ops import facts
from zgraph.ir.graph import graphs_in
from zgraph.ir.names import SCALAR_FUNCTIONS, TOKENS, refusal, token_refusal

TO_TORCH: dict[DType, torch.dtype] = {
    DType.f64: torch.float64,
    DType.f32: torch.float32,
    DType.f16: torch.float16,
    DType.bf16: torch.bfloat16,
    DType.f8e4m3: torch.float8_e4m3fn,
    DType.f8e5m2: torch.float8_e5m2,
    DType.c64: torch.complex64,
    DType.c128: torch.complex128,
    DType.i64: torch.int64,
    DType.i32: torch.int32,
    DType.i16: torch.int16,
    DType.i8: torch.int8,
    DType.u8: torch.uint8,
    DType.u16: torch.uint16,
    DType.u32: torch.uint32,
    DType.u64: torch.uint64,
    DType.bool: torch.bool,
}
FROM_TORCH: dict[torch.dtype, DType] = {theirs: ours for ours, theirs in TO_TORCH.items()}


def compute_dtype(tensor: torch.Tensor, param_dtype: torch.dtype | None) -> torch.dtype:
    """The dtype that a parameter is computed with: `param_dtype`, if there is one and the parameter is a float."""
    return param_dtype if param_dtype is not None and tensor.is_floating_point() else tensor.dtype


_LAYOUTS = {name: getattr(torch, name) for name in TOKENS["layout"]}
_MEMORY_FORMATS = {name: getattr(torch, name) for name in TOKENS["memory_format"]}
_MODULES = {"py": operator, "math": math, "torch": torch}


def op_name(target: Any) -> str | None:
    """The IR's name for what an FX node calls; None for what the IR does not know.

    Texts may name the ops of a library from then on: it has been called here.
    """
    if isinstance(target, torch._ops.OpOverload):
        allow_namespace(target.namespace)
        return f"{target.namespace}.{target._opname}.{target._overloadname}"
    if isinstance(target, HigherOrderOperator):
        return f"{HIGHER_ORDER}.{target.__name__}.default" if target.__name__ in CALLS else None
    for prefix, module in _MODULES.items():
        name = getattr(target, "__name__", "")
        if name in SCALAR_FUNCTIONS[prefix] and getattr(module, name) is target:
            return f"{prefix}.{name}"
    return None


@cache
def resolve(name: str) -> Callable[..., Any]:
    """The callable that `op_name` named, and nothing else: an overload of a registered op, a function on sizes, or a
    higher-order op.

    Raises:
        UnknownOpError: the name is none of these, or this torch has no such op.
    """
    if wrong := refusal(name):
        raise UnknownOpError(wrong)
    prefix, op, *overload = name.split(".")
    if prefix in _MODULES:
        return getattr(_MODULES[prefix], op)  # type: ignore[no-any-return]
    if prefix == HIGHER_ORDER:
        return CALLS[op]
    packet = getattr(getattr(torch.ops, prefix), op, None)
    found = getattr(packet, overload[0], None) if isinstance(packet, torch._ops.OpOverloadPacket) else None
    if not isinstance(found, torch._ops.OpOverload):
        raise UnknownOpError(
            f"this torch ({torch.__version__}) has no op called {name}; import the library that has it, or capture the "
            "model again with this torch"
        )
    return found


def effects(target: Any, name: str, args: Sequence[Arg], kwargs: Mapping[str, Arg], *, multi: bool) -> ExternalOp:
    """Effects of a call, read off the op's schema. An op outside ATen has effects that no schema tells.

    Those of a higher-order op are its functions'. It returns new memory.
    """
    if name.startswith(f"{HIGHER_ORDER}."):
        rows = [
            effects(resolve(node.op), node.op, node.args, dict(node.kwargs), multi=False)
            for graph in graphs_in(tuple(args))
            for node in graph.nodes
        ]
        return ExternalOp(random=any(r.random for r in rows), multi=True, opaque=any(r.opaque for r in rows))
    if not isinstance(target, torch._ops.OpOverload):
        return ExternalOp(multi=multi)
    views: list[int] = []
    writes: list[int] = []
    for position, argument in enumerate(target._schema.arguments):
        if argument.alias_info is not None:
            (writes if argument.alias_info.is_write else views).append(position)
    if facts(name).hides_view:
        views = [0]
    if writes and any(r.alias_info is not None for r in target._schema.returns):
        views += writes
    return ExternalOp(
        views=tuple(views),
        writes=tuple(writes),
        random=draws(target, args, kwargs),
        multi=multi,
        opaque=target.namespace not in ("aten", "flex_lib", "prims", "prim"),
    )


def draws(target: Any, args: Sequence[Arg], kwargs: Mapping[str, Arg]) -> bool:
    """Whether a call draws random numbers: an attention without dropout does not."""
    if torch.Tag.nondeterministic_seeded not in getattr(target, "tags", ()):
        return False
    names = [a.name for a in target._schema.arguments]
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    return "dropout_p" not in names or bool(given.get("dropout_p"))


def from_torch(arg: Any, value: Callable[[Any], Value | Graph]) -> Arg:
    """An FX argument as the IR's. Raises TypeError for what has no form.

    Args:
        arg: the argument; a dict becomes a list of pairs.
        value: turns an `fx.Node` into a value, or into a function that a higher-order op calls.
    """
    match arg:
        case None | bool() | int() | float() | str():
            return math.nan if isinstance(arg, float) and math.isnan(arg) else arg
        case torch.dtype():
            return FROM_TORCH[arg]
        case torch.device():
            return _token("device", arg.type)
        case torch.layout():
            return _token("layout", str(arg).removeprefix("torch."))
        case torch.memory_format():
            return _token("memory_format", str(arg).removeprefix("torch."))
        case list() | tuple():
            return tuple(from_torch(item, value) for item in arg)
        case dict():
            return tuple((str(key), from_torch(item, value)) for key, item in arg.items())
        case torch.fx.Node():
            return value(arg)
    raise TypeError(f"an argument of type {type(arg).__name__} has no form in the IR")


def _token(kind: str, name: str) -> Token:
    if wrong := token_refusal(kind, name):
        raise TypeError(wrong)
    return Token(kind, name)


def to_torch(arg: Arg, device: torch.device, value: Callable[[Value], Any]) -> Any:
    """An argument of the IR as torch's. `value` says what stands for a value; `device` is this rank's, which is a GPU's
    place too where that is a processor.
    """
    match arg:
        case Value():
            return value(arg)
        case DType():
            return TO_TORCH[arg]
        case Token(kind="device", name=name):
            return device if name in (device.type, "cuda") else torch.device(name)
        case Token(kind="layout", name=name):
            return _LAYOUTS[name]
        case Token(name=name):
            return _MEMORY_FORMATS[name]
        case Graph():
            return Function(arg, device)
        case tuple():
            return [to_torch(item, device, value) for item in arg]
    return arg


class Function:
    """A function that a higher-order op calls: from the inputs of a graph to its outputs, a tuple.

    Raises:
        UnknownOpError: an op of it writes to memory, or this torch does not have it.
    """

    def __init__(self, graph: Graph, device: torch.device) -> None:
        self.graph, self.device = graph, device
        self.calls = [(node, resolve(node.op)) for node in graph.nodes]
        if wrong := next((n.op for n, op in self.calls if getattr(getattr(op, "_schema", None), "is_mutable", 0)), ""):
            raise UnknownOpError(f'the function "{graph.name}" has {wrong}, which writes to memory; use another op')
        last = {name: users[-1] for name, users in graph.users.items() if name not in graph.output_names}
        self.frees: list[list[str]] = [[] for _ in graph.nodes]
        for name, position in last.items():
            self.frees[position].append(name)

    def __call__(self, *inputs: Any) -> tuple[Any, ...]:
        values = dict(zip((i.value.name for i in self.graph.inputs), inputs, strict=True))

        def of(value: Value) -> Any:
            return values[value.name]

        for (node, op), dead in zip(self.calls, self.frees, strict=True):
            args = [to_torch(a, self.device, of) for a in node.args]
            made = op(*args, **{k: to_torch(a, self.device, of) for k, a in node.kwargs})
            results = made if isinstance(made, list | tuple) else [made]
            values.update((r.name, m) for r, m in zip(node.results, results, strict=True))
            for name in dead:
                del values[name]
        return tuple(None if o.value is None else values[o.value.name] for o in self.graph.outputs)
