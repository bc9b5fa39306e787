"""A server that listens until it is told to stop."""

from __future__ import annotations

import socket

import uvicorn

from zgraph.errors import UsageError
from zgraph.server.app import Server

LOOPBACK = ("localhost", "127.0.0.1", "::1")
"""Addresses that only this machine reaches."""

SPARE = 64
"""Connections beside those that wait for an answer: for health, metrics and refusals."""


def hosts_of(host: str) -> list[str] | None:
    """The names by which a server that listens there is called: only its own where no other machine reaches it."""
    return ["localhost", "127.0.0.1", "[::1]"] if host in LOOPBACK else None


def bound(host: str, port: int) -> socket.socket:
    """A socket that listens there. Raises UsageError if it cannot."""
    try:
        return socket.create_server(
            (host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET, backlog=512
        )
    except OSError as error:
        raise UsageError(f"cannot listen on {host}:{port}: {error.strerror}; take another --port or --host") from None


def listener(server: Server) -> uvicorn.Server:
    """The server itself: `run([socket])` answers requests until SIGINT, SIGTERM or `should_exit`.

    At the end it takes no new requests, and those under way have `grace_seconds`. If another rank fails, it ends at
    once, and `server.worker.error` says why.
    """
    worker = server.worker
    found = uvicorn.Server(
        uvicorn.Config(
            server.app,
            log_level="warning",
            access_log=False,
            server_header=False,
            timeout_keep_alive=15,
            timeout_graceful_shutdown=max(1, round(server.limits.grace_seconds)),
            limit_concurrency=worker.max_waiting + worker.generator.max_batch + SPARE,
            h11_max_incomplete_event_size=1 << 16,
            ws="none",
            http="h11",
            loop="asyncio",
        )
    )

    def stop() -> None:
        found.should_exit = True

    worker.when_failed(stop)
    return found
