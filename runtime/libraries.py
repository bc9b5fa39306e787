"""Regions as libraries of C++, which AOTInductor makes: each is one call from Python.

The compiler of C++ takes seconds for each, so that they are compiled at the same time, and kept from one run to the
next, in a folder of this user alone. A file there is used if it is whole and was made of the very text at hand; one
that is not is written anew. What is loaded is a copy of the bytes that were checked.
"""

from __future__ import annotations

import hashlib
import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import Context
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from zgraph.bridge import private_aot
from zgraph.bridge.private_files import private_folder, read_sealed, write_sealed
from zgraph.bridge.private_inductor import Example
from zgraph.environment import cache_folder, ranks_here
from zgraph.errors import CacheError, in_one_line
from zgraph.runtime.region import Compute

MAX_BYTES = 64 << 20
"""A library that is longer is not kept; one of a region takes some 200 KB."""

LENGTH_BYTES = 8

Ready = Callable[[], Compute]
"""Function that waits until something is compiled, and gives what runs it."""


def folder() -> Path:
    """Folder of the libraries: a folder of this user alone.

    Raises:
        CacheError: it cannot be one.
    """
    return private_folder(cache_folder(), "regions")


@dataclass
class Libraries:
    """Libraries of one model's regions.

    `num_built` counts those that were compiled, `num_kept` those that an earlier run has left, and `left` the regions
    that Inductor's own code calls, by the reason.
    """

    num_built: int = 0
    num_kept: int = 0
    left: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        num_workers = max(private_aot.num_compilers() // max(ranks_here(), 1), 1)
        self._pool = ThreadPoolExecutor(num_workers, "zgraph-regions")
        weakref.finalize(self, self._pool.shutdown, wait=False)

    def __str__(self) -> str:
        kept = f", {self.num_kept} of them kept from before" if self.num_kept else ""
        left = "".join(f"; {count} called by Inductor's own code: {why}" for why, count in self.left.items())
        return f"{self.num_built + self.num_kept} as libraries of C++{kept}{left}"

    def begin(
        self,
        function: Callable[..., Sequence[Any]],
        examples: Sequence[Example],
        context: Context,
        otherwise: Callable[[], Ready],
    ) -> Ready:
        """Begin to make a library of a function of tensors; what is returned waits for it.

        Args:
            function: is traced.
            examples: what it will be given.
            context: in which it is lowered.
            otherwise: begins to compile it in another way, where no library can be made, which is told.

        Raises:
            CacheError: there is no folder for what is kept.
            torch.OutOfMemoryError: lowering has no room.
        """
        folder()
        try:
            region = context.run(private_aot.Region, function, examples)
            if region.may_keep and (run := kept(region.text)) is not None:
                self.num_kept += 1
                return lambda: run
            compiling = self._pool.submit(context.run(region.build))
        except Exception as error:
            self._leave(error)
            return otherwise()

        def ready() -> Compute:
            try:
                package = compiling.result()
                run = private_aot.loaded(package)
            except Exception as error:
                self._leave(error)
                return otherwise()()
            if region.may_keep:
                _keep_or_warn(region.text, package)
            self.num_built += 1
            return run

        return ready

    def _leave(self, error: Exception) -> None:
        """Leave a region to Inductor's own code, and tell each reason once."""
        if isinstance(error, torch.OutOfMemoryError):
            raise error
        why = in_one_line(error)
        if why not in self.left:
            warnings.warn(
                f"AOTInductor makes no library of a region ({why}); Inductor's own code calls it, and all like it",
                stacklevel=2,
            )
        self.left[why] += 1


# --- what is kept ---------------------------------------------------------------------------------------------------


def path_of(text: str) -> Path:
    """The file of the library that is made of a text. Raises CacheError as `folder` does."""
    return folder() / f"{hashlib.sha256(text.encode()).hexdigest()}.region"


def kept(text: str) -> Compute | None:
    """The library that an earlier run has made of the same text; None if there is none, or a file that is not that."""
    held, made_of = read_sealed(path_of(text), MAX_BYTES), _named(text)
    return private_aot.loaded(held[len(made_of) :]) if held is not None and held.startswith(made_of) else None


def _keep_or_warn(text: str, package: bytes) -> None:
    """Keep a library that is loaded; where it cannot be, as on a full disk, the next run compiles it again."""
    try:
        keep(text, package)
    except CacheError as error:
        warnings.warn(f"a library of a region is not kept: {in_one_line(error)}", stacklevel=2)


def keep(text: str, package: bytes) -> None:
    """Keep a library with the text that it was made of. Raises CacheError if it cannot be written."""
    write_sealed(path_of(text), _named(text) + package, MAX_BYTES)


def _named(text: str) -> bytes:
    """The text that a library is made of, as it lies before it."""
    made_of = text.encode()
    return len(made_of).to_bytes(LENGTH_BYTES, "little") + made_of
