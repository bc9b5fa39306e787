"""Codecs in C++ on processors: one pass over the numbers, where torch's operations make a dozen.

The library is compiled once, by `$CXX` or g++, and kept in a folder of this user alone, by the text that it is made of.
What is loaded is a copy of the bytes that were checked. Without a compiler, and for dtypes that C++ does not know here,
torch's operations code the numbers: the codes are the same, to the last bit.
"""

from __future__ import annotations

import ctypes
import hashlib
import math
import os
import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import torch

from zgraph.bridge.private_files import private_folder, read_sealed, write_sealed
from zgraph.bridge.processor import processor
from zgraph.environment import cache_folder
from zgraph.errors import CacheError, in_one_line
from zgraph.ir.codecs import Blockwise, Codec, TopK

SOURCE = Path(__file__).with_name("codecs.cpp")

FLAGS = ("-O3", "-march=native", "-std=c++17", "-fPIC", "-shared", "-ffp-contract=off", "-fno-math-errno")
"""Of the compiler. `-ffast-math` would round otherwise than torch does."""

MAX_BYTES = 16 << 20
"""A library that is longer is not kept; it takes some 50 KB."""

COMPILE_S = 120
"""Seconds that the compiler may take."""

SHARED_NUMEL = 1 << 20
"""Numbers from which on torch's threads share a row."""

_DTYPES = {torch.float32: False, torch.bfloat16: True}

Tensor = torch.Tensor

_Code = tuple[int, ...]
"""Where the two parts of a code are, and how it was made: the first arguments of the library's functions."""


def encode_row(codec: Codec, numbers: Tensor, code: Tensor, rest: Tensor | None) -> bool:
    """Code one row, as `zgraph.bridge.codecs.encode_into` does. False, and nothing is written, where C++ cannot.

    Args:
        codec: how.
        numbers: [numel].
        code: [num_bytes], written.
        rest: [numel] in fp32, added and written; None codes the numbers alone.
    """
    dense = (numbers, code) if rest is None else (numbers, code, rest)
    if numbers.dtype not in _DTYPES or (library := _library(*dense)) is None:
        return False

    def part(begin: int, end: int, of: _Code) -> None:
        left = None if rest is None else _at(rest, begin)
        library.encode(*of, end - begin, _at(numbers, begin), _DTYPES[numbers.dtype], left)

    _in_parts(codec, numbers.numel(), code, part)
    return True


def add_row(codec: Codec, code: Tensor, total: Tensor) -> bool:
    """Add what the code of a row stands for, as `add_decoded` does. False, and nothing is added, where C++ cannot.

    Args:
        codec: how it was made.
        code: [num_bytes].
        total: [numel] in fp32.
    """
    if total.dtype != torch.float32 or (library := _library(code, total)) is None:
        return False
    _in_parts(codec, total.numel(), code, lambda begin, end, of: library.add(*of, end - begin, _at(total, begin)))
    return True


def sum_rows(codec: Codec, codes: Tensor, out: Tensor, divisor: int) -> bool:
    """Write the sum of what codes stand for, as `sum_decoded` does. False, and nothing is written, where C++ cannot.

    Args:
        codec: how they were made.
        codes: [rows, num_bytes].
        out: [numel] in fp32, written.
        divisor: of the sum.
    """
    if out.dtype != torch.float32 or (library := _library(codes, out)) is None:
        return False

    def part(begin: int, end: int, of: _Code) -> None:
        library.sum(*of, end - begin, _at(out, begin), codes.stride(0), len(codes), divisor)

    _in_parts(codec, out.numel(), codes, part)
    return True


def encode_difference(
    codec: Codec, numbers: Tensor, before: Tensor, kept: Tensor, code: Tensor
) -> tuple[float, float] | None:
    """Code what numbers have changed, as `zgraph.bridge.codecs.encode_difference` does.

    Args:
        codec: how.
        numbers, before: [numel].
        kept: [numel], to which the numbers are written.
        code: [num_bytes], written.

    Returns:
        the norms of the change and of the numbers; None, and nothing is written, where C++ cannot.
    """
    if numbers.dtype not in _DTYPES or (library := _library(numbers, before, kept, code)) is None:
        return None
    squares: list[ctypes.Array[ctypes.c_double]] = []

    def part(begin: int, end: int, of: _Code) -> None:
        squares.append((ctypes.c_double * 2)())
        places = (_at(tensor, begin) for tensor in (numbers, before))
        library.encode_difference(
            *of, end - begin, *places, _DTYPES[numbers.dtype], _at(kept, begin), ctypes.addressof(squares[-1])
        )

    _in_parts(codec, numbers.numel(), code, part)
    return math.sqrt(sum(one[0] for one in squares)), math.sqrt(sum(one[1] for one in squares))


def add_difference(codec: Codec, code: Tensor, before: Tensor, out: Tensor) -> bool:
    """Write numbers that have changed, as `zgraph.bridge.codecs.add_difference` does.

    False, and nothing is written, where C++ cannot.

    Args:
        codec: how the change was coded.
        code: [num_bytes].
        before: [numel], as they were.
        out: [numel], likewise, written.
    """
    if out.dtype not in _DTYPES or (library := _library(code, before, out)) is None:
        return False

    def part(begin: int, end: int, of: _Code) -> None:
        library.add_difference(*of, end - begin, _at(before, begin), _DTYPES[out.dtype], _at(out, begin))

    _in_parts(codec, out.numel(), code, part)
    return True


def _library(*tensors: Tensor) -> ctypes.CDLL | None:
    """The library, if tensors are dense, and on a processor."""
    is_dense = all(tensor.device.type == "cpu" and tensor.is_contiguous() for tensor in tensors)
    return loaded() if is_dense else None


def _at(tensor: Tensor, index: int) -> int:
    """Where a number of a dense tensor is in memory."""
    return tensor.data_ptr() + index * tensor.element_size()


def _in_parts(codec: Codec, numel: int, code: Tensor, part: Callable[[int, int, _Code], None]) -> None:
    """Code or decode a row: on torch's threads, where it is a long one.

    Args:
        codec: how.
        numel: numbers of the row.
        code: of the row; or of rows, of which the first is meant.
        part: does it for numbers from where to where, whose code is told as the library's functions take it.
    """
    count = min(torch.get_num_threads(), numel // SHARED_NUMEL) or 1
    parts = [
        (begin, end, (code.data_ptr() + first, code.data_ptr() + second, *_how(codec, end - begin)))
        for begin, end, first, second in _places(codec, numel, count)
    ]
    if len(parts) == 1:
        part(*parts[0])
    else:
        list(_threads(torch.get_num_threads()).map(lambda one: part(*one), parts))


def _how(codec: Codec, numel: int) -> tuple[int, int, int, int]:
    """Bits of a number, and numbers of a block; of chunks also how many are kept, and of a last, shorter one."""
    if isinstance(codec, TopK):
        return 0, codec.chunk, codec.kept(codec.chunk), codec.kept(numel % codec.chunk)
    assert isinstance(codec, Blockwise)
    return codec.bits, codec.block, 0, 0


def _places(codec: Codec, numel: int, count: int) -> Iterator[tuple[int, int, int, int]]:
    """Numbers that are coded together, from where to where, and where the two parts of their code begin."""
    assert isinstance(codec, Blockwise | TopK)
    whole = codec.chunk if isinstance(codec, TopK) else codec.block
    size = max(-(-numel // (count * whole)), 1) * whole
    for begin in range(0, numel, size):
        if isinstance(codec, TopK):
            first, second = 2 * codec.num_kept(begin), 2 * (codec.num_kept(numel) + codec.num_kept(begin))
        else:
            first, second = begin // codec.block, -(-numel // codec.block) + begin * codec.bits // 8
        yield begin, min(begin + size, numel), first, second


@cache
def _threads(count: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(count, "zgraph-codecs")


os.register_at_fork(after_in_child=_threads.cache_clear)  # a child has none of its parent's threads


# --- the library ----------------------------------------------------------------------------------------------------


@cache
def loaded() -> ctypes.CDLL | None:
    """The library; None where there is no compiler, or it fails, which is told once."""
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        return None
    try:
        return _opened(_built(compiler))
    except (OSError, subprocess.SubprocessError, CacheError) as error:
        warnings.warn(f"codecs run by torch's operations: {in_one_line(error)}", stacklevel=2)
        return None


def _built(compiler: str) -> bytes:
    """The library, as an earlier run has left it, or compiled now."""
    text = SOURCE.read_bytes()
    version = subprocess.run((compiler, "--version"), capture_output=True, timeout=COMPILE_S, check=True).stdout
    made_of = hashlib.sha256(b"\0".join((text, " ".join(FLAGS).encode(), version, processor().encode())))
    path = private_folder(cache_folder(), "codecs") / f"{made_of.hexdigest()}.so"
    if (held := read_sealed(path, MAX_BYTES)) is not None:
        return held
    with tempfile.TemporaryDirectory(prefix="zgraph-") as folder:
        made = Path(folder, "codecs.so")
        command = (compiler, *FLAGS, "-o", str(made), str(SOURCE))
        subprocess.run(command, capture_output=True, timeout=COMPILE_S, check=True)
        library = made.read_bytes()
    write_sealed(path, library, MAX_BYTES)
    return library


def _opened(library: bytes) -> ctypes.CDLL:
    """A library from its bytes, which nobody can change any more."""
    descriptor = os.memfd_create("zgraph-codecs", os.MFD_CLOEXEC)
    try:
        with os.fdopen(os.dup(descriptor), "wb") as stream:
            stream.write(library)
        found = ctypes.CDLL(f"/proc/self/fd/{descriptor}")
    finally:
        os.close(descriptor)
    pointer, number, integer, truth = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_bool
    code = (pointer, pointer, integer, integer, integer, integer, number)
    for name, types in (
        ("encode", (pointer, truth, pointer)),
        ("add", (pointer,)),
        ("sum", (pointer, number, integer, ctypes.c_float)),
        ("encode_difference", (pointer, pointer, truth, pointer, pointer)),
        ("add_difference", (pointer, truth, pointer)),
    ):
        getattr(found, name).argtypes = (*code, *types)
        getattr(found, name).restype = None
    return found
