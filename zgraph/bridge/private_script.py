"""Functions for the interpreter of TorchScript, built call by call: Python calls all of their ops at once.

Nothing is compiled or fused: the same kernels run in the same order. Tried on torch 2.13.0.
"""

from __future__ import annotations

import ctypes
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import torch

from zgraph.errors import UnknownOpError

_C: Any = torch._C

_FORMATS = {
    torch.contiguous_format: 0,
    torch.preserve_format: 1,
    torch.channels_last: 2,
    torch.channels_last_3d: 3,
}
"""The numbers of `c10::MemoryFormat`, which the interpreter's constants have no form for."""

Handle = Any
"""A value within a function that is built."""


@cache
def has_interpreter() -> bool:
    """Whether this torch has what is needed here."""
    names = ("Graph", "ScriptList", "ListType", "_AutoDispatchBelowADInplaceOrView", "_create_function_from_graph")
    return all(hasattr(_C, name) for name in names) and _rethrows() is not None


@cache
def _rethrows() -> Any:
    """The setting by which errors of ops leave the interpreter as they are; None where torch does not show it.

    Without it each would be a RuntimeError, and that of a dispatch mode would have no text.
    """
    library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    try:
        return ctypes.c_bool.in_dll(ctypes.CDLL(str(library)), "FLAGS_torch_jit_enable_rethrow_caught_exception")
    except (OSError, ValueError):
        return None


class _Settings:
    """Settings of the interpreter for the length of a `with`: it neither measures nor fuses, and lets errors through.

    Whether it optimises is a setting of each thread; whether it lets errors through is one of the process, which the
    first thread in it changes and the last changes back.
    """

    def __init__(self, rethrows: Any) -> None:
        self.rethrows, self.lock, self.count, self.rethrew = rethrows, threading.Lock(), 0, False
        self.thread = threading.local()

    def __enter__(self) -> None:
        with self.lock:
            self.count += 1
            if self.count == 1:
                self.rethrew, self.rethrows.value = self.rethrows.value, True
        self.thread.optimised = _C._get_graph_executor_optimize()
        _C._set_graph_executor_optimize(False)

    def __exit__(self, *_: object) -> None:
        _C._set_graph_executor_optimize(self.thread.optimised)
        with self.lock:
            self.count -= 1
            if self.count == 0:
                self.rethrows.value = self.rethrew


@cache
def _settings() -> _Settings:
    return _Settings(_rethrows())


def _empty_list(of: torch.Tensor) -> Any:
    """A list of tensors as the interpreter has them, which learns the kind from one."""
    made = _C.ScriptList([of])
    made.clear()
    return made


class Script:
    """A function of the interpreter in the making: a list of tensors, which it empties, and numbers, to tensors.

    Args:
        num_tensors: length of the list.
        kinds: of each number: int, float or bool.
    """

    def __init__(self, num_tensors: int, kinds: Sequence[str]) -> None:
        self.graph = _C.Graph()
        self.tensors: list[Handle] = []
        self.has_tensors = num_tensors > 0
        if self.has_tensors:
            given = self._input(_C.ListType.ofTensors())
            self.tensors = self._add("prim::ListUnpack", [given], num_tensors)
            self._add("aten::clear", [given], 0)  # what the caller let go of lives as long as it is read
        self.numbers = [self._input(getattr(_C, f"{kind.capitalize()}Type").get()) for kind in kinds]

    def call(self, op: Any, args: Sequence[Any], kwargs: Mapping[str, Any], num_results: int) -> list[Handle]:
        """A call of an overload.

        Args:
            op: the overload.
            args, kwargs: handles, constants, and lists of them.
            num_results: how many tensors it returns.

        Raises:
            UnknownOpError: the interpreter would call another overload, or has no form for an argument.
        """
        schema = op._schema
        returns = [str(r.type) for r in schema.returns]
        is_list = returns == ["List[Tensor]"]
        if not is_list and (set(returns) != {"Tensor"} or len(returns) != num_results):
            raise UnknownOpError(f"{op} returns {', '.join(returns)}")
        given = [
            self._argument(args[i] if i < len(args) else kwargs.get(a.name, a.default_value), a)
            for i, a in enumerate(schema.arguments)
        ]
        node = self.graph.create(schema.name, given, 1 if is_list else num_results)
        self.graph.appendNode(node)
        try:
            found = node.schema()
        except RuntimeError as error:
            raise UnknownOpError(f"the interpreter has no such call of {op}") from error
        if found != str(schema):
            raise UnknownOpError(f"the interpreter takes {found} for {op}")
        results = list(node.outputs())
        if not is_list:
            return results
        results[0].setType(_C.ListType.ofTensors())
        return self._add("prim::ListUnpack", results, num_results)

    def function(
        self, name: str, results: Sequence[Handle | None], *, tracks_views: bool = True
    ) -> Callable[..., tuple[torch.Tensor, ...]]:
        """The function, which takes its tensors in a list that it empties, and then its numbers.

        Args:
            name: what torch calls it.
            results: what it returns; None stays None.
            tracks_views: whether a result knows that it is a view. Where nobody asks, ops are called below autograd's
                bookkeeping, in some two thirds of the time.
        """
        given = [self.graph.insertConstant(None) if r is None else r for r in results]
        (whole,) = self._add("prim::TupleConstruct", given, 1)
        whole.setType(_C.TupleType([handle.type() for handle in given]))
        self.graph.registerOutput(whole)
        run: Any = _C._create_function_from_graph(name, self.graph)
        settings = _settings()
        below = nullcontext if tracks_views else _C._AutoDispatchBelowADInplaceOrView
        if not self.has_tensors:

            def of_numbers(_tensors: list[torch.Tensor], *numbers: Any) -> tuple[torch.Tensor, ...]:
                with settings, below():
                    return run(*numbers)  # type: ignore[no-any-return]

            return of_numbers
        spare, example = list[Any](), torch.empty(0)

        def interpreted(tensors: list[torch.Tensor], *numbers: Any) -> tuple[torch.Tensor, ...]:
            given = spare.pop() if spare else _empty_list(example)
            given.extend(tensors)
            tensors.clear()
            with settings, below():
                made = run(given, *numbers)
            spare.append(given)  # the function emptied it; making one takes longer than the call of an op
            return made  # type: ignore[no-any-return]

        return interpreted

    def _input(self, kind: Any) -> Handle:
        made = self.graph.addInput()
        made.setType(kind)
        return made

    def _add(self, kind: str, given: Sequence[Handle], num_results: int) -> list[Handle]:
        node = self.graph.create(kind, list(given), num_results)
        self.graph.appendNode(node)
        return list(node.outputs())

    def _argument(self, given: Any, argument: Any) -> Handle:
        if isinstance(given, _C.Value):
            return given
        if isinstance(given, list | tuple):
            if given and not any(isinstance(item, _C.Value) for item in given) and None not in given:
                return self._constant(list(given), argument)
            items = [self._argument(item, argument) for item in given]
            (made,) = self._add("prim::ListConstruct", items, 1)
            wanted = _list_type(argument)
            if not all(item.type().isSubtypeOf(wanted.getElementType()) for item in items):
                raise UnknownOpError(f"{argument.name} is a list of {wanted.getElementType()}, not of {given}")
            made.setType(wanted)
            return made
        return self._constant(given, argument)

    def _constant(self, given: Any, argument: Any) -> Handle:
        if isinstance(given, torch.memory_format):
            given = _FORMATS[given]
        try:
            return self.graph.insertConstant(given)
        except (TypeError, RuntimeError) as error:
            raise UnknownOpError(f"the interpreter has no constant for {argument.name}={given!r}") from error


_LISTS: Mapping[str, Callable[[], Any]] = {
    "List[int]": lambda: _C.ListType.ofInts(),
    "List[float]": lambda: _C.ListType.ofFloats(),
    "List[bool]": lambda: _C.ListType.ofBools(),
    "List[Tensor]": lambda: _C.ListType.ofTensors(),
    "List[Optional[Tensor]]": lambda: _C.ListType(_C.OptionalType(_C.TensorType.get())),
}


def _list_type(argument: Any) -> Any:
    name = re.sub(r"^Optional\[(List\[.*\])\]$", r"\1", str(argument.type))
    if name not in _LISTS:
        raise UnknownOpError(f"{argument.name} is a {name}")
    return _LISTS[name]()
