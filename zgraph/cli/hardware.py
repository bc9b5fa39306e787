"""The commands about hardware profiles: which there are, what one says, and a new one to edit."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from zgraph.cli.app import AsJson, Commands, app, console, print_json, writing
from zgraph.cli.completion import hardware_names
from zgraph.cost import Hardware, known
from zgraph.cost import hardware as profile_of
from zgraph.cost.hardware import FOLDER, THIS_MACHINE, as_toml, this_machine_path
from zgraph.errors import UsageError
from zgraph.viz import gibibytes

profiles = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    rich_markup_mode="markdown",
    help="Hardware profiles: which there are, what one says, and a new one to edit.",
)
app.add_typer(profiles, name="hardware")

_PLAIN = re.compile(r"[a-z0-9][a-z0-9.-]{0,99}")


@profiles.command(name="list")
def list_profiles(as_json: AsJson = False) -> None:
    """The profiles that `--hardware` and `zgraph.compile(model, hardware=...)` take by their names.

    Example: `zgraph hardware list`
    """
    names = [*known(), *[THIS_MACHINE] * this_machine_path().exists()]
    found = [profile_of(name) for name in names]
    if as_json:
        print_json([_row(profile) for profile in found])
        return
    table = Table(
        "name", "memory", "reads and writes", "bf16, peak", "bf16, best", "within a host", "between", "a host"
    )
    for column in table.columns[1:]:
        column.justify = "right"
    for profile in found:
        device = profile.device
        table.add_row(
            profile.name,
            gibibytes(device.memory_bytes),
            _rate(device.memory_bytes_per_s, "B/s"),
            _rate(device.peak_flops.get("bf16"), "FLOP/s"),
            _rate(device.matmul_flops.get("bf16"), "FLOP/s"),
            _rate(profile.within.bytes_per_s, "B/s"),
            _rate(profile.between.bytes_per_s, "B/s"),
            f"{profile.devices_per_host} of them",
        )
    console().print(table)


@profiles.command(name="show")
def show_profile(
    name: Annotated[
        str, typer.Argument(help="A name, alone or as in 2x8-h100, or a .toml file.", autocompletion=hardware_names)
    ],
    as_json: AsJson = False,
) -> None:
    """Show a profile, and where its figures are from.

    Example: `zgraph hardware show h100`
    """
    found = profile_of(name)
    if as_json:
        print_json(_row(found))
    else:
        console().print(as_toml(found), markup=False, highlight=False, end="")


@profiles.command(name="new")
def new_profile(
    name: Annotated[str, typer.Argument(help="What to call it.")],
    like: Annotated[
        str, typer.Option("--from", help="The profile to begin with.", autocompletion=hardware_names)
    ] = "h100",
    output: Annotated[
        str, typer.Option("--output", "-o", help="The file to write, by default NAME.toml; - for standard output.")
    ] = "",
) -> None:
    """Write a profile to edit: a copy of another, under a new name.

    Example: `zgraph hardware new mine --from h100 -o mine.toml`
    """
    if not _PLAIN.fullmatch(name) or name in (*known(), THIS_MACHINE):
        why = (
            "is a profile's already" if name in known() else "does not do: take small letters, digits, dots and hyphens"
        )
        raise UsageError(f"the name {name} {why}")
    text = _copy(name, like)
    if output == "-":
        sys.stdout.write(text)
        return
    path = Path(output or f"{name}.toml")
    if path.exists():
        raise UsageError(f"there is a file {path} already; give another one with -o, or remove it")
    with writing(str(path)):
        path.write_text(text)
    console().print(
        f'{path}: edit it, then take it as --hardware {path}, or zgraph.compile(model, hardware="{path}")',
        markup=False,
        highlight=False,
    )


def _copy(name: str, like: str) -> str:
    """The text of a profile, comments included where it is built in, under another name."""
    found = profile_of(like)
    given = FOLDER / f"{like}.toml"
    text = given.read_text() if like in known() else as_toml(found)
    source = f"copied from {like}; say here where your figures are from"
    fields, table, rest = text.partition("\n[")
    kept = [line for line in fields.splitlines() if not re.match(r"name = |source = |# \S", line)]
    kept += [line for line in (table.strip() + rest).splitlines() if not re.match(r"# \S", line)]
    return (
        "\n".join(
            [
                f"# Edit what is not so; latencies in microseconds, rates a second. From the profile {like}",
                f'name = "{name}"',
                f'source = "{source}"',
                *kept,
            ]
        )
        + "\n"
    )


def _row(profile: Hardware) -> dict[str, object]:
    return profile.model_dump(mode="json")


def _rate(rate: float | None, unit: str) -> str:
    """A rate for people: in thousands of millions, or in millions of millions."""
    if rate is None:
        return ""
    count, prefix = (rate / 1e12, "T") if rate >= 1e12 else (rate / 1e9, "G")
    return f"{count:,.0f} {prefix}{unit}" if count >= 100 else f"{count:.3g} {prefix}{unit}"
