"""Environment variables that zgraph reads, declared once."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from zgraph.errors import UsageError, did_you_mean

LOG_KINDS = ("capture", "passes", "recompiles", "progress")
"""Kinds that ZGRAPH_LOGS may name: a line for each captured graph, one for each pass, one for the cause of each
recompile, and a progress bar on a terminal."""

USUAL_LOGS = frozenset({"capture", "recompiles", "progress"})


ARENAS = ("registered", "symmetric", "plain")
"""Kinds of memory that ZGRAPH_ARENAS may name."""


@dataclass(frozen=True)
class ElasticPlace:
    """Place of a replica in an elastic job, as `zgraph launch --elastic` tells it.

    Args:
        host, port: of the job's key-value store: ZGRAPH_ELASTIC_STORE, `host:port`.
        replica: number of this replica from 0 on: ZGRAPH_ELASTIC_REPLICA.
        least, most: replicas that the job takes: ZGRAPH_ELASTIC, `MIN:MAX`.
        gone_s: seconds of silence after which a rank is gone: ZGRAPH_ELASTIC_GONE, 5 by default.
    """

    host: str
    port: int
    replica: int
    least: int
    most: int
    gone_s: float = 5.0


@dataclass(frozen=True)
class Environment:
    """The environment variables that zgraph reads.

    Args:
        dump: ZGRAPH_DUMP, a folder for one `.zir` file a pass.
        verify: ZGRAPH_VERIFY, 0 never verifies, 1 certifies that the result computes what was captured, 2
            certifies the graph after every pass, and verifies the round trip of its text.
        timeout_s: ZGRAPH_TIMEOUT, seconds that a rank waits for another before it says where all of them are and ends.
        disable: ZGRAPH_DISABLE, names of passes to leave out, separated by commas.
        traceback: ZGRAPH_TRACEBACK, "short" leaves torch's frames out of errors that come while a model is captured,
            "full" has all.
        logs: ZGRAPH_LOGS, what is told while a model is captured and compiled: kinds of `LOG_KINDS`, separated by
            commas, "all" or "none".
        arenas: ZGRAPH_ARENAS, the memory that collectives read and write on GPUs: "registered" with NCCL where that can
            be, "symmetric" as a window on all ranks too, or "plain".
        plans: ZGRAPH_PLANS, where plans are kept between runs: a folder, or True for "1", that of this user; False for
            "0" (the default) keeps none.
        config: ZGRAPH_CONFIG, the configuration file of `zgraph.hf.Trainer` where it is given none.
    """

    dump: Path | None = None
    verify: int = 1
    timeout_s: float = 600.0
    disable: frozenset[str] = frozenset()
    config: Path | None = None
    traceback: str = "short"
    logs: frozenset[str] = USUAL_LOGS
    arenas: str = "registered"
    plans: Path | bool = False


def environment() -> Environment:
    """The environment as it is now.

    Raises:
        UsageError: a variable has a value that means nothing.
    """
    level = os.environ.get("ZGRAPH_VERIFY", "1")
    if level not in ("0", "1", "2"):
        raise UsageError(f"ZGRAPH_VERIFY must be 0, 1 or 2, not {level!r}")
    dump = os.environ.get("ZGRAPH_DUMP")
    disable = frozenset(filter(None, (name.strip() for name in os.environ.get("ZGRAPH_DISABLE", "").split(","))))
    config = os.environ.get("ZGRAPH_CONFIG")
    traceback = os.environ.get("ZGRAPH_TRACEBACK", "short")
    if traceback not in ("short", "full"):
        raise UsageError(f"ZGRAPH_TRACEBACK must be short or full, not {traceback!r}")
    arenas = os.environ.get("ZGRAPH_ARENAS", "registered")
    if arenas not in ARENAS:
        raise UsageError(f"ZGRAPH_ARENAS must be {', '.join(ARENAS[:-1])} or {ARENAS[-1]}, not {arenas!r}")
    return Environment(
        Path(dump) if dump else None,
        int(level),
        _seconds("ZGRAPH_TIMEOUT", 600.0),
        disable,
        Path(config) if config else None,
        traceback,
        _logs(),
        arenas,
        _plans(os.environ.get("ZGRAPH_PLANS", "0")),
    )


def _plans(text: str) -> Path | bool:
    return text == "1" if text in ("", "0", "1") else Path(text).expanduser()


def _logs() -> frozenset[str]:
    text = os.environ.get("ZGRAPH_LOGS")
    if text is None or text in ("all", "none"):
        return USUAL_LOGS if text is None else frozenset(LOG_KINDS if text == "all" else ())
    kinds = frozenset(filter(None, (name.strip() for name in text.split(","))))
    for name in sorted(kinds - {*LOG_KINDS}):
        known = f"the kinds are {', '.join(LOG_KINDS)}, or all, or none"
        hint = did_you_mean(name, LOG_KINDS, "")
        raise UsageError(f"ZGRAPH_LOGS names {name!r}, which is no kind of line; {hint}{' ' * bool(hint)}{known}")
    return kinds


def _seconds(name: str, default: float) -> float:
    try:
        found = float(text) if (text := os.environ.get(name)) else default
    except ValueError:
        found = 0.0
    if not found > 0:
        raise UsageError(f"{name} must be a number of seconds above 0 (inf for no limit), not {text!r}")
    return found


def elastic_place() -> ElasticPlace:
    """The place of this replica in an elastic job.

    Raises:
        UsageError: a variable is missing, or has a value that means nothing.
    """
    host, _, port = os.environ.get("ZGRAPH_ELASTIC_STORE", "").rpartition(":")
    if not host or not is_port(port):
        raise UsageError(
            "an elastic job has its key-value store in ZGRAPH_ELASTIC_STORE=host:port, which "
            f"{f'is {host}:{port}' if port else 'is not set'}; start the script by `zgraph launch --elastic MIN:MAX`"
        )
    least, most = read_range(os.environ.get("ZGRAPH_ELASTIC", ""), "ZGRAPH_ELASTIC")
    replica = os.environ.get("ZGRAPH_ELASTIC_REPLICA", "")
    if not _is_whole(replica) or int(replica) >= most:
        raise UsageError(f"ZGRAPH_ELASTIC_REPLICA must be a number from 0 to {most - 1}, not {replica!r}")
    gone_s = _seconds("ZGRAPH_ELASTIC_GONE", 5.0)
    return ElasticPlace(host, int(port), int(replica), least, most, gone_s)


def read_range(text: str, name: str) -> tuple[int, int]:
    """The least and the most replicas that `MIN:MAX` says. Raises UsageError for what is no such range."""
    least, _, most = text.partition(":")
    if not (_is_whole(least) and _is_whole(most) and 1 <= int(least) <= int(most)):
        raise UsageError(f"{name} must be the least and the most replicas, as in 1:4, not {text!r}")
    return int(least), int(most)


def is_port(text: str) -> bool:
    """Whether a text is the number of a port."""
    return _is_whole(text) and 0 < int(text) < 1 << 16


def _is_whole(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) < 6


def cache_folder() -> Path:
    """Where generated kernels, and what was measured, lie."""
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "zgraph"


def ranks_here() -> int:
    """Ranks on this host, as launchers tell it; 0 if they do not."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "0"))


ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")
"""Variables that set torch's allocator of GPUs."""


def has_expandable_segments() -> bool:
    """Whether the environment asks torch's allocator of GPUs for expandable segments."""
    return any("expandable_segments:True" in os.environ.get(name, "") for name in ALLOCATOR)
