"""The caching allocator beside a slow model of its policy, which knows addresses and nothing of lists of blocks."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.deep import DEEP
from zgraph.cost.allocator import BLOCK, MIB, CachingAllocator, NoRoom, rounded, segment_bytes

KIB = 1 << 10


class Model:
    """Bytes of the device as intervals: what is in use, and what has memory. What is free is what lies between."""

    def __init__(self, expandable: bool, capacity: int | None) -> None:
        self.expandable, self.capacity = expandable, capacity
        self.mapped: dict[bool, list[tuple[int, int]]] = {True: [], False: []}
        self.used: dict[bool, dict[int, int]] = {True: {}, False: {}}
        self.next = 0

    @property
    def reserved(self) -> int:
        return sum(end - begin for some in self.mapped.values() for begin, end in some)

    def free_runs(self, small: bool) -> list[tuple[int, int]]:
        found = []
        for begin, end in self.mapped[small]:
            at = begin
            for place in sorted(p for p in self.used[small] if begin <= p < end):
                found.append((at, place))
                at = place + self.used[small][place]
            found.append((at, end))
        return [(a, b) for a, b in found if a < b]

    def allocate(self, num_bytes: int) -> tuple[bool, int]:
        size = max(-(-num_bytes // 512), 1) * 512
        small = size <= MIB
        fitting = [(b - a, a) for a, b in self.free_runs(small) if b - a >= size]
        if not fitting:
            self.grow(small, size)
            fitting = [(b - a, a) for a, b in self.free_runs(small) if b - a >= size]
        length, at = min(fitting)
        least = 512 if small or self.expandable else MIB + 1
        self.used[small][at] = size if length - size >= least else length
        return small, at

    def free(self, place: tuple[bool, int]) -> None:
        small, at = place
        del self.used[small][at]

    def grow(self, small: bool, size: int) -> None:
        if not self.expandable:
            wanted = 2 * MIB if small else 20 * MIB if size < 10 * MIB else -(-size // (2 * MIB)) * 2 * MIB
            self.make_room(lambda: wanted)
            self.mapped[small].append((self.next, self.next + wanted))
            self.next += wanted + 1  # segments do not touch
            return
        page = 2 * MIB if small else 20 * MIB
        self.make_room(lambda: sum(b - a for a, b in self.lacking(small, size, page)))
        runs = sorted([*self.mapped[small], *self.lacking(small, size, page)])
        joined: list[tuple[int, int]] = []
        for begin, end in runs:
            if joined and joined[-1][1] == begin:
                joined[-1] = joined[-1][0], end
            else:
                joined.append((begin, end))
        self.mapped[small] = joined

    def lacking(self, small: bool, size: int, page: int) -> list[tuple[int, int]]:
        """The pages without memory in the first stretch that is not in use, has some of them, and is large enough."""
        places = sorted(self.used[small].items())
        stretches, at = [], 0
        for begin, length in places:
            stretches.append((at, begin))
            at = begin + length
        stretches.append((at, 1 << 60))
        for begin, end in stretches:
            if end - begin < size:
                continue
            pages = range(begin // page, -(-(begin + size) // page))
            has = [any(a <= p * page < b for a, b in self.mapped[small]) for p in pages]
            holes = [p for p, there in zip(pages, has, strict=True) if not there]
            whole = range(-(-begin // page), end // page if end < 1 << 60 else pages[-1] + 2)
            if any(not any(a <= p * page < b for a, b in self.mapped[small]) for p in whole):
                return [(p * page, (p + 1) * page) for p in holes]
        raise AssertionError

    def make_room(self, wanted) -> None:
        if self.capacity is None or self.reserved + wanted() <= self.capacity:
            return
        self.release()
        if self.reserved + wanted() > self.capacity:
            raise NoRoom

    def release(self) -> None:
        for small, some in self.mapped.items():
            page = (2 if small else 20) * MIB if self.expandable else 0
            kept: list[tuple[int, int]] = []
            for begin, end in some:
                inside = [(p, p + n) for p, n in self.used[small].items() if begin <= p < end]
                if not page:
                    kept += [(begin, end)] if inside else []
                    continue
                for at in range(begin, end, page):
                    if any(a < at + page and at < b for a, b in inside):
                        if kept and kept[-1][1] == at:
                            kept[-1] = kept[-1][0], at + page
                        else:
                            kept.append((at, at + page))
            self.mapped[small] = kept


SIZES = st.one_of(
    st.integers(0, 4 * KIB),
    st.integers(1, 3 * MIB),
    st.integers(MIB - 600, MIB + 600),
    st.integers(1, 45).map(lambda n: n * MIB + 17),
    st.sampled_from([MIB, 2 * MIB, 10 * MIB, 10 * MIB - 512, 20 * MIB, 19 * MIB]),
)
STEPS = st.lists(st.one_of(SIZES, st.integers(0, 1 << 30).map(lambda n: -n - 1)), max_size=60)


@pytest.mark.parametrize("expandable", [False, True])
@settings(max_examples=2000 if DEEP else 25, deadline=None)
@given(steps=STEPS, capacity=st.sampled_from([None, 64 * MIB, 130 * MIB]))
def test_reserved_is_that_of_the_model(expandable, steps, capacity):
    ours, model = CachingAllocator(expandable=expandable, capacity=capacity), Model(expandable, capacity)
    alive = []
    for step in steps:
        if step >= 0:
            refused = []
            for side in (ours, model):
                try:
                    made = side.allocate(step)
                except NoRoom:
                    refused.append(side)
                else:
                    alive.append(made) if side is ours else alive.append((alive.pop(), made))
            assert len(refused) in (0, 2)
        elif alive:
            block, place = alive.pop(-step % len(alive))
            ours.free(block)
            model.free(place)
        assert ours.reserved_bytes == model.reserved
        assert ours.allocated_bytes == sum(sum(some.values()) for some in model.used.values())
        assert ours.peak_reserved >= ours.reserved_bytes >= ours.allocated_bytes


@pytest.mark.parametrize(
    ("size", "block", "segment"),
    [
        (1, 512, 2 * MIB),
        (513, 1024, 2 * MIB),
        (MIB, MIB, 2 * MIB),
        (MIB + 1, MIB + 512, 20 * MIB),
        (10 * MIB - 512, 10 * MIB - 512, 20 * MIB),
        (10 * MIB, 10 * MIB, 10 * MIB),
        (21 * MIB, 21 * MIB, 22 * MIB),
    ],
)
def test_sizes_of_blocks_and_segments(size, block, segment):
    assert rounded(size) == block
    assert segment_bytes(block) == segment
    assert rounded(0) == BLOCK


def test_a_layout_that_fragments():
    """Blocks of 12 MiB cannot serve requests of 16 MiB, of which expandable segments know nothing."""
    reserved = []
    for expandable in (False, True):
        found = CachingAllocator(expandable=expandable)
        blocks = [found.allocate(12 * MIB) for _ in range(8)]
        for block in blocks:
            found.free(block)
        for _ in range(6):
            found.allocate(16 * MIB)
        reserved.append(found.peak_reserved)
    assert reserved == [(8 * 12 + 6 * 16) * MIB, 100 * MIB]


def test_a_full_device_gives_back_what_is_cached():
    found = CachingAllocator(capacity=100 * MIB)
    blocks = [found.allocate(12 * MIB) for _ in range(8)]
    for block in blocks:
        found.free(block)
    assert found.reserved_bytes == 96 * MIB
    for _ in range(6):
        found.allocate(16 * MIB)
    assert found.reserved_bytes == 96 * MIB
    with pytest.raises(NoRoom):
        found.allocate(16 * MIB)
