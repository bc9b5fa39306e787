"""A process of a part: python -m benchmarks.lease part NAME --out FOLDER"""

from __future__ import annotations

import argparse
import faulthandler
import importlib
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

from benchmarks.errors import NoGpu
from benchmarks.lease import results
from benchmarks.lease.driver import NO_GPU
from benchmarks.lease.parts import named
from benchmarks.lease.results import Emit

TOLD_BEFORE_S = 2.0
"""So long before it is killed, a process writes where its threads are."""


def main(arguments: Sequence[str]) -> None:
    """Run a part in this process.

    Args:
        arguments: of the command line, behind the word `part`.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks.lease part")
    parser.add_argument("name")
    parser.add_argument("--out", type=Path, required=True, help="the folder of results")
    parser.add_argument("--seconds", type=float, default=600.0, help="that it has")
    parser.add_argument("--offset", type=int, default=0, help="where its results begin in the file")
    parser.add_argument("--small", action="store_true", help="tiny sizes")
    given = parser.parse_args(arguments)
    faulthandler.enable()
    faulthandler.dump_traceback_later(max(given.seconds - TOLD_BEFORE_S, 1.0))
    part = named(given.name)
    earlier, _ = results.read(given.out, given.offset)
    done = frozenset(result.name for result in earlier if result.part == part.name)
    rank = {"rank": int(os.environ["RANK"])} if part.num_ranks > 1 else {}
    try:
        check_gpu()
    except NoGpu as error:
        print(error, file=sys.stderr)
        sys.exit(NO_GPU)
    emit = Emit(given.out, part.name, given.seconds, rank, done)
    code = 0
    try:
        importlib.import_module(f"benchmarks.lease.{part.name}").run(emit, given.small)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # threads of a group, and the compilers' workers, may take long to end


def check_gpu() -> None:
    """Raises NoGpu if torch finds none."""
    import torch

    if torch.cuda.is_available():
        return
    built = f"with CUDA {torch.version.cuda}" if torch.version.cuda else "for processors"
    built = f"with HIP {torch.version.hip}" if torch.version.hip else built
    raise NoGpu(
        f"torch {torch.__version__}, built {built}, finds no GPU",
        "A lease needs one GPU of NVIDIA, its driver, and a torch that is built with CUDA",
    )
