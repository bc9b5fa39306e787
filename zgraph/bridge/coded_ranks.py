"""Codes on simulated ranks: made, exchanged and decoded as `zgraph.ir.coded_rules` says."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.nn.functional import pad

from zgraph.bridge.aten import TO_TORCH
from zgraph.bridge.codecs import decode as decoded
from zgraph.bridge.codecs import encode_into
from zgraph.bridge.parts import padded_chunks, total
from zgraph.ir import Node
from zgraph.ir.coded_rules import codec_of, num_copies, outer_numel
from zgraph.ir.layout import chunk_numel
from zgraph.ir.types import Mesh, num_shards

Ranks = list[Any]
"""One value as each rank has it."""

Rests = dict[tuple[tuple[str, ...], bool], Ranks]
"""Rests that codes have left out, by the parameters and by whether it is of a part that its owner codes once more."""


def encode(node: Node, operand: Ranks, mesh: Mesh, rests: Rests) -> Ranks:
    """Codes of what each rank has, with the rest of its last code added; the new rest is kept."""
    kind, codec, names = node.operands[0].tensor, codec_of(node), node.option("feedback")
    is_part = kind.reduction is None
    if is_part:
        numbers = [x.view(1, -1) for x in operand]
    elif kind.is_sharded:
        size = outer_numel(kind, mesh) * num_copies(mesh)
        numbers = [pad(x.reshape(-1), (0, size - x.numel())).view(num_copies(mesh), -1) for x in operand]
    else:
        numbers = [torch.stack(padded_chunks(x, kind, num_shards(mesh))) for x in operand]
    codes = [torch.empty(len(x), codec.num_bytes(x.shape[1], kind.dtype), dtype=torch.uint8) for x in numbers]
    kept: Ranks = [None] * len(numbers)
    if isinstance(names, tuple) and not codec.is_exact:
        key = tuple(map(str, names)), is_part
        kept = rests.setdefault(key, [torch.zeros_like(x, dtype=torch.float32) for x in numbers])
    for x, code, rest in zip(numbers, codes, kept, strict=True):
        encode_into(codec, x, code, rest)
    return [code.view(-1) for code in codes]


def exchange(node: Node, operands: list[Ranks], mesh: Mesh) -> Sequence[Ranks]:
    """Each rank's row of what all have."""
    rows = [codes.view(num_shards(mesh), -1) for codes in operands[0]]
    return [[torch.cat([row[rank] for row in rows]) for rank in range(len(rows))]]


def _decode(node: Node, operands: list[Ranks], mesh: Mesh) -> Sequence[Ranks]:
    kind, codec, count = node.results[0].tensor, codec_of(node), num_shards(mesh)
    chunk, dtype, reduce = chunk_numel(kind.shape, count), TO_TORCH[kind.dtype], node.option("reduce")
    if kind.is_sharded and reduce is None:
        count, numel = num_copies(mesh), outer_numel(kind, mesh)
        parts = [decoded(codec, codes.view(count, -1), numel, dtype) for codes in operands[0]]
        return [[rows.view(-1)[:chunk].to(dtype) for rows in parts]]
    makers = num_copies(mesh) if kind.varies else count
    found = [decoded(codec, codes.view(makers, -1), chunk, dtype) for codes in operands[0]]
    if reduce is None:
        return [[rows.view(-1)[: int(kind.numel)].view([int(d) for d in kind.shape]).to(dtype) for rows in found]]
    return [[(total(rows.unbind()) / (makers if reduce == "mean" else 1)).to(dtype) for rows in found]]


def _scatter_inside(node: Node, operands: list[Ranks], mesh: Mesh) -> Sequence[Ranks]:
    """Chunks of the sums over ranks that follow one another, which have the shards of one copy."""
    kind, count, made = node.operands[0].tensor, num_shards(mesh), Ranks()
    for first in range(0, len(operands[0]), count):
        reduced = total(operands[0][first : first + count])
        reduced = reduced / count if kind.reduction == "mean" else reduced
        made += [chunk.clone() for chunk in padded_chunks(reduced, kind, count)]
    return [made]


def _exchange_outside(node: Node, operands: list[Ranks], mesh: Mesh) -> Sequence[Ranks]:
    """Each rank's row of what those that hold the same shard have: these lie `num_shards` apart."""
    step, count = num_shards(mesh), num_copies(mesh)
    rows = [codes.view(count, -1) for codes in operands[0]]
    return [[torch.cat([row[rank // step] for row in rows[rank % step :: step]]) for rank in range(len(rows))]]


def _gather_outside(node: Node, operands: list[Ranks], mesh: Mesh) -> Sequence[Ranks]:
    step = num_shards(mesh)
    return [[torch.cat(operands[0][rank % step :: step]) for rank in range(len(operands[0]))]]


RULES: Mapping[str, Callable[[Node, list[Ranks], Mesh], Sequence[Ranks]]] = {
    "decode": _decode,
    "inner_reduce_scatter_start": _scatter_inside,
    "outer_all_to_all_start": _exchange_outside,
    "outer_all_gather_start": _gather_outside,
}
