"""Codes of variable length: exact ones, and differences from the copy before in another codec.

A code of one row of numbers is a head of `HEAD_BYTES`, in little-endian integers of 64 bits, and what it announces:

    bytes of the code, with the head
    form: RAW, SAME (as the copy before), DELTA (differences of bit patterns from the copy before), EXPONENT,
        DIFFERENCE (from the copy before, coded)
    number of the copy before that it changes; 0 where it needs none

Every rank adds the same code to the same copy in fp32, and rounds the sum to the copy's dtype: copies stay alike.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt
import torch

from zgraph.bridge.codecs import add_difference, encode_difference
from zgraph.bridge.exact_codes import (
    Bytes,
    Shorts,
    decode_delta,
    decode_exponents,
    encode_delta,
    encode_exponents,
)
from zgraph.errors import PlanMismatchError
from zgraph.ir.codecs import HEAD_BYTES, Difference, Sized

RAW, SAME, DELTA, EXPONENT, DIFFERENCE = range(5)
_CHANGES = (SAME, DELTA, DIFFERENCE)

FAR = 0.25
"""Norm of a difference, over that of the numbers, from which on the numbers themselves are sent."""

Tensor = torch.Tensor


def encode_sized(
    codec: Sized,
    numbers: Tensor,
    code: Tensor,
    before: Tensor | None = None,
    number: int = 0,
    last: Tensor | None = None,
    kept: Tensor | None = None,
) -> int:
    """Write the code of numbers: raw where that is no longer. The bytes that it takes.

    Args:
        codec: how.
        numbers: [numel], on a processor.
        code: [at least HEAD_BYTES and those of numbers] bytes, written in front.
        before: the copy before, likewise; None where there is none.
        number: of that copy.
        last: the numbers of the code before; where they are the same, the copy stays.
        kept: [numel], to which the numbers are written; or None.
    """
    if before is not None and _same(numbers, before if last is None else last):
        form, parts = SAME, list[Bytes]()
    elif before is not None and isinstance(codec, Difference):
        size = codec.expected_bytes(numbers.numel())
        if size < HEAD_BYTES + numbers.nbytes:
            made = torch.empty_like(numbers) if kept is None else kept
            of_change, of_numbers = encode_difference(codec.codec, numbers, before, made, code[HEAD_BYTES:size])
            if of_change < FAR * of_numbers:
                return _announced(code, size, DIFFERENCE, number)
        form, parts = RAW, []  # numbers that were loaded; or not finite, so that copies are so again with the numbers
    else:
        form, parts = _coded(codec, numbers, before)
    if form == RAW or sum(map(len, parts)) >= numbers.nbytes > 0:
        form, parts = RAW, [_bytes(numbers)]
    if kept is not None:
        kept.copy_(numbers)
    size = HEAD_BYTES + sum(map(len, parts))
    if parts:
        np.concatenate(parts, out=code.numpy()[HEAD_BYTES:size])
    return _announced(code, size, form, number)


def _coded(codec: Sized, numbers: Tensor, before: Tensor | None) -> tuple[int, list[Bytes]]:
    """The form of a code that loses nothing, and what stands behind its head."""
    if not codec.changes:
        return EXPONENT, encode_exponents(_patterns(numbers))
    if before is None:
        return RAW, []
    return DELTA, encode_delta(_patterns(numbers), _patterns(before))


def _announced(code: Tensor, size: int, form: int, number: int) -> int:
    """Write the head of a code, and give its bytes."""
    code.numpy()[:HEAD_BYTES] = np.array([size, form, number if form in _CHANGES else 0], "<i8").view(np.uint8)
    return size


def sized_bytes(code: Tensor) -> int:
    """Bytes of a code, which its head says."""
    return _head(code)[0]


def all_same(codes: Iterable[Tensor], number: int) -> bool:
    """Whether all codes stand for the copy before, as they are.

    Raises:
        PlanMismatchError: one of them stands for another copy than this rank has.
    """
    heads = [_head(code) for code in codes]
    if not all(form == SAME for _, form, _ in heads):
        return False
    for _, _, changes in heads:
        _check_copy(changes, number)
    return True


def _check_copy(changes: int, number: int) -> None:
    if changes != number:
        raise PlanMismatchError(
            f"a rank sends what changed since copy {changes} of a parameter, and this rank has copy {number}: after an "
            "error all ranks must go on alike. Start the job again from its last checkpoint"
        )


def decode_sized(codec: Sized, code: Tensor, out: Tensor, before: Tensor | None = None, number: int = 0) -> None:
    """Write the numbers that a code stands for.

    Args:
        codec: how it was made.
        code: bytes, perhaps with more behind.
        out: [numel], written.
        before: the copy before; None where there is none.
        number: of that copy.

    Raises:
        PlanMismatchError: the code changes another copy than this rank has.
    """
    size, form, changes = _head(code)
    if form in _CHANGES:
        _check_copy(changes, number if before is not None else 0)
    payload = code[HEAD_BYTES:size]
    if form == RAW:
        _bytes(out)[:] = payload.numpy()
    elif form == EXPONENT:
        decode_exponents(payload.numpy(), _patterns(out))
    elif before is not None and form == SAME:
        out.copy_(before)
    elif before is not None and isinstance(codec, Difference):
        add_difference(codec.codec, payload, before, out)
    elif before is not None:
        decode_delta(payload.numpy(), _patterns(before), _patterns(out))


def _same(numbers: Tensor, others: Tensor) -> bool:
    """Whether dense numbers have the same bit patterns."""
    as_integers = torch.int32 if numbers.element_size() == 4 else torch.int16
    return torch.equal(*(x.detach().view(-1).view(as_integers) for x in (numbers, others)))


def _bytes(numbers: Tensor) -> Bytes:
    """Bytes of dense numbers, in the same memory."""
    found: Bytes = numbers.detach().view(-1).view(torch.uint8).numpy()
    return found


def _patterns(numbers: Tensor) -> Shorts:
    """Bit patterns of dense numbers of 16 bits, in the same memory."""
    found: npt.NDArray[np.int16] = numbers.detach().view(torch.int16).numpy()
    return found.view(np.uint16)


def _head(code: Tensor) -> list[int]:
    """Bytes, form, and number of the copy before."""
    found: list[int] = np.frombuffer(code[:HEAD_BYTES].numpy().tobytes(), "<i8").tolist()
    return found
