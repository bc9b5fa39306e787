"""The Python functions that run in a call: their code, and where they read what may change."""

from __future__ import annotations

import dis
import gc
import hashlib
import os
import sysconfig
import warnings
from collections.abc import Iterable
from pathlib import Path
from types import CodeType, FrameType, FunctionType, ModuleType
from typing import Any

import torch

from zgraph.capture.python_state import PythonState

_TORCH = str(Path(torch.__file__).parent) + os.sep
_STDLIB = tuple(str(Path(sysconfig.get_path(name))) + os.sep for name in ("stdlib", "platstdlib"))
_PACKAGES = (f"{os.sep}site-packages{os.sep}", f"{os.sep}dist-packages{os.sep}")
_SPEAKS = frozenset(id(f) for f in (print, warnings.warn, input))
_APPLY: Any = torch.autograd.Function.apply
_HOOKED: tuple[Any, ...] = (torch.Tensor.register_hook, torch.Tensor.register_post_accumulate_grad_hook)
_IN_BACKWARD = frozenset(id(f.__code__) for f in (_APPLY.__func__, *_HOOKED))
"""Functions that are given what runs in the backward, which a run of the forward does not see."""

_ENVIRONMENT = frozenset(id(f.__code__) for f in (type(os.environ).__getitem__,))


class Unseen(BaseException):
    """A function is about to do what nobody would see: raised in its place, past all handlers of errors."""


class Functions:
    """The Python functions that run while `seen` is the profile of a thread: their code, and the state that they read.

    Functions of torch and of the standard library are left out, which its version says.

    Args:
        state: where what each function reads is noted, before it runs for the first time.
    """

    def __init__(self, state: PythonState) -> None:
        self.state = state
        self.codes: dict[int, CodeType] = {}
        self._met: dict[int, CodeType] = {}
        self._inner: set[int] = set()

    def seen(self, frame: FrameType, event: str, argument: Any) -> None:
        """Profile of a thread: see `sys.setprofile`."""
        if event == "call":
            code = frame.f_code
            if id(code) in _IN_BACKWARD:
                _check_backward(frame)
            if id(code) not in self._met:
                self._met[id(code)] = code
                self._begins(frame, code)
            if code.co_freevars and id(code) in self.codes and id(code) not in self._inner:
                for name in code.co_freevars:
                    self.state.note(frame.f_locals.get(name), f"{name} of {code.co_name}")
        elif event == "c_call" and id(argument) in _SPEAKS and not _is_left_out(frame.f_code):
            raise Unseen(f"it prints, warns or asks at {Path(frame.f_code.co_filename).name}:{frame.f_lineno}")

    def _begins(self, frame: FrameType, code: CodeType) -> None:
        if id(code) in _ENVIRONMENT:
            self.state.note(os.environ.__dict__["_data"], "os.environ")
        if _is_left_out(code):
            return
        self.codes[id(code)] = code
        self._inner |= {id(constant) for constant in code.co_consts if isinstance(constant, CodeType)}
        place = frame.f_globals.get("__name__", "")
        for name in code.co_names:
            if name in frame.f_globals:
                self.state.pick(frame.f_globals, name, place)
                self._pick_within(frame.f_globals[name], code, name, depth=3)

    def _pick_within(self, found: Any, code: CodeType, place: str, depth: int) -> None:
        """Note the attributes of a module or a class that a function may read."""
        if not isinstance(found, ModuleType | type) or not depth:
            return
        held = vars(found)
        for name in code.co_names:
            if name in held:
                self.state.pick(found, name, place)
                if isinstance(found, ModuleType):
                    self._pick_within(held[name], code, f"{place}.{name}", depth - 1)

    def note_closures(self) -> None:
        """Note the closures of the functions that ran, but for those that were made while they ran."""
        codes = {key: code for key, code in self.codes.items() if key not in self._inner}
        for code in codes.values():
            for step in dis.get_instructions(code) if code.co_freevars else ():
                if step.opname == "STORE_DEREF" and step.argval in code.co_freevars:
                    self.state.refuse(f"it changes {step.argval} of {code.co_name}")
        for found in gc.get_referrers(*codes.values()) if codes else ():
            if isinstance(found, FunctionType) and id(found.__code__) in codes:
                self.state.close_over(found)

    @property
    def names(self) -> set[str]:
        """The names of globals and attributes that the functions use."""
        return {name for code in self.codes.values() for name in code.co_names}

    @property
    def digest(self) -> str:
        """A hash of what the functions do, wherever they are written."""
        return _digest(sorted({code_digest(code) for code in self.codes.values()}))


def _check_backward(frame: FrameType) -> None:
    """Raise Unseen for a function of autograd or a hook, whose backward is not torch's."""
    kind = frame.f_locals.get("cls")
    if not isinstance(kind, type):
        raise Unseen("it registers a hook of a tensor, which runs in the backward")
    if kind.__module__.partition(".")[0] not in ("torch", "zgraph"):
        raise Unseen(f"it applies {kind.__qualname__}, whose backward is not seen")


def _is_left_out(code: CodeType) -> bool:
    file = code.co_filename
    if file.startswith(("<frozen", _TORCH, f"{_ZGRAPH}{os.sep}")):
        return True
    return file.startswith(_STDLIB) and not any(part in file for part in _PACKAGES)


_ZGRAPH = str(Path(__file__).parents[1])


def code_digest(code: CodeType) -> str:
    """A hash of what a function does, whatever file and lines it is in."""
    names = code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars
    return _digest([code.co_code.hex(), str(names), str(code.co_flags), *map(_constant_word, code.co_consts)])


def _constant_word(constant: Any) -> str:
    if isinstance(constant, CodeType):
        return code_digest(constant)
    if isinstance(constant, frozenset):
        return f"frozenset {sorted(map(repr, constant))}"
    if isinstance(constant, tuple):
        return f"({', '.join(map(_constant_word, constant))})"
    return f"{type(constant).__name__} {constant!r}"


def _digest(words: Iterable[str]) -> str:
    return hashlib.sha256("\0".join(words).encode()).hexdigest()
