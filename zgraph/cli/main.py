"""Runs the `zgraph` command."""

from __future__ import annotations

import os
import sys
from typing import NoReturn

from zgraph.cli import (  # noqa: F401 - add commands
    calibrating,
    checking,
    commands,
    debugging,
    explaining,
    exports,
    hardware,
    launching,
    machine,
    pictures,
    planning,
    quantising,
    serving,
    simulating,
    watching,
)
from zgraph.cli.app import DOES_NOT_FIT, FAILED, USED_WRONGLY, app
from zgraph.cli.terminal import printable
from zgraph.errors import BudgetError, HardwareError, RecipeError, UsageError, ZgraphError


def main() -> NoReturn:
    """Run the command; a ZgraphError is one line on standard error."""
    try:
        app(prog_name="zgraph")
    except ZgraphError as error:
        sys.stderr.write(f"zgraph: {printable(str(error))}\n")
        wrongly = isinstance(error, UsageError | RecipeError | HardwareError)
        sys.exit(DOES_NOT_FIT if isinstance(error, BudgetError) else USED_WRONGLY if wrongly else FAILED)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # whoever read has read enough
    sys.exit(0)
