"""Files of copies on their way between hosts: each rank serves what its host has, and asks others for what it needs.

A connection takes questions, a line of JSON each, and answers with a length and as many bytes. Whoever asks gives the
secret that the other has told all ranks. Large files are sent in pieces, each of which waits a while for a moment in
which no collective of this process is on its way.
"""

from __future__ import annotations

import hmac
import json
import os
import re
import secrets
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from zgraph.engine.checkpoint.directory import open_plain
from zgraph.engine.checkpoint.memory.shelf import Mark, Shelf
from zgraph.errors import CheckpointError
from zgraph.runtime.transfers import is_idle

PIECE_BYTES = 1 << 20
LULL_S = 0.05
"""How long a piece waits for the link to be idle at most: so a copy always arrives."""
ANSWER_S = 60.0
LINE_BYTES = 4096
LOW_PRIORITY = 0x20
"""Class CS1 of DiffServ, for traffic that may wait (RFC 3662)."""
_ABSENT, _NEVER = (1 << 64) - 1, (1 << 64) - 2
_FILE = re.compile(r"[a-z0-9_]+\.(safetensors|json)")


class Address(NamedTuple):
    """Where a rank serves, and the secret to give there."""

    host: str
    port: int
    secret: str


def own_address(towards: str) -> str:
    """The address from which this host reaches another; 127.0.0.1 if none is known."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking, suppress(OSError):
        asking.connect((towards, 9))  # sends nothing
        return str(asking.getsockname()[0])
    return "127.0.0.1"


class Server:
    """Serves the copies of a shelf, in threads, until it is closed.

    Args:
        shelf: of this host.
        host: the address to listen on.
    """

    def __init__(self, shelf: Shelf, host: str) -> None:
        self._shelf = shelf
        self._given_up: set[str] = set()
        self._listener = socket.create_server((host, 0))
        self.address = Address(host, self._listener.getsockname()[1], secrets.token_hex(16))
        threading.Thread(target=self._serve, name="zgraph-copies", daemon=True).start()

    def give_up(self, mark: Mark) -> None:
        """Say from now on that no copy of a mark will come, where it is not there."""
        self._given_up.add(str(mark))

    def close(self) -> None:
        """Take no more questions."""
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:  # closed
                return
            threading.Thread(target=self._answer, args=(connection,), name="zgraph-copy", daemon=True).start()

    def _answer(self, connection: socket.socket) -> None:
        with connection, suppress(OSError, ValueError, RecursionError, CheckpointError):
            connection.settimeout(ANSWER_S)
            connection.setsockopt(socket.IPPROTO_IP, socket.IP_TOS, LOW_PRIORITY)
            with connection.makefile("rb") as lines:
                while line := lines.readline(LINE_BYTES):
                    self._send(connection, self._asked(line))

    def _asked(self, line: bytes) -> Path:
        """The file that a question names. Raises ValueError if it is no question, or has not the secret."""
        asked: Any = json.loads(line)
        secret = str(asked.get("secret")) if isinstance(asked, dict) else ""
        if not hmac.compare_digest(secret.encode(), self.address.secret.encode()):
            raise ValueError("a question without the secret")
        mark, rank, file = Mark.parse(str(asked.get("mark"))), asked.get("rank"), str(asked.get("file"))
        if mark is None or type(rank) is not int or rank < 0 or _FILE.fullmatch(file) is None:
            raise ValueError("a question for no file of a copy")
        return self._shelf.place(rank, mark) / file

    def _send(self, connection: socket.socket, path: Path) -> None:
        try:
            file = open_plain(path)
        except OSError:
            connection.sendall((_NEVER if path.parent.name in self._given_up else _ABSENT).to_bytes(8, "big"))
            return
        with file:
            left = os.fstat(file.fileno()).st_size
            connection.sendall(left.to_bytes(8, "big"))
            while left and (piece := file.read(min(left, PIECE_BYTES))):
                _await_lull()
                connection.sendall(piece)
                left -= len(piece)


def _await_lull() -> None:
    until = time.monotonic() + LULL_S
    while not is_idle() and time.monotonic() < until:
        time.sleep(0.001)


class Client:
    """Asks the server of one rank for files.

    Args:
        address: of the server.
    """

    def __init__(self, address: Address) -> None:
        self._address = address
        self._connection = socket.create_connection((address.host, address.port), ANSWER_S)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()

    def fetch(self, rank: int, mark: Mark, file: str, path: Path, most_bytes: int) -> bool:
        """Write a file of a copy to a path; False if it is not there.

        Args:
            most_bytes: that it may have.

        Raises:
            OSError: the connection broke, or the file cannot be written.
            CheckpointError: it is larger, or will not come.
        """
        question = {"secret": self._address.secret, "rank": rank, "mark": str(mark), "file": file}
        self._connection.sendall(json.dumps(question).encode() + b"\n")
        left = int.from_bytes(self._read(8), "big")
        if left == _ABSENT:
            return False
        if left == _NEVER:
            raise CheckpointError(f"rank {rank} could not write its copy")
        if left > most_bytes:
            raise CheckpointError(f"{file} of a copy of rank {rank} has {left} bytes, and at most {most_bytes} here")
        with path.open("xb") as out:
            while left:
                piece = self._read(min(left, PIECE_BYTES))
                out.write(piece)
                left -= len(piece)
        return True

    def _read(self, count: int) -> bytes:
        parts: list[bytes] = []
        while count:
            part = self._connection.recv(count)
            if not part:
                raise OSError("a rank that was asked for a copy has ended the connection")
            parts.append(part)
            count -= len(part)
        return b"".join(parts)


def retried(action: Callable[[], bool], check: Callable[[], None], limit_s: float, pause_s: float = 0.05) -> None:
    """Do something again until it is done.

    Args:
        action: whether it is done; what it raises as OSError is tried again twice.
        check: called between; raises why it cannot be done any more.
        limit_s: how long to go on.
    """
    until, broken = time.monotonic() + limit_s, 0
    while True:
        try:
            if action():
                return
        except OSError:
            broken += 1
            if broken > 2:
                raise
        check()
        if time.monotonic() > until:
            raise CheckpointError(f"a copy has not come within {limit_s:g} s")
        time.sleep(pause_s)
