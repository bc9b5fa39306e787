"""The caching allocator of GPUs without their memory: what torch reserves for what a program has allocated.

Facts of torch 2.13's `CUDACachingAllocator`. A request is rounded up to 512 bytes. Up to 1 MiB it comes from segments
of 2 MiB, the small pool; larger ones, up to 10 MiB, from segments of 20 MiB, and beyond that from a segment of their own
in whole 2 MiB, the large pool. The smallest free block that is large enough is taken; what is left of it becomes a
block if it has 512 bytes in the small pool, or more than 1 MiB in the large one. Free neighbours in a segment merge.
Where a device is full, segments that are wholly free are given back, and the request is tried again.

Expandable segments: one a pool, which grows at its end by whole pages of 2 MiB or 20 MiB. All that is left of a block
is used, and where a device is full, the free pages at the end are given back.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import dataclass, field

MIB = 1 << 20
BLOCK = 512
SMALL = 1 * MIB
SMALL_SEGMENT = 2 * MIB
LARGE_SEGMENT = 20 * MIB
LARGEST_SHARED = 10 * MIB
"""A request of as many bytes or more has a segment of its own."""


def rounded(num_bytes: int) -> int:
    """Bytes of the block that a request gets: a multiple of 512, and 512 for nothing too, as torch asks for none."""
    return max(-(-num_bytes // BLOCK), 1) * BLOCK


def segment_bytes(size: int) -> int:
    """Bytes of a new segment for a block of this size."""
    if size <= SMALL:
        return SMALL_SEGMENT
    return LARGE_SEGMENT if size < LARGEST_SHARED else -(-size // SMALL_SEGMENT) * SMALL_SEGMENT


class NoRoom(Exception):
    """A request that the device has no room for, with all that is cached given back."""


@dataclass(eq=False, slots=True)
class Block:
    """A stretch of a segment: in use, or free. Neighbours are those of the same segment."""

    at: int
    size: int
    segment: int
    is_used: bool = False
    before: Block | None = None
    behind: Block | None = None


@dataclass
class _Pool:
    """Blocks of one pool that are free, smallest first, and where they lie for those of one size."""

    is_small: bool
    free: list[tuple[int, int, int]] = field(default_factory=list)
    blocks: dict[int, Block] = field(default_factory=dict)
    last: Block | None = None
    """The last mapped block of the expandable segment."""

    def add(self, block: Block) -> None:
        insort(self.free, (block.size, block.at, block.segment))
        self.blocks[block.at] = block

    def remove(self, block: Block) -> None:
        del self.free[bisect_left(self.free, (block.size, block.at, block.segment))]
        del self.blocks[block.at]

    def smallest(self, size: int) -> Block | None:
        """The smallest free block of this size or more."""
        at = bisect_left(self.free, (size, -1, -1))
        return self.blocks[self.free[at][1]] if at < len(self.free) else None


class CachingAllocator:
    """Blocks and segments of one stream of a device.

    Args:
        expandable: whether segments grow (`PYTORCH_ALLOC_CONF=expandable_segments:True`).
        capacity: bytes that may be reserved; None sets no limit.
    """

    def __init__(self, *, expandable: bool = False, capacity: int | None = None) -> None:
        self.expandable, self.capacity = expandable, capacity
        self.pools = {True: _Pool(True), False: _Pool(False)}
        self.allocated_bytes = self.reserved_bytes = 0
        self.peak_allocated = self.peak_reserved = 0
        self._end = self._num_segments = 0

    def allocate(self, num_bytes: int) -> Block:
        """A block of as many bytes or more.

        Raises:
            NoRoom: the capacity is reached, and what is cached does not help.
        """
        size = rounded(num_bytes)
        pool = self.pools[size <= SMALL]
        block = pool.smallest(size) or self._new(pool, size)
        pool.remove(block)
        left = block.size - size
        if left >= BLOCK if pool.is_small or self.expandable else left > SMALL:
            rest = Block(block.at + size, left, block.segment, False, block, block.behind)
            if rest.behind is not None:
                rest.behind.before = rest
            block.size, block.behind = size, rest
            pool.add(rest)
            pool.last = rest if pool.last is block else pool.last
        block.is_used = True
        self.allocated_bytes += block.size
        self.peak_allocated = max(self.peak_allocated, self.allocated_bytes)
        return block

    def free(self, block: Block) -> None:
        """Give a block back to the cache, joined with its free neighbours."""
        pool = self.pools[self._is_small(block)]
        self.allocated_bytes -= block.size
        block.is_used = False
        if (before := block.before) is not None and not before.is_used:
            pool.remove(before)
            block.at, block.size, block.before = before.at, before.size + block.size, before.before
            if block.before is not None:
                block.before.behind = block
        if (behind := block.behind) is not None and not behind.is_used:
            pool.remove(behind)
            block.size, block.behind = block.size + behind.size, behind.behind
            if block.behind is not None:
                block.behind.before = block
            pool.last = block if pool.last is behind else pool.last
        pool.add(block)

    def release(self) -> int:
        """Give what is cached back to the device, as `torch.cuda.empty_cache` does; how many bytes.

        Without expandable segments, those that are wholly free; with them, the whole pages of free blocks.
        """
        before = self.reserved_bytes
        for pool in self.pools.values():
            for block in list(pool.blocks.values()):
                if self.expandable:
                    self._unmap(pool, block)
                elif block.before is None and block.behind is None:
                    pool.remove(block)
                    self.reserved_bytes -= block.size
        return before - self.reserved_bytes

    def _is_small(self, block: Block) -> bool:
        return bool(block.segment & 1)

    def _new(self, pool: _Pool, size: int) -> Block:
        """A free block of this size or more, of memory that is reserved now."""
        if self.expandable:
            return self._grown(pool, size)
        wanted = segment_bytes(size)
        self._reserve(wanted)
        self._num_segments += 1
        block = Block(self._end, wanted, 2 * self._num_segments + pool.is_small)
        self._end += wanted
        pool.add(block)
        return block

    def _grown(self, pool: _Pool, size: int) -> Block:
        """The end of the expandable segment, with so many pages more."""
        page = SMALL_SEGMENT if pool.is_small else LARGE_SEGMENT
        last = pool.last
        has = last.size if last is not None and not last.is_used else 0
        more = -(-(size - has) // page) * page
        if self.capacity is not None and self.reserved_bytes + more > self.capacity:
            self.release()
            last = pool.last
            has = last.size if last is not None and not last.is_used else 0
            more = -(-(size - has) // page) * page
        self._reserve(more)
        if last is not None and not last.is_used:
            pool.remove(last)
            last.size += more
            pool.add(last)
            return last
        at = last.at + last.size if last is not None else (1 << 60 if pool.is_small else 0)
        block = Block(at, more, int(pool.is_small), False, last)
        if last is not None:
            last.behind = block
        pool.last = block
        pool.add(block)
        return block

    def _unmap(self, pool: _Pool, block: Block) -> None:
        """Give back the whole pages at the end of the segment."""
        if block is not pool.last:
            return
        page = SMALL_SEGMENT if pool.is_small else LARGE_SEGMENT
        pages = block.size // page * page
        if not pages:
            return
        pool.remove(block)
        self.reserved_bytes -= pages
        block.size -= pages
        if block.size:
            pool.add(block)
            return
        pool.last = block.before
        if block.before is not None:
            block.before.behind = None

    def _reserve(self, num_bytes: int) -> None:
        if self.capacity is not None and self.reserved_bytes + num_bytes > self.capacity:
            self.release()
            if self.reserved_bytes + num_bytes > self.capacity:
                raise NoRoom(f"{num_bytes} bytes more than the {self.reserved_bytes} that are reserved")
        self.reserved_bytes += num_bytes
        self.peak_reserved = max(self.peak_reserved, self.reserved_bytes)
