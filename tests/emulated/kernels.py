"""Kernels of Triton on the device: its interpreter runs them, and what they read and write goes into the log."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from triton.runtime import interpreter

from tests.emulated import cuda
from zgraph.bridge import private_graphs
from zgraph.compiler import autotune


def watch() -> None:
    """Have launches written down.

    Tuning takes one round, since the interpreter's times say nothing. It leaves Inductor out, which finds no compiler
    for GPUs in this torch.
    """
    launch = interpreter.GridExecutor.__call__

    def launched(self: Any, *args: Any, **kwargs: Any) -> Any:
        if cuda.is_capturing():
            placed = [_unheld(a) for a in args]
            named = {name: _unheld(a) for name, a in kwargs.items()}
            for tensor in _on_device(*args, *kwargs.values()):
                cuda.keep(tensor.data_ptr(), _num_bytes(tensor))
            cuda.record_launch(lambda: launched(self, *placed, **named))
            return launch(self, *args, **kwargs)
        tensors = _on_device(*args, *kwargs.values())
        before = [_content(t) for t in tensors]
        result = launch(self, *args, **kwargs)
        for tensor, content in zip(tensors, before, strict=True):
            writes = _content(tensor) != content
            cuda.touch(f"kernel {self.fn.__name__}", tensor.data_ptr(), _num_bytes(tensor), writes=writes)
        return result

    interpreter.GridExecutor.__call__ = launched
    autotune.NUM_WARMUPS = autotune.NUM_ROUNDS = 1
    autotune.FLUSH_BYTES = 1 << 20


def _on_device(*given: Any) -> list[torch.Tensor]:
    return [t for t in given if isinstance(t, torch.Tensor) and t.is_cuda and t.numel()]


def _unheld(given: Any) -> Any:
    """A tensor by its address."""
    return private_graphs.alias(given) if isinstance(given, torch.Tensor) and given.is_cuda else given


def _num_bytes(tensor: torch.Tensor) -> int:
    """From the first element to the last."""
    numel = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return numel * tensor.itemsize


def _content(tensor: torch.Tensor) -> bytes:
    return ctypes.string_at(tensor.data_ptr(), _num_bytes(tensor))
