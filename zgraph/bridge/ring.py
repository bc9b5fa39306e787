"""Attention of one rank's queries to keys and values that go round the ranks, and its backward.

At step s a rank has the part of the rank s places before. While it attends to that, it sends it on. Of a causal mask, a
part of later tokens is skipped, and one's own is causal. Outputs are combined in fp32, by the logarithms of their sums;
gradients of keys and values travel with these, in fp32 too, and come home after the last step.

Source: `zgraph.ir.rules.ring`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from queue import Queue
from typing import Any

import torch

from zgraph.bridge.parts import along_axis, laid_out
from zgraph.ir import Mesh, Node, num_ranks
from zgraph.ir.axis_rules import axis_of

__all__ = ["Attention", "Pending", "Shift", "backward", "forward", "on_ranks", "runs"]

Pending = Callable[[], torch.Tensor]
"""A tensor on its way: called, it waits and gives what came."""

Shift = Callable[[torch.Tensor], Pending]
"""Sends a tensor to the next rank, and begins to take one like it from the rank before."""

aten: Any = torch.ops.aten

FAR = 128.0
"""Magnitude from which a logarithm of sums in fp32 says too little of them."""


@dataclass(frozen=True)
class Attention:
    """One call of an attention, as one rank of several has it.

    Args:
        rank: this one.
        num_ranks: ranks that have a part of the sequence each.
        is_causal: whether tokens see those before them alone.
        mask: None, or this rank's rows of what is added to all products, or bool: of those that count.
        scale: of products; None for one over the root of a head's size.
    """

    rank: int
    num_ranks: int
    is_causal: bool = False
    mask: torch.Tensor | None = None
    scale: float | None = None

    def owner(self, step: int) -> int:
        """Whose keys are here at a step."""
        return (self.rank - step) % self.num_ranks

    def is_hidden(self, owner: int) -> bool:
        """Whether none of the rank's tokens sees those of an owner."""
        return self.is_causal and owner > self.rank

    def options(self, owner: int) -> tuple[bool, torch.Tensor | None]:
        """Whether an owner's part is causal for this rank, and the mask for it."""
        mask = self.mask
        if mask is not None and mask.shape[-1] > 1:
            mask = mask.chunk(self.num_ranks, -1)[owner].contiguous()
        return self.is_causal and owner == self.rank, mask


def forward(
    call: Attention, shift: Shift, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of the rank's queries to all keys and values, and the logarithms of its sums.

    Args:
        call: the call.
        shift: to the next rank.
        q: [B, H, T / N, D], the rank's.
        k: [B, K, T / N, D].
        v: [B, K, T / N, E].
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    out = torch.zeros((*q.shape[:3], v.shape[3]), dtype=wide, device=q.device)
    largest = torch.full(q.shape[:3], -torch.inf, dtype=wide, device=q.device)
    total = torch.zeros(q.shape[:3], dtype=wide, device=q.device)
    packed = _packed(k, v)
    for step in range(call.num_ranks):
        coming = shift(packed) if step < call.num_ranks - 1 else None
        owner = call.owner(step)
        if not call.is_hidden(owner):
            keys, values = _unpacked(packed, k, v)
            is_causal, mask = call.options(owner)
            made, logs = aten._scaled_dot_product_flash_attention_for_cpu(
                q, keys, values, 0.0, is_causal, attn_mask=mask, scale=call.scale
            )
            top, weight = _apart(_without_hidden(logs.to(wide), mask), call, q, keys, mask, is_causal=is_causal)
            before, largest = largest, torch.maximum(largest, top)
            seen = largest > -torch.inf
            old, new = (torch.where(seen, (one - largest).exp(), 0.0) for one in (before, top))
            new = new * weight
            out.mul_(old.unsqueeze(-1)).add_(made.to(wide) * new.unsqueeze(-1))
            total = total * old + new
        if coming is not None:
            packed = coming()
    is_seen = total > 0
    out.div_(torch.where(is_seen, total, 1.0).unsqueeze(-1))
    sums = torch.where(is_seen, largest + total.log(), 0.0)  # as the op of torch says of rows that see nothing
    return out.to(q.dtype), sums


def _apart(
    logs: torch.Tensor,
    call: Attention,
    q: torch.Tensor,
    keys: torch.Tensor,
    mask: torch.Tensor | None,
    *,
    is_causal: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logarithms of sums as the largest product of each row, and the sum of exponentials less that.

    A mask of large numbers, -1e9 say in all of a row, leaves no digit of a logarithm for how many there are. Of such
    rows products are computed again; of others the logarithm itself stands for the largest.
    """
    is_far = (logs.abs() > FAR) & (logs > -torch.inf)
    if not is_far.any():
        return logs, torch.ones_like(logs)
    shared = q.shape[1] // keys.shape[1]
    products = q.to(logs.dtype) @ keys.repeat_interleave(shared, 1).to(logs.dtype).transpose(-1, -2)
    products *= q.shape[-1] ** -0.5 if call.scale is None else call.scale
    if mask is not None:
        products = products.masked_fill(~mask, -torch.inf) if mask.dtype is torch.bool else products + mask
    if is_causal:
        products.masked_fill_(torch.ones(products.shape[-2:], dtype=torch.bool, device=q.device).triu(1), -torch.inf)
    top = products.amax(-1)
    weight = (products - torch.where(top > -torch.inf, top, 0.0).unsqueeze(-1)).exp().sum(-1)
    return torch.where(is_far, top, logs), torch.where(is_far, weight, 1.0)


def backward(
    call: Attention,
    shift: Shift,
    gradient: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    sums: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of the rank's queries, keys and values.

    Args:
        call: the call.
        shift: to the next rank.
        gradient: [B, H, T / N, E], of what the rank's queries made.
        q, k, v: as for `forward`.
        out, sums: what it made of them.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    of_q = torch.zeros(q.shape, dtype=wide, device=q.device)
    packed, home = _packed(k, v), None
    for step in range(call.num_ranks):
        coming = shift(packed) if step < call.num_ranks - 1 else None
        owner, made = call.owner(step), None
        if not call.is_hidden(owner):
            keys, values = _unpacked(packed, k, v)
            is_causal, mask = call.options(owner)
            of_queries, *others = aten._scaled_dot_product_flash_attention_for_cpu_backward(
                gradient, q, keys, values, out, sums, 0.0, is_causal, attn_mask=mask, scale=call.scale
            )
            of_q += of_queries
            made = _packed(*others).to(wide)
        gradients = home() if home is not None else torch.zeros(packed.numel(), dtype=wide, device=q.device)
        home = shift(gradients if made is None else gradients.add_(made))
        if coming is not None:
            packed = coming()
    assert home is not None, "there is one rank at least"
    of_k, of_v = _unpacked(home(), k, v)
    return of_q.to(q.dtype), of_k.to(k.dtype), of_v.to(v.dtype)


def _packed(*tensors: torch.Tensor) -> torch.Tensor:
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


def _unpacked(packed: torch.Tensor, *like: torch.Tensor) -> Sequence[torch.Tensor]:
    parts = torch.split(packed, [tensor.numel() for tensor in like])
    return [part.view(tensor.shape) for part, tensor in zip(parts, like, strict=True)]


def _without_hidden(logs: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Logarithms of sums, minus infinity for rows that see none of the keys: torch says 0 of these."""
    if mask is None:
        return logs
    is_hidden = ~mask.any(-1) if mask.dtype is torch.bool else (mask == -torch.inf).all(-1)
    return logs.masked_fill(is_hidden, -torch.inf)


def runs(node: Node, rank: int, size: int) -> Callable[..., tuple[torch.Tensor, ...]]:
    """Runner of a node, which takes what shifts to the next rank, and the tensors that the node reads.

    Args:
        node: of an op of `zgraph.ir.rules.ring.RING`.
        rank: this rank's number along its axis.
        size: ranks along the axis.
    """
    is_backward = node.op.endswith("_backward")
    num_plain, position = (6, 7) if is_backward else (3, 4)
    is_causal = bool(node.args[position] if position < len(node.args) else node.option("is_causal"))
    scale = node.option("scale")
    compute: Callable[..., tuple[torch.Tensor, ...]] = backward if is_backward else forward
    kinds = [result.tensor for result in node.results]

    def execute(shift: Shift, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        mask = tensors[num_plain] if len(tensors) > num_plain else None
        call = Attention(rank, size, is_causal, mask, float(scale) if isinstance(scale, int | float) else None)
        made = compute(call, shift, *tensors[:num_plain])
        return tuple(laid_out(tensor, kind) for tensor, kind in zip(made, kinds, strict=True))

    return execute


def on_ranks(node: Node, operands: Sequence[Sequence[torch.Tensor]], mesh: Mesh) -> list[list[torch.Tensor]]:
    """Results of a node on all ranks of a mesh, each of which has to do with those along its axis alone.

    Args:
        node: of an op of `zgraph.ir.rules.ring.RING`.
        operands: each of them as every rank has it.
        mesh: of the graph.
    """
    made: dict[int, tuple[torch.Tensor, ...]] = {}
    for peers in along_axis(axis_of(node, mesh)[0], mesh):
        made.update(_among(node, operands, peers))
    return [[made[rank][number] for rank in range(num_ranks(mesh))] for number in range(len(node.results))]


def _among(
    node: Node, operands: Sequence[Sequence[torch.Tensor]], peers: Sequence[int]
) -> Mapping[int, tuple[torch.Tensor, ...]]:
    """Results of a node on the ranks of one axis, each on a thread of its own."""
    size = len(peers)
    on_the_way = [Queue[torch.Tensor | Exception]() for _ in peers]

    def run(number: int) -> tuple[torch.Tensor, ...]:
        following = on_the_way[(number + 1) % size]

        def come() -> torch.Tensor:
            found = on_the_way[number].get()
            if isinstance(found, Exception):
                raise found
            return found

        def shift(tensor: torch.Tensor) -> Pending:
            following.put(tensor.clone())
            return come

        try:
            return runs(node, number, size)(shift, *(ranks[peers[number]] for ranks in operands))
        except Exception as error:
            following.put(error)  # who waits for this rank ends with its error
            raise

    with ThreadPoolExecutor(size) as pool:
        return dict(zip(peers, pool.map(run, range(size)), strict=True))
