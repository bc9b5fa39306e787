"""The command that watches a job while it runs: the pace of each rank, from the heartbeats in the job's store."""

from __future__ import annotations

import re
import socket
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from zgraph.cli.app import AsJson, app, console, print_json
from zgraph.errors import UsageError

if TYPE_CHECKING:
    from zgraph.runtime.beats import Beat

SHOWN = 20
"""Rows of a table: of many ranks, those that compute longest and those that say nothing."""
CONNECT_S = 10.0

_BEAT = re.compile(r"(?P<job>.*?)zgraph/beat/(?P<rank>\d{1,7})", re.ASCII)


@app.command()
def top(
    job: Annotated[str, typer.Argument(help="Where its ranks meet, as HOST:PORT (MASTER_ADDR and MASTER_PORT).")],
    every: Annotated[float, typer.Option(min=0.5, help="Seconds from one look to the next.")] = 2.0,
    once: Annotated[bool, typer.Option("--once", help="Look once, and end.")] = False,
    as_json: AsJson = False,
) -> None:
    """Watch a job that trains: which rank is slowest, at which node, and whether it is its computing or the links.

    It reads the heartbeats in the job's store, one question a look; the ranks do nothing for it.

    Example: `zgraph top gpu-1:29500`
    """
    store = _store(job)
    beats = _beats(store)
    if not beats:
        raise UsageError(f"the store at {job} has no heartbeats: is it a job of zgraph, and has it joined its ranks?")
    if as_json:
        print_json(as_rows(beats))
    elif once:
        console().print(view(job, beats))
    else:
        with Live(console=console(), auto_refresh=False, screen=False) as live:
            while True:
                live.update(view(job, beats), refresh=True)
                time.sleep(every)
                beats = _beats(store)


def _store(job: str) -> Any:
    """The job's store. Raises UsageError if there is none."""
    from datetime import timedelta

    from zgraph.bridge.private_runtime import tcp_store

    host, _, port = job.rpartition(":")
    if not host or not re.fullmatch("[0-9]{1,5}", port) or not 1 <= int(port) < 1 << 16:
        raise UsageError(f"a job is HOST:PORT, where its ranks meet, as gpu-1:29500, and not {job[:80]!r}")
    try:
        socket.create_connection((host, int(port)), CONNECT_S).close()  # where nobody listens, torch prints pages
        return tcp_store(host, int(port), timedelta(seconds=CONNECT_S))[0]
    except (OSError, RuntimeError) as error:
        first = str(error).splitlines()[0]
        raise UsageError(f"no store answers at {job} ({first}): give MASTER_ADDR and MASTER_PORT of the job") from None


def beat_names(keys: Sequence[str]) -> dict[int, str]:
    """The key of each rank's heartbeat, of the keys in a store.

    Ranks have other heartbeats while they join, which are left out. A store may serve jobs that were started again
    under other prefixes: those of the last count, whose prefix is last where numbers in it count as numbers.
    """
    found: dict[str, dict[int, str]] = {}
    for key in keys:
        match = _BEAT.fullmatch(key.removeprefix("/"))
        if match is not None and "zgraph/join" not in match["job"]:
            found.setdefault(match["job"], {})[int(match["rank"])] = key.removeprefix("/")
    return dict(sorted(found[max(found, key=_natural)].items())) if found else {}


def _natural(text: str) -> list[tuple[int, str]]:
    """A key to sort texts by, in which numbers count as numbers: attempt_9 before attempt_10."""
    parts = [part.lstrip("0") if part[:1].isdigit() else part for part in re.split("([0-9]+)", text)]
    return [(len(part) if at % 2 else 0, part) for at, part in enumerate(parts)]


def _beats(store: Any) -> dict[int, Beat | None]:
    """Words of the ranks that are there now."""
    from zgraph.runtime.store_errors import store_errors

    with store_errors():
        names = beat_names(store.list_keys())
        words = store.multi_get([*names.values()]) if names else []
    return {rank: _read(bytes(word)) for rank, word in zip(names, words, strict=True)}


def _read(word: bytes) -> Beat | None:
    """A rank's heartbeat, or one that says that it cannot be read."""
    from zgraph.runtime.beats import Beat

    return Beat.read(word)


def as_rows(beats: Mapping[int, Beat | None]) -> dict[str, Any]:
    """Rows of the table, and the line below it."""
    from zgraph.runtime.pace import parse_pace, slowest

    paces = {rank: pace for rank, beat in beats.items() if beat is not None and (pace := parse_pace(beat.pace))}
    rows = [
        {
            "rank": rank,
            "calls": paces[rank].calls if rank in paces else 0,
            "call_s": paces[rank].call_s if rank in paces else None,
            "computes_s": paces[rank].computes_s if rank in paces else None,
            "waits_s": paces[rank].waits_s if rank in paces else None,
            "waits_at": paces[rank].at if rank in paces else "",
            "place": _place(beat, has_pace=rank in paces),
        }
        for rank, beat in beats.items()
    ]
    return {"ranks": rows, "slowest": slowest(paces)}


def _place(beat: Beat | None, *, has_pace: bool) -> str:
    from zgraph.runtime.beats import UNREADABLE

    if beat is None:
        return "has never been seen"
    return UNREADABLE if beat.pace and not has_pace else beat.place


def view(job: str, beats: Mapping[int, Beat | None]) -> Group:
    """A table of the ranks that compute longest, and what to say of all."""
    found = as_rows(beats)
    rows = sorted(found["ranks"], key=lambda row: -(row["computes_s"] if row["computes_s"] is not None else 1e9))
    table = Table(
        "rank", "calls", "ms a call", "computes", "waits", "waits most at", title=f"{len(beats)} ranks at {job}"
    )
    for row in rows[:SHOWN]:
        numbers = [row[key] for key in ("call_s", "computes_s", "waits_s")]
        told = [f"{1e3 * number:,.1f}" if number is not None else "" for number in numbers]
        table.add_row(str(row["rank"]), str(row["calls"]), *told, Text(row["waits_at"] or row["place"]))
    said = found["slowest"] or "no rank is slower than the others"
    return Group(table, Text(said))
