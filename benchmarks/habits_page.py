"""The page docs/habits.md: what became of each habit of a run of benchmarks/habits.py."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]

MEANINGS = {
    "equal": "losses and parameters are eager PyTorch's",
    "in pieces": "equal, with `fullgraph=False`",
    "gathered": 'equal, with `fullgraph="eager"`',
    "refused": "an error of zgraph's names the remedy",
    "torch refuses": "an error of torch's, which does not do this with DTensors",
    "wrong": "another result, without an error",
    "failed": "an error that is none of these",
    "hangs": "no end within 90 seconds",
}
"""Meaning of each verdict, the best first."""


def page(rows: Sequence[Row], environment: Mapping[str, Any]) -> str:
    """The text of the page."""
    counted = [r for r in rows if r["verdict"] != "not run"]
    return "\n".join([*_head(counted, environment), *_groups(counted), *_sentences(counted), *_not_run(rows), ""])


def _head(rows: Sequence[Row], environment: Mapping[str, Any]) -> Iterator[str]:
    names = {r["name"] for r in rows}
    yield "# Habits"
    yield ""
    yield (
        f"{len(names)} habits of training code, each a small function of `benchmarks/habit` that runs on eager "
        "PyTorch, with gradients averaged over the ranks, and at stage 3 on one rank and on two, over gloo. Losses, "
        "parameters and whatever else a habit looks at are compared: equal is a relative difference of at most 1e-5, "
        "and of 2e-2 to 5e-2 where bf16 computes."
    )
    yield ""
    yield (
        f"Measured with torch {environment['torch']} on {environment['machine']} processors by `python -m "
        "benchmarks.habits`, which also made this page."
    )
    yield ""
    ranks = sorted({int(r["num_ranks"]) for r in rows})
    yield f"| verdict | {' | '.join(_ranks(n) for n in ranks)} | |"
    yield f"|---|{'---|' * len(ranks)}---|"
    found = {n: Counter(str(r["verdict"]) for r in rows if r["num_ranks"] == n) for n in ranks}
    for verdict, meaning in MEANINGS.items():
        if any(found[n][verdict] for n in ranks):
            yield f"| {verdict} | {' | '.join(str(found[n][verdict]) for n in ranks)} | {meaning} |"


def _groups(rows: Sequence[Row]) -> Iterator[str]:
    for group in dict.fromkeys(str(r["group"]) for r in rows):
        yield from (
            "",
            f"## {group[0].upper()}{group[1:]}",
            "",
            "| habit | one rank | two ranks or more |",
            "|---|---|---|",
        )
        of = [r for r in rows if r["group"] == group]
        for name in dict.fromkeys(str(r["name"]) for r in of):
            one = next((str(r["verdict"]) for r in of if r["name"] == name and r["num_ranks"] == 1), "")
            more = next((str(r["verdict"]) for r in of if r["name"] == name and r["num_ranks"] > 1), "")
            words = next(str(r["words"]) for r in of if r["name"] == name)
            yield f"| {_cell(words)} | {one} | {more} |"


def _sentences(rows: Sequence[Row]) -> Iterator[str]:
    """The errors, one for each habit that ends with one."""
    last = {str(r["name"]): r for r in rows if r["message"] and r["verdict"] not in ("equal", "in pieces", "gathered")}
    yield from ("", "## What is refused", "", "| habit | ranks | error |", "|---|---|---|")
    for row in last.values():
        yield f"| {_cell(str(row['words']))} | {row['num_ranks']} | {_cell(_plain(str(row['message'])))} |"


def _not_run(rows: Sequence[Row]) -> Iterator[str]:
    missing = [r for r in rows if r["verdict"] == "not run"]
    if missing:
        yield from ("", "## Not run", "", "Eager PyTorch does not run these either, or a package is not installed.", "")
        yield from (f"- {r['words']}, {_ranks(int(r['num_ranks']))}: {_plain(str(r['message']))}" for r in missing)


def _ranks(count: int) -> str:
    return {1: "one rank", 2: "two ranks"}.get(count, f"{count} ranks")


def _plain(message: str) -> str:
    """A message whose marks are not taken for Markdown."""
    return message.replace("`", "'").replace("<", "&lt;").replace("*", r"\*").replace("_", r"\_")


def _cell(text: str) -> str:
    return text.replace("|", r"\|")
