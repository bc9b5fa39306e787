"""Questions to the job's key-value store that do not wait for what is not there, and one that does, aside.

A client of the store does one thing at a time. So whoever waits for a key has a connection of its own: others of this
process, the heartbeat above all, go on meanwhile.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Sequence
from contextlib import suppress
from datetime import timedelta
from typing import Any

from zgraph.bridge.private_runtime import Store

_ABSENT = "\0"
_PATIENCE = timedelta(days=20)
"""Milliseconds in it fit into 31 bits. A wait that ended sooner would be told of on stderr, by the store's client."""
_GOODBYE_S = 5.0


def is_there(store: Store, key: str) -> bool:
    """Whether a key is there, for one that others may wait for."""
    return bool(store.check([key]))


def peek(store: Store, key: str) -> bytes:
    """The bytes under a key that nobody waits for; empty if there are none. One message there and one back.

    It is a comparison that fails: the store then answers with what is there, or with what was expected. torch's
    TCPStore also wakes all who wait for the key, as if it were there.
    """
    found = bytes(store.compare_set(key, _ABSENT, _ABSENT))
    return b"" if found == _ABSENT.encode() else found


def read_all(store: Store, keys: Sequence[str]) -> list[bytes]:
    """The bytes under each of many keys, empty where there are none: two questions if all are there."""
    if not keys or store.check(list(keys)):
        return [bytes(word) for word in store.multi_get(list(keys))] if keys else []
    return [peek(store, key) for key in keys]


def claim(store: Store, name: str, after: int, word: str) -> int:
    """Put a word at the first free place of a list behind some place, and return its number, from 1 on.

    The place is taken and the word put in one step: who dies on the way leaves no place without a word.
    """
    for number in itertools.count(after + 1):
        if bytes(store.compare_set(f"{name}/{number}", "", word)) == word.encode():
            return number
    raise AssertionError


def listed(store: Store, name: str, after: int, most: int) -> list[bytes]:
    """The words of a list behind some place, so many at most: a question for each, and one more."""
    found: list[bytes] = []
    while len(found) < most and (word := peek(store, f"{name}/{after + len(found) + 1}")):
        found.append(word)
    return found


class Ears:
    """Waits for keys of a store, each on a connection that no other uses meanwhile.

    Args:
        store: cloned for each wait that begins while all clones are in use.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._idle: list[Store] = []

    def listen(self, key: str, otherwise: str) -> Ear:
        """Begin to wait for a key, as a context that ends the wait.

        Args:
            key: waited for.
            otherwise: what the key is set to, if it is not there when the context ends: nothing else ends the wait.

        Raises RuntimeError if the store is gone.
        """
        if not self._idle:
            store: Any = self._store  # torch's stubs leave out that it can be cloned
            clone: Store = store.clone()
            clone.set_timeout(_PATIENCE)
            self._idle.append(clone)
        return Ear(self._store, self._idle, key, otherwise)


class Ear(threading.Thread):
    """Waits for a key.

    Args:
        store: where the key is set.
        idle: connections that nobody uses, one of which is taken, and given back.
        key, otherwise: as above.

    `over` is set when the key is there, or the store is gone.
    """

    def __init__(self, store: Store, idle: list[Store], key: str, otherwise: str) -> None:
        super().__init__(name="zgraph-ear", daemon=True)
        self._store, self._idle, self._key, self._otherwise = store, idle, key, otherwise
        self._connection = idle.pop()
        self.over = threading.Event()
        self._word, self._error = b"", ""

    def __enter__(self) -> Ear:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        if not self.over.is_set():
            with suppress(RuntimeError):
                self._store.compare_set(self._key, "", self._otherwise)
        self.join(_GOODBYE_S)

    def run(self) -> None:
        try:
            self._word = bytes(self._connection.get(self._key))
            while not self._word and not is_there(self._connection, self._key):  # woken by a comparison that failed
                self._word = bytes(self._connection.get(self._key))
            self._idle.append(self._connection)
        except RuntimeError as error:
            self._error = str(error)
        finally:
            self.over.set()

    def word(self) -> str:
        """The text under the key, once the wait is over. Raises RuntimeError if the store is gone."""
        if self._error:
            raise RuntimeError(self._error)
        return self._word.decode()
