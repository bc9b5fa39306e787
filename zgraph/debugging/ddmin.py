"""Delta debugging: what of a failing whole is enough to fail.

The algorithm is ddmin of Zeller and Hildebrandt ("Simplifying and isolating failure-inducing input", IEEE Transactions
on Software Engineering 28, 2002, section 3).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

T = TypeVar("T")


def minimal(items: Sequence[T], fails: Callable[[Sequence[T]], bool]) -> list[T]:
    """Some of the items that fail together, of which none can be left out, in their order.

    Halves are tried alone, then quarters alone and left out, and so on. One culprit that fails alone takes some
    2 log n tries among n items, k of them that only fail together some 4 k log n.

    Args:
        items: what fails as a whole.
        fails: whether some of the items still fail; what cannot be tried does not.
    """
    search = _Search(fails)
    kept = list(items)
    if not kept or search.fails([]):
        return []
    size = (len(kept) + 1) // 2
    while len(kept) > 1:
        chunks = [kept[at : at + size] for at in range(0, len(kept), size)]
        alone = next((chunk for chunk in chunks if search.fails(chunk)), None)
        fewer = search.without_chunks(kept, size) if alone is None else alone
        if size == 1 and len(fewer) == len(kept):
            break
        size = (len(fewer) + 1) // 2 if alone is not None else max(size // 2, 1)
        kept = fewer
    return kept


class _Search(Generic[T]):
    """Search that tries each selection of items only once."""

    def __init__(self, fails: Callable[[Sequence[T]], bool]) -> None:
        self._fails, self._known = fails, dict[tuple[T, ...], bool]()

    def fails(self, items: Sequence[T]) -> bool:
        key = tuple(items)
        if key not in self._known:
            self._known[key] = self._fails(items)
        return self._known[key]

    def without_chunks(self, kept: list[T], size: int) -> list[T]:
        """The items that are left after every chunk that is not needed is dropped."""
        at = 0
        while at < len(kept):
            fewer = kept[:at] + kept[at + size :]
            if self.fails(fewer):
                kept = fewer
            else:
                at += size
        return kept
