"""Codes of variable length on simulated ranks, with the copies that each of them keeps."""

from __future__ import annotations

from typing import Any

import torch

from zgraph.bridge.aten import TO_TORCH
from zgraph.bridge.sized_codes import decode_sized, encode_sized
from zgraph.ir import Node
from zgraph.ir.codecs import Difference, Sized
from zgraph.ir.coded_rules import codec_of
from zgraph.ir.layout import chunk_numel
from zgraph.ir.types import Mesh, num_shards

Ranks = list[Any]
"""One value as each rank has it."""


def is_sized(node: Node) -> bool:
    """Whether a node makes or reads codes of variable length."""
    return node.op in ("encode", "decode") and isinstance(codec_of(node), Sized)


class SizedRanks:
    """Codes and copies of all simulated ranks.

    Attributes:
        copies: by the parameters: what each rank keeps of the last gather, [shards, numbers of a part], and its number.
        last: by the parameters: the numbers that each rank coded last.
        sent_bytes: of all codes so far, one of each rank.
    """

    def __init__(self) -> None:
        self.copies: dict[object, tuple[Ranks, int]] = {}
        self.last: dict[object, Ranks] = {}
        self.sent_bytes = 0

    def run(self, node: Node, operand: Ranks, mesh: Mesh) -> Ranks:
        """Codes of what each rank has, or what the codes of all ranks stand for."""
        return (self._encode if node.op == "encode" else self._decode)(node, operand, num_shards(mesh))

    def _encode(self, node: Node, operand: Ranks, count: int) -> Ranks:
        kind, codec, made = node.operands[0].tensor, codec_of(node), Ranks()
        assert isinstance(codec, Sized)
        copies, number = self.copies.get(node.option("copies"), (None, 0))
        last = self.last.get(node.option("copies"), [None] * len(operand))
        for rank, numbers in enumerate(operand):
            size = codec.num_bytes(chunk_numel(kind.shape, count), kind.dtype)
            code = torch.zeros(size, dtype=torch.uint8)
            before = copies[rank][rank % count] if copies is not None else None
            self.sent_bytes += encode_sized(codec, numbers.reshape(-1), code, before, number, last[rank])
            made.append(code)
        if isinstance(codec, Difference):
            self.last[node.option("copies")] = [numbers.reshape(-1).clone() for numbers in operand]
        return made

    def _decode(self, node: Node, operand: Ranks, count: int) -> Ranks:
        kind, codec, names, made = node.results[0].tensor, codec_of(node), node.option("copies"), Ranks()
        assert isinstance(codec, Sized)
        before, number = self.copies.get(names, (None, 0))
        for rank, codes in enumerate(operand):
            rows = torch.empty(count, chunk_numel(kind.shape, count), dtype=TO_TORCH[kind.dtype])
            for shard, (code, row) in enumerate(zip(codes.view(count, -1), rows, strict=True)):
                decode_sized(codec, code, row, before[rank][shard] if before is not None else None, number)
            made.append(rows)
        if names is not None:
            self.copies[names] = [rows.clone() for rows in made], number + 1
        shape = [int(d) for d in kind.shape]
        return [rows.view(-1)[: int(kind.numel)].view(shape) for rows in made]
