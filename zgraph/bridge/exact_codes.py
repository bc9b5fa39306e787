"""Exact codes of 16-bit numbers in a variable number of bytes: differences of bit patterns, or their exponents.

Bit patterns of floating-point numbers are in the order of the numbers, but for the sign; so that a number that moved a
little is a small integer away. Both codes write integers in unary, a plane at a time: who is above 0, of these who is
above 1, and so on. A plane has two symbols, of which the rarer stands a geometric number of places behind the last, so
that Golomb's code of these distances with a power of two is near the entropy (Golomb, 1966; Rice and Plaunt, 1971).
Each plane of each block has a parameter of its own. All works on whole planes at a time.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

BLOCK = 1 << 17
"""Numbers that share parameters, and are worked on at a time."""

Bits = npt.NDArray[np.bool_]
Bytes = npt.NDArray[np.uint8]
Shorts = npt.NDArray[np.uint16]
Places = npt.NDArray[np.int64]

_PLANE_BYTES = 9
_PLAIN, _INVERTED = 31, 32
"""Of a plane's first byte: that its bits follow as they are; that zeros are the rarer symbol."""


class _Writer:
    """Collects a code's bytes."""

    def __init__(self) -> None:
        self.parts: list[Bytes] = []

    def bits(self, bits: Bits) -> None:
        self.parts.append(np.packbits(bits, bitorder="little"))

    def plane(self, ones: Places, bits: Bits) -> None:
        """Bits of a plane.

        Args:
            ones: where they are set, in order.
            bits: all of them.
        """
        length, rarer, flags = len(bits), ones, 0
        if 2 * len(ones) > length:
            rarer, flags = np.flatnonzero(~bits), _INVERTED
        parameter = rice_parameter(len(rarer), length)
        gaps = np.diff(rarer, prepend=-1) - 1
        ends = np.cumsum((gaps >> parameter) + 1)
        num_unary = int(ends[-1]) if len(ends) else 0
        if num_unary + parameter * len(rarer) >= length:
            self.head(_PLAIN, len(ones), 0)
            self.bits(bits)
            return
        self.head(parameter | flags, len(rarer), num_unary)
        self.bits(_from_places(ends - 1, num_unary))
        for place in range(parameter):
            self.bits(gaps & (1 << place) != 0)

    def head(self, kind: int, count: int, num_unary: int) -> None:
        self.parts.append(np.frombuffer(bytes([kind]) + np.array([count, num_unary], "<u4").tobytes(), np.uint8))


class _Reader:
    """Reads a code's bytes, front to back."""

    def __init__(self, code: Bytes) -> None:
        self.code, self.at = code, 0

    def take(self, num_bytes: int) -> Bytes:
        found = self.code[self.at : self.at + num_bytes]
        self.at += num_bytes
        return found

    def bits(self, length: int) -> npt.NDArray[np.uint8]:
        return np.unpackbits(self.take(-(-length // 8)), count=length, bitorder="little")

    def plane(self, length: int) -> Places:
        """Where the bits of a plane are set, in order."""
        kind, rest = int(self.take(1)[0]), self.take(_PLANE_BYTES - 1).tobytes()
        count, num_unary = (int.from_bytes(rest[i : i + 4], "little") for i in (0, 4))
        if kind == _PLAIN:
            return np.flatnonzero(self.bits(length))
        gaps = np.diff(np.flatnonzero(self.bits(num_unary)), prepend=-1) - 1
        parameter = kind & ~_INVERTED
        gaps <<= parameter
        for place in range(parameter):
            gaps |= self.bits(count).astype(np.int64) << place
        places = np.cumsum(gaps + 1) - 1
        return np.flatnonzero(~_from_places(places, length)) if kind & _INVERTED else places


def _from_places(ones: Places, length: int) -> Bits:
    bits = np.zeros(length, np.bool_)
    bits[ones] = True
    return bits


def rice_parameter(count: int, length: int) -> int:
    """Bits of a distance that are written as they are, for `count` ones among `length`: near the best (Golomb, 1966).

    >>> rice_parameter(30, 100), rice_parameter(1, 1000)
    (1, 9)
    """
    if not 0 < count < length:
        return 0
    return max(0, round(math.log2(-1 / math.log2(1 - count / length))))


# --- differences of bit patterns ----------------------------------------------------------------------------------


def _in_order(patterns: Shorts) -> npt.NDArray[np.int16]:
    """Bit patterns as integers in the order of the numbers; its own inverse, on the integers."""
    signed = patterns.view(np.int16)
    return signed ^ ((signed >> 15) & 0x7FFF)


def encode_delta(new: Shorts, old: Shorts) -> list[Bytes]:
    """The code of bit patterns of numbers, in terms of those before."""
    writer = _Writer()
    for begin in range(0, len(new), BLOCK):
        block = slice(begin, begin + BLOCK)
        _put_difference(writer, _in_order(new[block]) - _in_order(old[block]))
    return writer.parts


def _put_difference(writer: _Writer, difference: npt.NDArray[np.int16]) -> None:
    is_changed = difference != 0
    places = np.flatnonzero(is_changed)
    writer.plane(places, is_changed)
    changed = difference[places]
    writer.bits(changed < 0)
    sizes = np.abs(changed).view(np.uint16)
    place = 0
    while len(sizes):
        is_larger = sizes >= 2 << place
        larger = np.flatnonzero(is_larger)
        writer.plane(larger, is_larger)
        sizes = sizes[larger]
        writer.bits(sizes & (1 << place) != 0)
        place += 1
        if place == 16:
            break


def decode_delta(code: Bytes, old: Shorts, out: Shorts) -> None:
    """Write the bit patterns that a code stands for, in terms of those before."""
    reader = _Reader(code)
    for begin in range(0, len(old), BLOCK):
        block = slice(begin, begin + BLOCK)
        before = _in_order(old[block])
        _add_difference(reader, before)
        out[block] = _in_order(before.view(np.uint16)).view(np.uint16)


def _add_difference(reader: _Reader, numbers: npt.NDArray[np.int16]) -> None:
    places = reader.plane(len(numbers))
    is_negative = reader.bits(len(places)).view(np.bool_)
    planes = list[tuple[int, Places, Bytes]]()
    count = len(places)
    while count and len(planes) < 16:
        larger = reader.plane(count)
        planes.append((count, larger, reader.bits(len(larger))))
        count = len(larger)
    sizes = np.empty(0, np.uint16)
    for place, (count, larger, bits) in reversed([*enumerate(planes)]):
        found = np.full(count, 1 << place, np.uint16)
        found[larger] = sizes | bits.astype(np.uint16) << np.uint16(place)
        sizes = found
    signed = sizes.view(np.int16)
    numbers[places] += np.where(is_negative, -signed, signed)


# --- exponents of bf16 ----------------------------------------------------------------------------------------------


def encode_exponents(new: Shorts) -> list[Bytes]:
    """The code of bit patterns of bf16: exponents by how often they occur, signs and mantissas as they are."""
    writer = _Writer()
    for begin in range(0, len(new), BLOCK):
        _put_exponents(writer, new[begin : begin + BLOCK])
    return writer.parts


def _put_exponents(writer: _Writer, patterns: Shorts) -> None:
    exponents = (patterns >> 7).astype(np.uint8)
    counts = np.bincount(exponents, minlength=256)
    order = np.argsort(-counts, kind="stable")[: np.count_nonzero(counts)].astype(np.uint8)
    ranks = np.zeros(256, np.uint8)
    ranks[order] = np.arange(len(order), dtype=np.uint8)
    writer.parts += [
        np.array([len(order) - 1], np.uint8),
        order,
        (patterns & 0x7F | patterns >> 8 & 0x80).astype(np.uint8),
    ]
    left = ranks[exponents]
    for rank in range(len(order) - 1):
        is_larger = left > rank
        larger = np.flatnonzero(is_larger)
        writer.plane(larger, is_larger)
        left = left[larger]


def decode_exponents(code: Bytes, out: Shorts) -> None:
    """Write the bit patterns that a code stands for."""
    reader = _Reader(code)
    for begin in range(0, len(out), BLOCK):
        out[begin : begin + BLOCK] = _exponents(reader, len(out[begin : begin + BLOCK]))


def _exponents(reader: _Reader, numel: int) -> Shorts:
    count = int(reader.take(1)[0]) + 1
    order, rest = reader.take(count).astype(np.uint16), reader.take(numel).astype(np.uint16)
    planes = list[tuple[int, Places]]()
    for _ in range(count - 1):
        left = len(planes[-1][1]) if planes else numel
        planes.append((left, reader.plane(left)))
    ranks = np.zeros(len(planes[-1][1]) if planes else numel, np.uint8)
    for left, larger in reversed(planes):
        found = np.zeros(left, np.uint8)
        found[larger] = ranks + np.uint8(1)
        ranks = found
    made: Shorts = rest & np.uint16(0x7F) | (rest & np.uint16(0x80)) << np.uint16(8) | order[ranks] << np.uint16(7)
    return made
