"""The commands that have to do with the machine at hand: what it is, and starting ranks on it."""

from __future__ import annotations

import logging
import os
import sys
from argparse import Namespace
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from zgraph.cli.app import AsJson, app, console, print_json
from zgraph.cli.environment_report import bug_report, cores
from zgraph.errors import UsageError
from zgraph.viz import gibibytes

MAX_PROCESSOR_RANKS = 4
"""Ranks that are started on a host without GPUs, where nothing else is said: other cores are threads of theirs."""


@app.command()
def env(as_json: AsJson = False) -> None:
    """Describe this machine for a bug report; nothing secret is in it.

    Example: `zgraph env`
    """
    found = bug_report()
    if as_json:
        print_json(found)
        return
    table = Table.grid(padding=(0, 2))
    for title, section in found.items():
        for number, (name, value) in enumerate(section.items()):
            table.add_row("" if number else title, escape(name.removesuffix("_bytes")), escape(_shown(name, value)))
    console().print(table, highlight=False)


def _shown(name: str, value: Any) -> str:
    if isinstance(value, dict):
        return f"{gibibytes(value['bytes'])} in {value['files']:,} files"
    if isinstance(value, list):
        return "\n".join(value) if name == "GPUs" and value else ", ".join(value) or "none"
    if name.endswith("_bytes") and value is not None:
        return gibibytes(value)
    return "unknown" if value is None else str(value)


@app.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
def launch(
    arguments: Annotated[
        list[str], typer.Argument(help="Options of torchrun, then the script, then what is passed to the script.")
    ],
) -> None:
    """Start a script on several ranks, as torchrun does.

    Takes every option of torchrun. Without `--nproc-per-node` there is one rank for each GPU; without GPUs one for each
    core, at most 4. OMP_NUM_THREADS, where it is not set, shares the cores among them. The exit code is the script's.

    Example: `zgraph launch --nproc-per-node 2 train.py --steps 3`
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import determine_local_world_size, run

    options = _torchrun_options(arguments)
    try:
        num_ranks = determine_local_world_size(options.nproc_per_node)
    except ValueError as error:
        raise UsageError(f"--nproc-per-node {options.nproc_per_node}: {error}") from None
    if num_ranks < 1:
        raise UsageError(f"--nproc-per-node must be 1 or more, not {num_ranks}")
    os.environ.setdefault("OMP_NUM_THREADS", str(max(cores() // num_ranks, 1)))
    for name in ("agent.server.api", "multiprocessing.api"):  # which tell of every signal that is handed on
        logging.getLogger(f"torch.distributed.elastic.{name}").setLevel(logging.ERROR)
    try:
        run(options)  # type: ignore[no-untyped-call]
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        sys.stderr.write(f"{error}\n")
        sys.exit(failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode)
    except SignalException as error:
        sys.exit(128 + error.sigval)


def _torchrun_options(arguments: list[str]) -> Namespace:
    """Parse arguments as torchrun does, with another number of ranks where none is given."""
    from torch.distributed.run import get_args_parser

    parser = get_args_parser()
    parser.prog = "zgraph launch"
    if "PET_NPROC_PER_NODE" not in os.environ:
        parser.set_defaults(nproc_per_node=str(_ranks_by_default()))
    return parser.parse_args(arguments)


def _ranks_by_default() -> int:
    import torch

    if torch.accelerator.is_available():
        return torch.accelerator.device_count()
    return min(cores(), MAX_PROCESSOR_RANKS)
