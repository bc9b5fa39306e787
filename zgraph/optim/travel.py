"""Means over replicas, sent as codes: each codes its own numbers, owners add parts, and code the mean once more."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from zgraph.bridge.codecs import add_decoded, decode, encode_into
from zgraph.ir.codecs import Codec, Raw
from zgraph.ir.types import DType


class Travel:
    """The way of numbers to the other replicas and of their mean back.

    Both ways are coded with error feedback: the two stages of 1-bit Adam's all-reduce (Tang et al., ICML 2021).

    Args:
        codec: of the numbers.
        numel: how many there are.
        group: the ranks, over gloo; nobody else uses it meanwhile.
        device: where the numbers are.
    """

    def __init__(self, codec: Codec, numel: int, group: dist.ProcessGroup, device: torch.device) -> None:
        self.codec, self.numel, self.group = codec, numel, group
        self.count, self.rank = dist.get_world_size(group), dist.get_rank(group)
        self.part = -(-numel // self.count)
        self.device, self.sent_bytes = device, 0
        self._own: torch.Tensor | None = None
        self._of_part: torch.Tensor | None = None
        if not isinstance(codec, Raw):
            self._own = torch.zeros(self.count, self.part, device=device)
            self._of_part = torch.zeros(1, self.part, device=device)

    def mean(self, numbers: torch.Tensor, ready: Any = None) -> torch.Tensor:
        """The mean over the ranks of [numel] numbers in fp32, the same on all.

        Args:
            numbers: those of this rank.
            ready: the event after which they are there, on a GPU.
        """
        if ready is None:
            return self._mean(numbers)
        stream = torch.cuda.Stream(numbers.device)  # type: ignore[no-untyped-call]
        with torch.cuda.stream(stream):
            stream.wait_event(ready)
            found = self._mean(numbers)
        stream.synchronize()
        return found

    def _mean(self, numbers: torch.Tensor) -> torch.Tensor:
        size = self.codec.num_bytes(self.part, DType.f32)
        padded = numbers.new_zeros(self.count, self.part)
        padded.view(-1)[: self.numel].copy_(numbers)
        codes = torch.empty(self.count, size, dtype=torch.uint8, device=numbers.device)
        encode_into(self.codec, padded, codes, self._own)
        mine = codes.cpu()
        received = torch.empty_like(mine)
        dist.all_to_all_single(received, mine, group=self.group)
        total = numbers.new_zeros(1, self.part)
        for row in received.to(self.device):
            add_decoded(self.codec, row[None], total)
        total /= self.count
        code = torch.empty(1, size, dtype=torch.uint8, device=numbers.device)
        encode_into(self.codec, total, code, self._of_part)
        dist.all_gather([*received.unbind()], code.cpu().view(-1), group=self.group)
        self.sent_bytes += 2 * (self.count - 1) * size
        return decode(self.codec, received.to(self.device), self.part).view(-1)[: self.numel]

    # --- what codes left out ---------------------------------------------------------------------------------------

    @property
    def num_bytes(self) -> int:
        """Bytes of the rests."""
        return sum(rest.nbytes for rest in (self._own, self._of_part) if rest is not None)

    def evened(self) -> torch.Tensor:
        """Rest that is still due to the mean, [numel] in fp32, the same on all ranks, which all go on with."""
        if self._own is None or self._of_part is None:
            return torch.zeros(self.numel, device=self.device)
        due = self._own / self.count
        due[self.rank] += self._of_part[0]
        due = due.cpu()
        dist.all_reduce(due, group=self.group)
        whole = due.view(-1)[: self.numel].to(self.device)
        self.put(whole)
        return whole

    def put(self, whole: torch.Tensor) -> None:
        """Take what is due to the mean in the place of what was."""
        if self._own is not None and self._of_part is not None:
            self._own.zero_().view(-1)[: self.numel].copy_(whole)
            self._of_part.zero_()
