"""Batches of a dataset for one rank, from where a checkpoint left off."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset, Sampler

from zgraph.errors import UsageError


class EngineLoader:
    """Micro-batches of this rank; each iteration is an epoch, and shuffles anew.

    Args:
        dataset: with a length.
        micro_batch: rows of a batch.
        collate: makes a batch of rows, as for torch's DataLoader.
        drop_last: leave out a last batch that is smaller.
        seed: of the order.
        num_ranks, rank: who shares the rows, and which of them this is.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        micro_batch: int,
        collate: Callable[[list[Any]], Any] | None,
        drop_last: bool,
        seed: int,
        num_ranks: int,
        rank: int,
    ) -> None:
        if isinstance(dataset, IterableDataset):
            raise UsageError("training_data must have a length; give an iterable to your own DataLoader instead")
        self.sampler: DistributedSampler[Any] = DistributedSampler(
            dataset, num_ranks, rank, shuffle=True, seed=seed, drop_last=drop_last
        )
        self.position = _From(self.sampler)
        own = torch.Generator().manual_seed(seed)  # an iteration draws from it, and dropout must not notice
        self.loader: DataLoader[Any] = DataLoader(
            dataset, micro_batch, sampler=self.position, collate_fn=collate, drop_last=drop_last, generator=own
        )
        self.micro_batch = micro_batch
        self.epoch, self.batch = 0, 0

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        self.sampler.set_epoch(self.epoch)
        self.position.skip = self.batch * self.micro_batch
        for rows in self.loader:
            self.batch += 1
            yield rows
        self.epoch, self.batch, self.position.skip = self.epoch + 1, 0, 0

    def state_dict(self) -> dict[str, int]:
        """Where the iteration is: rows that all ranks have been given of this epoch."""
        return {"epoch": self.epoch, "rows": self.batch * self.micro_batch * self.sampler.num_replicas}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """The next iteration goes on there, at another world size and batch size, too: at the next whole batch."""
        self.epoch = state["epoch"]
        self.batch = -(-state["rows"] // (self.micro_batch * self.sampler.num_replicas))


class _From(Sampler[int]):
    """A sampler without its first rows."""

    def __init__(self, sampler: DistributedSampler[Any]) -> None:
        self.sampler, self.skip = sampler, 0

    def __iter__(self) -> Iterator[int]:
        for at, row in enumerate(self.sampler):
            if at >= self.skip:
                yield row

    def __len__(self) -> int:
        return len(self.sampler)
