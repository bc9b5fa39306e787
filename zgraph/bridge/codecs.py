"""Numbers of codecs: their codes as bytes, and what the codes stand for, in torch operations of whole blocks.

On processors C++ computes the same in one pass (`zgraph.bridge.compiled_codecs`), where there is a compiler, and
generated kernels do on GPUs (`zgraph.codegen.codes`). Which of equal magnitudes `topk` keeps is left open; all else is
the same to the last bit.

What a code stands for is a multiple of a power of two that is no finer than the last bit of the largest number of its
block, or a number cut to its first bits. So the rest, which error feedback keeps, is exact in fp32 for `q8`, `q4`,
`q2` and `topk`: code and rest add up to the number, to the last bit. `sign` gives small numbers a large code; there the
rest is rounded once, to half a unit in its last place.

Scales are bytes as in the OCP Microscaling formats (E8M0, version 1.0, section 5.4.1): 2 to the power of the byte less
127; 255 says that a number of the block is not finite, and 0 that all stand for zero. A block that is not finite
decodes to NaN, and a chunk of `topk` keeps numbers that are not finite as its largest: none of them is lost.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.nn.functional import pad

from zgraph.bridge import compiled_codecs
from zgraph.ir import DType
from zgraph.ir.codecs import CODED_AT_A_TIME, Q2, Q4, Q8, Blockwise, Codec, Raw, Sign, TopK

Tensor = torch.Tensor

KERNELS: dict[str, tuple[Callable[..., bool], Callable[..., bool]]] = {}
"""Kernels of a type of device, which take what `encode_into` and `add_decoded` take, and say whether they ran."""

_BIAS, _NOT_FINITE = 127, 255


def encode(codec: Codec, x: Tensor) -> Tensor:
    """The code of each row, in bytes: [rows, numel] of floating-point numbers to [rows, num_bytes].

    Args:
        codec: how.
        x: coded in fp32, but for `raw`.
    """
    rows, numel = x.shape
    code = x.new_empty(rows, codec.num_bytes(numel, _dtype(x.dtype)), dtype=torch.uint8)
    return encode_into(codec, x, code, None)


def encode_into(codec: Codec, x: Tensor, code: Tensor, rest: Tensor | None) -> Tensor:
    """Write the code of each row of x, with the rest added, and leave in `rest` what the code does not stand for.

    A block or chunk with a number that is not finite leaves its rest as it was.

    Args:
        codec: how.
        x: [rows, numel].
        code: [rows, num_bytes], written.
        rest: [rows, numel] in fp32, added and written; None codes x alone.
    """
    if isinstance(codec, Raw):
        return code.copy_(x.contiguous().view(torch.uint8))
    if x.device.type in KERNELS and KERNELS[x.device.type][0](codec, x, code, rest):
        return code
    encoder = _ENCODERS[type(codec)]
    for row, (numbers, made) in enumerate(zip(x, code, strict=True)):
        if compiled_codecs.encode_row(codec, numbers, made, None if rest is None else rest[row]):
            continue
        for begin, end, places in _pieces(codec, x.shape[1]):
            y = numbers[begin:end].float()
            kept = None if rest is None else rest[row, begin:end]
            if kept is not None:
                y = y + kept
            stands_for, is_finite = encoder(codec, y, [made[place] for place in places])
            if kept is not None:
                kept.copy_(torch.where(is_finite, y - stands_for, kept))
    return code


def encode_difference(codec: Codec, numbers: Tensor, before: Tensor, kept: Tensor, code: Tensor) -> tuple[float, float]:
    """Write the code of what numbers have changed, in fp32, and the numbers to `kept`.

    Args:
        codec: how.
        numbers, before: [numel], of one dtype.
        kept: likewise, written.
        code: [num_bytes], written.

    Returns:
        the norms of the change and of the numbers.
    """
    norms = compiled_codecs.encode_difference(codec, numbers, before, kept, code)
    if norms is not None:
        return norms
    change, numbers_f32 = numbers.float() - before.float(), kept.copy_(numbers).float()
    encode_into(codec, change[None], code[None], None)
    of_change, of_numbers = (torch.linalg.vector_norm(x, dtype=torch.float64) for x in (change, numbers_f32))
    return float(of_change), float(of_numbers)


def add_difference(codec: Codec, code: Tensor, before: Tensor, out: Tensor) -> None:
    """Write numbers as they were with what has changed, added in fp32.

    Args:
        codec: how the change was coded.
        code: [num_bytes].
        before: [numel].
        out: [numel] of the same dtype, written.
    """
    if not compiled_codecs.add_difference(codec, code, before, out):
        out.copy_(add_decoded(codec, code[None], before.to(torch.float32, copy=True)[None])[0])


def decode(codec: Codec, code: Tensor, numel: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Numbers that the codes of rows stand for: [rows, num_bytes] to [rows, numel] in fp32; of `raw` in `dtype`."""
    if isinstance(codec, Raw):
        return code.contiguous().view(-1).clone().view(dtype).view(len(code), numel)
    out = torch.empty(len(code), numel, dtype=torch.float32, device=code.device)
    for row, numbers in enumerate(out):
        sum_decoded(codec, code[row : row + 1], numbers, 1)
    return out


def sum_decoded(codec: Codec, codes: Tensor, out: Tensor, divisor: int) -> Tensor:
    """Write the sum of what the codes of rows stand for, over a divisor.

    Args:
        codec: how they were made.
        codes: [rows, num_bytes].
        out: [numel] in fp32, of `raw` in its own dtype; written.
        divisor: of the sum.
    """
    if not isinstance(codec, Raw) and compiled_codecs.sum_rows(codec, codes, out, divisor):
        return out
    out.zero_()
    for row in range(len(codes)):
        add_decoded(codec, codes[row : row + 1], out[None])
    return out.div_(divisor)


def add_decoded(codec: Codec, code: Tensor, out: Tensor) -> Tensor:
    """Add what the codes of rows, [rows, num_bytes], stand for to `out`: [rows, numel] in fp32, of `raw` in its own."""
    if isinstance(codec, Raw):
        return out.add_(decode(codec, code, out.shape[1], out.dtype))
    if code.device.type in KERNELS and KERNELS[code.device.type][1](codec, code, out):
        return out
    decoder = _DECODERS[type(codec)]
    for made, total in zip(code, out, strict=True):
        if compiled_codecs.add_row(codec, made, total):
            continue
        for begin, end, places in _pieces(codec, out.shape[1]):
            decoder(codec, [made[place] for place in places], total[begin:end])
    return out


def _pieces(codec: Codec, numel: int) -> Any:
    """Numbers that are coded together: from where to where, and the places of their code's parts in that of the row."""
    if isinstance(codec, TopK):
        size, total = max(CODED_AT_A_TIME // codec.chunk, 1) * codec.chunk, codec.num_kept(numel)
        for begin in range(0, numel, size):
            end = min(begin + size, numel)
            first, last = codec.num_kept(begin), codec.num_kept(end)
            yield begin, end, (slice(2 * first, 2 * last), slice(2 * (total + first), 2 * (total + last)))
        return
    assert isinstance(codec, Blockwise)
    size, bits = max(CODED_AT_A_TIME // codec.block, 1) * codec.block, codec.bits
    scales = -(-numel // codec.block)
    for begin in range(0, numel, size):
        end = min(begin + size, numel)
        blocks = slice(begin // codec.block, -(-end // codec.block))
        yield begin, end, (blocks, slice(scales + begin * bits // 8, scales + -(-end * bits // 8)))


def _dtype(dtype: torch.dtype) -> DType:
    return {torch.float64: DType.f64, torch.float32: DType.f32, torch.bfloat16: DType.bf16}.get(dtype, DType.f16)


# --- blocks with one exponent ------------------------------------------------------------------------------------


def _blocks(codec: Blockwise, y: Tensor) -> Tensor:
    """Numbers by blocks, the last one filled up with zeros: [blocks, block]."""
    short = -y.numel() % codec.block
    return (pad(y, (0, short)) if short else y).view(-1, codec.block)


def _flat(by_block: Tensor, numel: int) -> Tensor:
    return by_block.reshape(-1)[:numel]


def _power(exponent: Tensor) -> Tensor:
    """2 to the power of bytes less 127, from 2^-126 on: of 0 it is 0, of 255 NaN."""
    made = (exponent.int() << 23).view(torch.float32)
    return torch.where(exponent == _NOT_FINITE, torch.nan, made)


def _exponent(largest: Tensor, most: float) -> Tensor:
    """The smallest byte whose power of two is no less than `largest` / `most`; from 1 on, and 0 for a largest of 0.

    255 where it is not finite.
    """
    ratio = (largest / most).clamp(min=2.0**-126)
    bits = ratio.view(torch.int32)
    found = ((bits + 0x007FFFFF) >> 23).clamp(1, _NOT_FINITE - 1)
    found = torch.where(largest == 0, 0, found)
    return torch.where(largest.isfinite(), found, _NOT_FINITE).to(torch.uint8)


def _encode_steps(codec: Blockwise, y: Tensor, out: list[Tensor]) -> tuple[Tensor, Tensor]:
    blocks, most = _blocks(codec, y), (1 << (codec.bits - 1)) - 1
    exponent = _exponent(blocks.abs().amax(1), most)
    scale = _power(exponent)[:, None]
    inverse = torch.where(scale > 0, 1 / scale, 0)
    limit = (torch.finfo(torch.float32).max * inverse).floor_().clamp_(max=most)  # what stands for is finite
    steps = torch.clamp((blocks * inverse).round_(), -limit, limit)
    scales, payload = out
    scales.copy_(exponent)
    whole = steps.nan_to_num(0).to(torch.int8).view(-1)
    payload.copy_(_packed(whole, codec.bits)[: payload.numel()])
    finite = (exponent != _NOT_FINITE)[:, None].expand_as(blocks)
    return _flat(steps * scale, y.numel()), _flat(finite, y.numel())


def _decode_steps(codec: Blockwise, code: list[Tensor], total: Tensor) -> None:
    exponent, payload = code
    steps = _unpacked(payload, codec.bits)[: total.numel()]
    total += _flat(_blocks(codec, steps.float()) * _power(exponent)[:, None], total.numel())


def _packed(whole: Tensor, bits: int) -> Tensor:
    """Integers of so many bits in bytes, the first in the lowest bits; as many as a byte holds, or more."""
    low = whole.view(torch.uint8) & ((1 << bits) - 1)
    found = low[:: 8 // bits].clone()
    for place in range(1, 8 // bits):
        found |= low[place :: 8 // bits] << (bits * place)
    return found


def _unpacked(payload: Tensor, bits: int) -> Tensor:
    """The integers that bytes hold."""
    shifted = [payload << (8 - bits * (place + 1)) for place in range(8 // bits)]
    return (torch.stack(shifted, 1).view(torch.int8) >> (8 - bits)).view(-1)


def _encode_signs(codec: Blockwise, y: Tensor, out: list[Tensor]) -> tuple[Tensor, Tensor]:
    blocks = _blocks(codec, y)
    counts = torch.full((len(blocks),), codec.block, dtype=torch.float32, device=y.device)
    counts[-1] -= -y.numel() % codec.block
    magnitudes = blocks.abs()
    mean = _by_halves(magnitudes / counts[:, None])
    mean = torch.where(magnitudes.amax(1).isfinite(), mean, torch.nan)
    exponent = _exponent(mean / 1.5, 1.0)  # to the nearest power of two, above 1.5 the next
    exponent = torch.where(mean > 0, exponent.clamp(min=1), exponent)
    is_positive = blocks >= 0
    weights = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=y.device)
    packed = (is_positive.view(-1, 8) * weights).sum(1, dtype=torch.uint8)
    scales, payload = out
    scales.copy_(exponent)
    payload.copy_(packed[: payload.numel()])
    scale = _power(exponent)[:, None]
    finite = (exponent != _NOT_FINITE)[:, None].expand_as(blocks)
    return _flat(torch.where(is_positive, scale, -scale), y.numel()), _flat(finite, y.numel())


def _by_halves(rows: Tensor) -> Tensor:
    """The sum of each row, in an order that is the same everywhere: [rows, numbers] to [rows]."""
    width = 1 << (rows.shape[1] - 1).bit_length()
    found = pad(rows, (0, width - rows.shape[1]))
    while (width := width // 2) > 0:
        found = found[:, :width] + found[:, width:]
    return found[:, 0]


def _decode_signs(codec: Blockwise, code: list[Tensor], total: Tensor) -> None:
    exponent, payload = code
    shifts = torch.arange(8, dtype=torch.uint8, device=payload.device)
    bits = ((payload[:, None] >> shifts) & 1).view(-1)[: total.numel()]
    total += _flat(_blocks(codec, bits.float() * 2 - 1) * _power(exponent)[:, None], total.numel())


# --- the largest numbers -----------------------------------------------------------------------------------------


def _by_chunk(codec: TopK, numel: int) -> list[tuple[slice, int, int, int]]:
    """Chunks of one size: the numbers, how many chunks, numbers in one, and kept of one; the last one by itself."""
    full = numel // codec.chunk
    found = [(slice(0, full * codec.chunk), full, codec.chunk, codec.kept(codec.chunk))] if full else []
    if rest := numel % codec.chunk:
        found.append((slice(full * codec.chunk, numel), 1, rest, codec.kept(rest)))
    return found


def _encode_largest(codec: TopK, y: Tensor, out: list[Tensor]) -> tuple[Tensor, Tensor]:
    stands_for, finite = torch.zeros_like(y), torch.empty_like(y, dtype=torch.bool)
    places, values = out
    at = 0
    for span, count, size, kept in _by_chunk(codec, y.numel()):
        chunks = y[span].view(count, size)
        magnitudes = chunks.abs()
        index = magnitudes.topk(kept, 1, sorted=False).indices.sort(1).values
        cut = chunks.gather(1, index).view(torch.int32) & -65536
        cut = torch.where(chunks.gather(1, index).isnan(), 0x7FC00000, cut)
        stands_for[span].view(count, size).scatter_(1, index, cut.view(torch.float32))
        finite[span] = magnitudes.amax(1, keepdim=True).isfinite().expand(count, size).reshape(-1)
        end = at + 2 * count * kept
        places[at:end].copy_(index.to(torch.int16).view(torch.uint8).view(-1))
        values[at:end].copy_((cut >> 16).to(torch.int16).view(torch.uint8).view(-1))
        at = end
    return stands_for, finite


def _decode_largest(codec: TopK, code: list[Tensor], total: Tensor) -> None:
    places, values = code
    at = 0
    for span, count, size, kept in _by_chunk(codec, total.numel()):
        end = at + 2 * count * kept
        index = (places[at:end].clone().view(torch.int16).to(torch.int64) & 0xFFFF).view(count, kept)
        found = (values[at:end].clone().view(torch.int16).to(torch.int32) << 16).view(torch.float32)
        total[span].view(count, size).scatter_add_(1, index.clamp_(max=size - 1), found.view(count, kept))
        at = end


_ENCODERS: Mapping[type[Codec], Callable[..., tuple[Tensor, Tensor]]] = {
    Q8: _encode_steps,
    Q4: _encode_steps,
    Q2: _encode_steps,
    Sign: _encode_signs,
    TopK: _encode_largest,
}
_DECODERS: Mapping[type[Codec], Callable[..., None]] = {
    Q8: _decode_steps,
    Q4: _decode_steps,
    Q2: _decode_steps,
    Sign: _decode_signs,
    TopK: _decode_largest,
}
