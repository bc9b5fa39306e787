"""Codecs in C++ on processors: one pass over the numbers, where torch's operations make a dozen.

The library is compiled once, by `$CXX` or g++, and kept in a folder of this user alone, by the text that it is made of.
What is loaded is a copy of the bytes that were checked. Without a compiler, and for dtypes that C++ does not know here,
torch's operations code the numbers: the codes are the same, to the last bit.
"""

from __future__ import annotations

import ctypes
import hashlib
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
from zgraph.ir.codecs import Blockwise, Codec, Sign, TopK

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


def encode_row(codec: Codec, numbers: torch.Tensor, code: torch.Tensor, rest: torch.Tensor | None) -> bool:
    """Code one row, as `zgraph.bridge.codecs.encode_into` does. False, and nothing is written, where C++ cannot.

    Args:
        codec: how.
        numbers: [numel].
        code: [num_bytes], written.
        rest: [numel] in fp32, added and written; None codes the numbers alone.
    """
    dense = (numbers, code) if rest is None else (numbers, code, rest)
    if numbers.dtype not in _DTYPES or not _is_dense(*dense) or (library := loaded()) is None:
        return False
    source, size = numbers.data_ptr(), numbers.element_size()
    of_rest, is_short = (0 if rest is None else rest.data_ptr()), _DTYPES[numbers.dtype]

    function = getattr(library, f"encode_{_kind(codec)}")

    def part(begin: int, end: int, first: int, second: int) -> None:
        left = of_rest + 4 * begin if of_rest else None
        function(source + size * begin, is_short, left, first, second, 0, end - begin, *_sizes(codec, end - begin))

    return _in_parts(codec, numbers.numel(), code, part)


def add_row(codec: Codec, code: torch.Tensor, total: torch.Tensor) -> bool:
    """Add what the code of a row stands for, as `add_decoded` does. False, and nothing is added, where C++ cannot.

    Args:
        codec: how it was made.
        code: [num_bytes].
        total: [numel] in fp32.
    """
    if total.dtype != torch.float32 or not _is_dense(code, total) or (library := loaded()) is None:
        return False
    into, function = total.data_ptr(), getattr(library, f"decode_{_kind(codec)}")

    def part(begin: int, end: int, first: int, second: int) -> None:
        function(first, second, into + 4 * begin, 0, end - begin, *_sizes(codec, end - begin))

    return _in_parts(codec, total.numel(), code, part)


def _is_dense(*tensors: torch.Tensor) -> bool:
    return all(tensor.device.type == "cpu" and tensor.is_contiguous() for tensor in tensors)


def _kind(codec: Codec) -> str:
    """The end of the names of a codec's functions."""
    return "topk" if isinstance(codec, TopK) else "sign" if isinstance(codec, Sign) else "q"


def _sizes(codec: Codec, numel: int) -> tuple[int, ...]:
    """The last arguments of a codec's functions; of chunks also how many are kept, and of a last, shorter one."""
    if isinstance(codec, TopK):
        return codec.chunk, codec.kept(codec.chunk), codec.kept(numel % codec.chunk)
    assert isinstance(codec, Blockwise)
    return (codec.block,) if isinstance(codec, Sign) else (codec.block, codec.bits)


def _in_parts(codec: Codec, numel: int, code: torch.Tensor, part: Callable[[int, int, int, int], None]) -> bool:
    """Code or decode a row: on torch's threads, where it is a long one."""
    at = code.data_ptr()
    count = min(torch.get_num_threads(), numel // SHARED_NUMEL) or 1
    parts = [(begin, end, at + first, at + second) for begin, end, first, second in _places(codec, numel, count)]
    if len(parts) == 1:
        part(*parts[0])
    else:
        list(_threads(torch.get_num_threads()).map(lambda one: part(*one), parts))
    return True


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
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    parts = pointer, pointer, number, number, ctypes.c_int
    for name, more in (("q", 1), ("sign", 0), ("topk", 2)):
        rest = (ctypes.c_int,) * more
        for function, types in (
            (f"encode_{name}", (pointer, ctypes.c_bool, pointer, *parts, *rest)),
            (f"decode_{name}", (pointer, pointer, pointer, number, number, ctypes.c_int, *rest)),
        ):
            getattr(found, function).argtypes = types
            getattr(found, function).restype = None
    return found
