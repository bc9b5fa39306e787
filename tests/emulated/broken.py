"""Parts that go wrong, for the tests of the driver: python -m tests.emulated.broken part NAME --out FOLDER ..."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.lease import results
from benchmarks.lease.driver import NO_GPU
from benchmarks.lease.results import Emit


def works(emit: Emit) -> None:
    emit("first", ok=True)


def hangs(emit: Emit) -> None:
    """As does a process that it has started."""
    emit("first", ok=True)
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    (emit.folder / "processes").write_text(f"{os.getpid()} {other.pid}")
    print("about to sleep", flush=True)
    time.sleep(600)


def raises(emit: Emit) -> None:
    raise ValueError("no such thing")


def aborts(emit: Emit) -> None:
    """After a result that there was not before."""
    for name in ("first", "second", "third"):
        if name not in emit.done:
            emit(name, ok=True)
            os.abort()


def one_rank_fails(emit: Emit) -> None:
    if os.environ["RANK"] == "1":
        raise RuntimeError("this rank alone")
    time.sleep(600)


def finds_no_gpu(emit: Emit) -> None:
    print("there is no GPU here.", file=sys.stderr)
    sys.exit(NO_GPU)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("name")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--seconds", type=float)
    parser.add_argument("--offset", type=int)
    given = parser.parse_args(sys.argv[2:])
    earlier, _ = results.read(given.out, given.offset)
    emit = Emit(given.out, given.name, given.seconds, done=frozenset(r.name for r in earlier))
    globals()[given.name](emit)


if __name__ == "__main__":
    main()
