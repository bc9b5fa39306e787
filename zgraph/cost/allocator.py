"""The caching allocator of GPUs without their memory: what torch reserves for what a program has allocated.

Facts of torch 2.13's `CUDACachingAllocator`. A request is rounded up to 512 bytes. Up to 1 MiB it comes from segments
of 2 MiB, the small pool; larger ones, up to 10 MiB, from segments of 20 MiB, and beyond that from one of their own in
whole 2 MiB, the large pool. The smallest free block that is large enough is taken; what is left of it becomes a
block if it has 512 bytes in the small pool, or more than 1 MiB in the large one. Free neighbours in a segment merge.
Where a device is full, segments that are wholly free are given back, and the request is tried again.

Expandable segments: one a pool, which grows at its end by whole pages of 2 MiB or 20 MiB. All that is left of a block
is used. Where a device is full, the whole pages of free blocks are given back, and later the holes are filled first.
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
    """A stretch of a segment: in use, free, or a hole without memory. Neighbours are those of the same segment."""

    at: int
    size: int
    is_small: bool
    is_used: bool = False
    is_hole: bool = False
    before: Block | None = None
    behind: Block | None = None

    @property
    def is_free(self) -> bool:
        return not self.is_used and not self.is_hole


@dataclass
class _Pool:
    """Free blocks of one pool by size and place, and the first block of its expandable segment."""

    is_small: bool
    free: list[tuple[int, int]] = field(default_factory=list)
    blocks: dict[int, Block] = field(default_factory=dict)
    first: Block | None = None

    @property
    def page(self) -> int:
        """Bytes by which the expandable segment grows."""
        return SMALL_SEGMENT if self.is_small else LARGE_SEGMENT

    def add(self, block: Block) -> None:
        insort(self.free, (block.size, block.at))
        self.blocks[block.at] = block

    def remove(self, block: Block) -> None:
        del self.free[bisect_left(self.free, (block.size, block.at))]
        del self.blocks[block.at]

    def smallest(self, size: int) -> Block | None:
        """The smallest free block of this size or more, the first in memory of those."""
        at = bisect_left(self.free, (size, -1))
        return self.blocks[self.free[at][1]] if at < len(self.free) else None


class CachingAllocator:
    """Blocks and segments of one stream of a device.

    Args:
        expandable: whether segments grow (`PYTORCH_ALLOC_CONF=expandable_segments:True`).
        capacity: bytes that may be reserved; None sets no limit.
    """

    def __init__(self, *, expandable: bool = False, capacity: int | None = None) -> None:
        self.expandable, self.capacity = expandable, capacity
        self.pools = {is_small: _Pool(is_small) for is_small in (True, False)}
        self.allocated_bytes = self.reserved_bytes = 0
        self.peak_allocated = self.peak_reserved = 0
        self._end = 0

    def allocate(self, num_bytes: int) -> Block:
        """A block of as many bytes or more.

        Raises:
            NoRoom: the capacity is reached, and giving back what is cached does not help.
        """
        size = rounded(num_bytes)
        pool = self.pools[size <= SMALL]
        block = pool.smallest(size)
        if block is None:
            block = self._grown(pool, size) if self.expandable else self._segment(pool, size)
        pool.remove(block)
        left = block.size - size
        if left >= BLOCK if pool.is_small or self.expandable else left > SMALL:
            pool.add(_split(block, size))
        block.is_used = True
        self.allocated_bytes += block.size
        self.peak_allocated = max(self.peak_allocated, self.allocated_bytes)
        return block

    def free(self, block: Block) -> None:
        """Give a block back to the cache, joined with its free neighbours."""
        block.is_used = False
        self.allocated_bytes -= block.size
        self._cache(self.pools[block.is_small], block)

    def release(self) -> int:
        """Give what is cached back to the device, as `torch.cuda.empty_cache` does, and say how many bytes.

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

    def _cache(self, pool: _Pool, block: Block) -> Block:
        """The block, free, with its free neighbours in one."""
        if (before := block.before) is not None and before.is_free:
            pool.remove(before)
            _join(before, block)
            block = before
        if (behind := block.behind) is not None and behind.is_free:
            pool.remove(behind)
            _join(block, behind)
        pool.add(block)
        return block

    def _segment(self, pool: _Pool, size: int) -> Block:
        """A new segment for a block of this size."""
        wanted = segment_bytes(size)
        self._reserve(wanted)
        block = Block(self._end, wanted, pool.is_small)
        self._end += wanted
        pool.add(block)
        return block

    def _grown(self, pool: _Pool, size: int) -> Block:
        """A free block of this size in the expandable segment, where the first hole, or its end, has room for one."""
        if pool.first is None:
            pool.first = Block(0, 1 << 60, pool.is_small, is_hole=True)
        while True:
            found = _with_holes(pool.first, size)
            hole = found if found.is_hole else found.behind
            assert hole is not None, "a free block with a hole behind it"
            lacking = size - (0 if found.is_hole else found.size)
            num_bytes = min(-(-lacking // pool.page) * pool.page, hole.size)
            if self._reserve(num_bytes):
                continue  # what was given back has changed the segment
            if num_bytes < hole.size:
                _split(hole, num_bytes)
            hole.is_hole = False
            if (block := self._cache(pool, hole)).size >= size:
                return block

    def _unmap(self, pool: _Pool, block: Block) -> None:
        """Make a hole of the whole pages in a free block."""
        begin = -(-block.at // pool.page) * pool.page
        end = (block.at + block.size) // pool.page * pool.page
        if begin >= end:
            return
        pool.remove(block)
        if begin > block.at:
            hole = _split(block, begin - block.at)
            pool.add(block)
        else:
            hole = block
        if end < hole.at + hole.size:
            pool.add(_split(hole, end - hole.at))
        self.reserved_bytes -= hole.size
        hole.is_hole = True
        if hole.behind is not None and hole.behind.is_hole:
            _join(hole, hole.behind)
        if hole.before is not None and hole.before.is_hole:
            _join(hole.before, hole)

    def _reserve(self, num_bytes: int) -> bool:
        """Reserve bytes, unless what is cached had to be given back for them: whether it was, and gave something."""
        if self.capacity is not None and self.reserved_bytes + num_bytes > self.capacity:
            given = self.release()
            if self.expandable and given:
                return True
            if self.reserved_bytes + num_bytes > self.capacity:
                raise NoRoom(f"{num_bytes} bytes more than the {self.reserved_bytes} that are reserved")
        self.reserved_bytes += num_bytes
        self.peak_reserved = max(self.peak_reserved, self.reserved_bytes)
        return False


def _split(block: Block, size: int) -> Block:
    """Shorten a block; the rest of it, of the same kind."""
    rest = Block(block.at + size, block.size - size, block.is_small, False, block.is_hole, block, block.behind)
    if rest.behind is not None:
        rest.behind.before = rest
    block.size, block.behind = size, rest
    return rest


def _join(first: Block, second: Block) -> None:
    """Lengthen a block by the one behind it."""
    first.size += second.size
    first.behind = second.behind
    if first.behind is not None:
        first.behind.before = first


def _with_holes(first: Block, size: int) -> Block:
    """The first free block or hole with room for so many bytes in itself and in what is free or a hole behind it, some
    of which is a hole."""
    block: Block | None = first
    while block is not None:
        begin, room, has_hole = block, 0, False
        while block is not None and not block.is_used and room < size:
            room, has_hole, block = room + block.size, has_hole or block.is_hole, block.behind
        if room >= size and has_hole:
            return begin
        block = begin.behind
    raise AssertionError("the end of a segment has room for all")
