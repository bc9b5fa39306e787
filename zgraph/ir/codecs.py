"""Codecs of what goes over the wire, as data with a text: how many bytes a code takes follows from the codec.

    q8(block=256)             8 bits a number, one exponent a block              about 1/4 of fp32
    q4(block=128)             4 bits a number, one exponent a block              about 1/8
    q2(block=128)             2 bits a number, one exponent a block              about 1/16
    sign(block=256)           the sign of a number, one exponent a block         about 1/32
    topk(1%, chunk=4096)      the largest numbers of each chunk, in bf16         about 1/100
    delta                     what changed since the copy before, exactly       about 1/8 of bf16
    exponent                  exponents by how often they occur, exactly        about 2/3 of bf16
    difference(q4(block=128)) what changed since the copy before, in a codec     that codec's share
    raw                       the numbers themselves

A codec codes numbers in one dimension, in fp32. What its codes stand for is in `zgraph.bridge.codecs`. Codes of `delta`
and `exponent` are of 16-bit numbers as they are; these and those of `difference` are of a length that is known when
they are made (`zgraph.bridge.sized_codes`): their type has room for the most bytes, and what is predicted of the wire
is an estimate.
"""

from __future__ import annotations

import abc
import dataclasses
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from zgraph.errors import CodecError, did_you_mean
from zgraph.ir.cursor import Cursor
from zgraph.ir.types import DType

LARGEST_BLOCK = 1 << 16
"""Numbers in a block or chunk: those that an index of 16 bits tells apart."""

CODED_AT_A_TIME = 1 << 18
"""Numbers that are coded at a time, so that what is in between stays in a processor's cache."""

HEAD_BYTES = 24
"""Bytes in front of a code of variable length, which announce it."""

_PERCENT = re.compile(r"\d{1,3}(?:\.\d{1,4})?%", re.ASCII)


@dataclass(frozen=True)
class Codec(abc.ABC):
    """A way to code numbers. Its fields are its options; its text is that of a call."""

    name: ClassVar[str]
    is_exact: ClassVar[bool] = False
    passes: ClassVar[int] = 1
    """How many times longer coding takes than to read numbers and write codes once, on processors; decoding takes as
    many times longer only where the codec is exact."""

    @abc.abstractmethod
    def num_bytes(self, numel: int, dtype: DType) -> int:
        """Bytes of the code of `numel` numbers of this dtype."""

    def __str__(self) -> str:
        return f"{self.name}({', '.join(f'{f.name}={getattr(self, f.name)}' for f in dataclasses.fields(self))})"


@dataclass(frozen=True)
class Blockwise(Codec):
    """One exponent for each block of `block` numbers, and for each number a few bits.

    Raises:
        ValueError: the block is no multiple of 8 from 8 to 65536.
    """

    block: int = 256

    bits: ClassVar[int]

    def __post_init__(self) -> None:
        if not 8 <= self.block <= LARGEST_BLOCK or self.block % 8:
            raise ValueError(f"block must be a multiple of 8 from 8 to {LARGEST_BLOCK}, not {self.block}")

    def num_bytes(self, numel: int, dtype: DType) -> int:
        return -(-numel * self.bits // 8) + -(-numel // self.block)


@dataclass(frozen=True)
class Q8(Blockwise):
    """8 bits a number: multiples from -127 to 127 of a power of two."""

    name: ClassVar[str] = "q8"
    bits: ClassVar[int] = 8


@dataclass(frozen=True)
class Q4(Blockwise):
    """4 bits a number: multiples from -7 to 7 of a power of two."""

    block: int = 128

    name: ClassVar[str] = "q4"
    bits: ClassVar[int] = 4


@dataclass(frozen=True)
class Q2(Blockwise):
    """2 bits a number: a power of two that no number of the block is above, or its negative, or zero.

    Numbers below half of it are zero, and go on in what the code leaves out (TernGrad, Wen et al., 2017, with error
    feedback in the place of chance).
    """

    block: int = 128

    name: ClassVar[str] = "q2"
    bits: ClassVar[int] = 2


@dataclass(frozen=True)
class Sign(Blockwise):
    """One bit a number: plus or minus a power of two near the mean magnitude of its block."""

    name: ClassVar[str] = "sign"
    bits: ClassVar[int] = 1


@dataclass(frozen=True)
class TopK(Codec):
    """The numbers of largest magnitude in each chunk, cut to bf16, with their places; the others are zero.

    Args:
        percent: how many of each chunk, rounded up.
        chunk: numbers in a chunk.

    Raises:
        ValueError: the share is not above 0 and at most 100 %, or the chunk is not from 8 to 65536.
    """

    percent: float = 1.0
    chunk: int = 4096

    name: ClassVar[str] = "topk"
    passes: ClassVar[int] = 3

    def __post_init__(self) -> None:
        if not 0 < self.percent <= 100:
            raise ValueError(f"the share must be above 0% and at most 100%, not {self.percent:g}%")
        if not 8 <= self.chunk <= LARGEST_BLOCK:
            raise ValueError(f"chunk must be from 8 to {LARGEST_BLOCK}, not {self.chunk}")

    def kept(self, numel: int) -> int:
        """How many of a chunk of `numel` numbers are kept."""
        return min(numel, math.ceil(round(numel * self.percent / 100, 6)))

    def num_kept(self, numel: int) -> int:
        """How many of `numel` numbers are kept, the last chunk perhaps a shorter one."""
        full, rest = divmod(numel, self.chunk)
        return full * self.kept(self.chunk) + self.kept(rest)

    def num_bytes(self, numel: int, dtype: DType) -> int:
        return 4 * self.num_kept(numel)

    def __str__(self) -> str:
        return f"topk({self.percent:.10g}%, chunk={self.chunk})"


@dataclass(frozen=True)
class Raw(Codec):
    """The bytes of the numbers themselves: what stands for any codec where numbers are checked."""

    name: ClassVar[str] = "raw"
    is_exact: ClassVar[bool] = True

    def num_bytes(self, numel: int, dtype: DType) -> int:
        return numel * dtype.itemsize

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Sized(Codec):
    """A codec whose codes have a length of their own: at most that of the numbers, and a head.

    Attributes:
        changes: whether codes are of what changed since the copy that all ranks still have.
        dtypes: those whose numbers it codes.
    """

    changes: ClassVar[bool] = False
    dtypes: ClassVar[tuple[DType, ...]]

    def num_bytes(self, numel: int, dtype: DType) -> int:
        return HEAD_BYTES + numel * dtype.itemsize

    @abc.abstractmethod
    def expected_bytes(self, numel: int) -> int:
        """Bytes that a code of `numel` numbers is expected to take: an estimate."""


@dataclass(frozen=True)
class Exact(Sized):
    """A codec of 16-bit numbers that loses nothing.

    Attributes:
        bits: expected of a number.
    """

    is_exact: ClassVar[bool] = True
    bits: ClassVar[float]

    def expected_bytes(self, numel: int) -> int:
        return HEAD_BYTES + math.ceil(numel * self.bits / 8)

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Delta(Exact):
    """Differences of bit patterns from the copy that all ranks still have.

    The estimate is for a model that is fine-tuned; of one that is trained from scratch more changes in a step.
    """

    name: ClassVar[str] = "delta"
    changes: ClassVar[bool] = True
    bits: ClassVar[float] = 2.0
    dtypes: ClassVar[tuple[DType, ...]] = (DType.bf16, DType.f16)
    passes: ClassVar[int] = 30


@dataclass(frozen=True)
class Exponent(Exact):
    """Exponents by how often they occur, signs and mantissas as they are: needs no copy."""

    name: ClassVar[str] = "exponent"
    bits: ClassVar[float] = 10.8
    dtypes: ClassVar[tuple[DType, ...]] = (DType.bf16,)
    passes: ClassVar[int] = 60


@dataclass(frozen=True)
class Difference(Sized):
    """Differences from the copy that all ranks still have, as another codec has them: what it leaves out is in the
    next difference (EF21: Richtarik et al., 2021).

    Args:
        codec: of the differences.

    Raises:
        ValueError: the codec's codes have a length of their own, or it is `raw`.
    """

    codec: Codec = field(default_factory=Q8)

    name: ClassVar[str] = "difference"
    changes: ClassVar[bool] = True
    dtypes: ClassVar[tuple[DType, ...]] = (DType.f32, DType.bf16, DType.f16)

    def __post_init__(self) -> None:
        if isinstance(self.codec, Sized | Raw):
            raise ValueError(f"a difference is coded by {', '.join(LOSSY)}, not by {self.codec.name}")

    def expected_bytes(self, numel: int) -> int:
        return HEAD_BYTES + self.codec.num_bytes(numel, DType.f32)

    def __str__(self) -> str:
        return f"{self.name}({self.codec})"


LOSSY: Mapping[str, type[Codec]] = {kind.name: kind for kind in (Q8, Q4, Q2, Sign, TopK)}
"""The codecs by name whose codes have a fixed length, and leave something out."""

CODECS: Mapping[str, type[Codec]] = {
    kind.name: kind for kind in (Q8, Q4, Q2, Sign, TopK, Delta, Exponent, Difference, Raw)
}
"""The codecs by name."""


class _Text(Cursor):
    """A cursor over a codec's text."""

    fault = CodecError
    blanks = re.compile(r"\s*")


def parse_codec(text: str) -> Codec:
    """The codec that a text writes; options that it leaves out are at their default.

    >>> str(parse_codec("q8")), str(parse_codec("topk(0.5%)")), str(parse_codec("difference(q4)"))
    ('q8(block=256)', 'topk(0.5%, chunk=4096)', 'difference(q4(block=128))')

    Raises:
        CodecError: with a caret under what does not parse.
    """
    cursor = _Text(text)
    found = _codec(cursor, CODECS)
    cursor.end()
    return found


def _codec(cursor: _Text, known: Mapping[str, type[Codec]]) -> Codec:
    begin = cursor.at
    name = cursor.match(re.compile(r"\w+"), "the name of a codec")
    if name not in known:
        hint = did_you_mean(name, known, f"the codecs are {', '.join(known)}")
        where = "here" if name in CODECS else f"called {name[:40]}"
        raise cursor.error(f"there is no codec {where}; {hint}", begin)
    kind = known[name]
    options: dict[str, Any] = {}
    if cursor.accept("("):
        if kind is Difference:
            options["codec"] = _codec(cursor, LOSSY)
            cursor.expect(")")
        else:
            for key, value in cursor.listed(")", lambda: _option(cursor, kind, options)):
                options[key] = value
    try:
        return kind(**options)
    except ValueError as error:
        raise cursor.error(str(error), begin) from None


def _option(cursor: _Text, kind: type[Codec], given: dict[str, Any]) -> tuple[str, int | float]:
    known = [f.name for f in dataclasses.fields(kind)]
    if kind is TopK and not given and _PERCENT.match(cursor.text, cursor.at):
        found = "percent", float(cursor.match(_PERCENT, "a share").rstrip("%"))
    else:
        key = cursor.word("the name of an option")
        if key not in known or key == "percent":
            listed = ", ".join(k for k in known if k != "percent") or "none"
            raise cursor.error(f"{kind.name} has no option {key}; it has {listed}", cursor.at - len(key))
        if key in given:
            raise cursor.error(f"{key} is given twice", cursor.at - len(key))
        cursor.expect("=")
        found = key, cursor.integer()
    given[found[0]] = found[1]
    return found
