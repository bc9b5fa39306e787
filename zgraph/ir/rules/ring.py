"""Attention over a sequence in parts, where keys and values go round the ranks: an op's way to place it.

    %o, %l = aten._scaled_dot_product_flash_attention_for_cpu(%q, %k, %v)     q, k, v: S2 -> S2, S2

Each rank has the queries, keys and values of its part of the tokens. In N steps, the keys and values of each part visit
each rank, which attends to them and combines the outputs by the logarithms of their sums. That is for heads that do not
divide over the ranks. It takes an op that knows its rank, and exchanges with its neighbours: which tokens a causal mask
hides depends on whose keys are there.

Source: Ring Attention, Liu, Zaharia, Abbeel, 2023; combining by logarithms of sums: FlashAttention, Dao et al., 2022.
"""

from __future__ import annotations

from collections.abc import Mapping

from zgraph.ir.rules.factors import Call, Strategy
from zgraph.ir.types import Placement, Replicate, Shard

__all__ = ["RING", "ring_way"]

RING: Mapping[str, str] = {
    "aten._scaled_dot_product_flash_attention_for_cpu.default": "ring_attention",
    "aten._scaled_dot_product_flash_attention_for_cpu_backward.default": "ring_attention_backward",
}
"""The op on parts of the sequence for each op of torch."""

ROWS = Shard(2)
"""Where the sequence is in queries, keys and values: [batch, heads, tokens, size]."""


def ring_way(call: Call, num_ranks: int) -> Strategy | None:
    """The strategy of ranks that each have a part of the sequence; None if the op is no such attention.

    Args:
        call: on the whole sequence.
        num_ranks: ranks along the axis.
    """
    if call.op not in RING:
        return None
    is_backward = call.op.endswith("_backward.default")
    first, num_plain = (1, 6) if is_backward else (0, 3)
    queries, keys = call.shape(first), call.shape(first + 1)
    count = queries[2]
    if call.arg(6 if is_backward else 3, "dropout_p", 0.0) or keys[2] != count or not ROWS.divides(count, num_ranks):
        return None
    ins: list[Placement] = [ROWS] * num_plain
    for mask in call.ins[num_plain:]:
        if mask is None or len(mask) < 2 or mask[-1] not in (1, count) or mask[-2] not in (1, count):
            return None
        ins.append(Shard(len(mask) - 2) if mask[-2] == count else Replicate())
    return Strategy(tuple(ins), tuple(ROWS for _ in call.outs))
