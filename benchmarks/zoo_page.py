"""The page docs/models.md: what became of each architecture of a run of benchmarks/zoo.py, and why."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]

TRAINED = ("whole graph", "pieces")
OWN = "torch"
"""The task of models of torch's own layers, which are counted apart."""

CAUSES: tuple[tuple[str, str], ...] = (
    (r"rank \d+ waits for", 'each rank\'s data decides what runs, which wants `fullgraph="eager"`'),
    (r"Data-dependent branch|data-dependent branch", "an `if` on the value of a tensor"),
    (r"[Dd]ynamic shape|[Dd]ata-?[Dd]ependent|unbacked|item\(\)|tolist", "a size or an index by the value of a tensor"),
    (r"in place|in-place|clamp_", "the forward changes a parameter in place"),
    (r"RNN|LSTM|GRU", "an LSTM or GRU of `torch.nn`"),
    (r"logg|print|warn", "the forward logs or warns"),
    (r"_GeneratorContextManager", "a context manager that torch does not follow"),
    (r"python_type\(\) call|ContextVar", "torch does not follow `python_type()` of an attribute, or a `ContextVar`"),
)
"""Pattern in the message of an error, and the cause in words."""


def page(rows: Sequence[Row], environment: Mapping[str, Any], num_entries: int) -> str:
    """The text of the page, of rows of so many entries of the mappings."""
    return "\n".join(
        [
            *_head([r for r in rows if r["task"] != OWN], environment),
            *_own([r for r in rows if r["task"] == OWN]),
            *_refused(rows),
            *_two_ranks(rows),
            *_all(rows),
            *_not_built(rows, num_entries),
            "",
        ]
    )


def ran(rows: Iterable[Row], num_ranks: int = 1) -> list[Row]:
    """The rows of architectures that run eagerly, by name."""
    counted = [r for r in rows if r["num_ranks"] == num_ranks and r["verdict"] != "not built"]
    return sorted(counted, key=lambda r: str(r["name"]))


def cause(row: Row) -> str:
    """Why a row is no whole graph, in words; the error's own where no pattern is known."""
    message = str(row["message"])
    known = next((words for pattern, words in CAUSES if re.search(pattern, message)), None)
    return known or _code(message)


def _head(rows: Sequence[Row], environment: Mapping[str, Any]) -> Iterator[str]:
    one = ran(rows)
    kinds = Counter(str(r["verdict"]) for r in one)
    trained = [r for r in one if r["verdict"] in TRAINED]
    exact = sum(r["difference"] == 0 for r in trained)
    rounded = [r for r in trained if r.get("double_difference") is not None]
    apart = len(trained) - exact - len(rounded)
    close = max((float(r["difference"]) for r in trained if r not in rounded), default=0.0)
    yield "# Models"
    yield ""
    yield (
        f"Of {len(one)} architectures of transformers {environment['transformers']} that run eagerly, "
        f"{len(trained)} train at stage 3: {kinds['whole graph']} as one graph, {kinds['pieces']} with "
        "`fullgraph=False`, in pieces. Each was made as small as its configuration allows, with random weights and "
        "without dropout, and took two AdamW steps in fp32 both ways, eager and compiled. The losses and all gradients "
        f"of {exact} are bitwise equal; those of {apart} differ by at most {close:.0e} of "
        "the gradient's largest entry. Gradients that are nowhere above 1e-6 are rounding, and not compared."
    )
    if rounded:
        yield ""
        yield "These differ by more in fp32, and hardly where both compute in float64, so it is rounding:"
        yield ""
        yield "| architecture | fp32 | float64 | of |"
        yield "|---|---|---|---|"
        for r in rounded:
            yield f"| {r['name']} | {r['difference']:.0e} | {r['double_difference']:.0e} | {r['where']} |"
    yield ""
    yield (
        f"Measured with torch {environment['torch']} on {environment['machine']} processors by `python -m "
        "benchmarks.zoo --json benchmarks/results/zoo.json --markdown docs/models.md`, and the same with `--ranks 2`. "
        "Many of these share code: the shares are of names, not of independent designs. What takes sound as well as "
        "text was given text."
    )
    yield ""
    yield "| task | run eagerly | one graph | in pieces | not trained |"
    yield "|---|---|---|---|---|"
    for task in dict.fromkeys(str(r["task"]) for r in rows):
        of = Counter(str(r["verdict"]) for r in one if r["task"] == task)
        if total := of.total():
            whole, pieces = of["whole graph"], of["pieces"]
            yield f"| {task} | {total} | {whole} | {pieces} | {total - whole - pieces} |"


def _own(rows: Sequence[Row]) -> Iterator[str]:
    one, two = ran(rows), ran(rows, 2)
    if not one:
        return
    trained = [r for r in one if r["verdict"] in TRAINED]
    pieces = [str(r["name"]) for r in trained if r["verdict"] == "pieces"]
    largest = max((float(r["difference"]) for r in trained), default=0.0)
    yield ""
    yield (
        f"Of {len(one)} models of torch's own layers ({', '.join(str(r['name']) for r in one)}), {len(trained)} train"
        + (f", in pieces {', '.join(pieces)}" if pieces else "")
        + f"; the largest difference is {largest:.0e}."
        + (f" On two ranks, {sum(r['verdict'] in TRAINED for r in two)} of {len(two)} do." if two else "")
    )


def _refused(rows: Sequence[Row]) -> Iterator[str]:
    others = [r for r in ran(rows) if r["verdict"] not in TRAINED]
    yield from _titled("What does not train")
    if not others:
        yield "Every architecture that ran eagerly was trained."
    else:
        yield "| architecture | what happens | message |"
        yield "|---|---|---|"
    for r in others:
        what = f"wrong by {r['difference']:.1e}: {r['where']}" if r["verdict"] == "wrong" else r["verdict"]
        yield f"| {r['name']} | {what} | {_code(str(r['message']))} |"
    yield from _titled("What is captured in pieces")
    yield "| architecture | graphs | cause |"
    yield "|---|---|---|"
    for r in ran(rows):
        if r["verdict"] == "pieces":
            yield f"| {r['name']} | {r['graphs']} | {cause(r)} |"


def _two_ranks(rows: Sequence[Row]) -> Iterator[str]:
    two = [r for r in ran(rows, 2) if r["task"] != OWN]
    if not two:
        return
    good = [r for r in two if r["verdict"] in TRAINED]
    largest = max((float(r["difference"]) for r in good), default=0.0)
    yield from _titled("On two ranks")
    yield (
        f"{len(two)} of the architectures of transformers ran on two ranks, over gloo, each rank with its own batches, "
        f"beside DistributedDataParallel: {len(good)} agree, with a largest difference of {largest:.1g}. They are the "
        "quickest of each kind: of each task, of language models with experts or a state, of what is in pieces."
    )
    kinds = Counter(str(r["task"]) for r in two)
    yield ""
    yield "They are " + ", ".join(f"{number} of {task}" for task, number in kinds.most_common()) + "."
    bad = [f"{r['name']} ({r['verdict']}: {cause(r)})" for r in two if r not in good]
    if bad:
        yield ""
        yield "The others: " + "; ".join(bad) + "."


def _all(rows: Sequence[Row]) -> Iterator[str]:
    yield from _titled("All of them")
    yield (
        "Differences are the largest of a loss or a gradient. Seconds are of two compiled steps and the capture, on a "
        "machine that had other work."
    )
    for task in dict.fromkeys(str(r["task"]) for r in rows):
        of = [r for r in ran(rows) if r["task"] == task]
        if of:
            yield from _titled(task[0].upper() + task[1:], 3)
            yield "| architecture | class | | difference | s |"
            yield "|---|---|---|---|---|"
            for r in of:
                verdict = f"pieces ({r['graphs']} graphs)" if r["verdict"] == "pieces" else r["verdict"]
                gap = f"{r['difference']:.0e}" if r["difference"] else "0"
                yield f"| {r['name']} | {r['model']} | {verdict} | {gap} | {r['seconds']:.1f} |"


def _not_built(rows: Sequence[Row], num_entries: int) -> Iterator[str]:
    missing = [r for r in rows if r["num_ranks"] == 1 and r["verdict"] == "not built"]
    if missing:
        yield from _titled("Not tried")
        yield (
            f"Of {len(missing)} more the small configuration or the inputs that the benchmark makes do not run "
            "eagerly. That says nothing about zgraph."
        )
        yield ""
        yield "| architecture | why it does not run |"
        yield "|---|---|"
        yield from (
            f"| {r['name']} | {_code(str(r['message']))} |" for r in sorted(missing, key=lambda r: str(r["name"]))
        )
        left = num_entries - sum(r["num_ranks"] == 1 for r in rows)
        if left > 0:
            yield ""
            yield f"{left} other entries of these tasks' mappings were not come to."


def _titled(title: str, level: int = 2) -> list[str]:
    return ["", f"{'#' * level} {title}", ""]


def _code(message: str) -> str:
    """A message as code in a cell of a table."""
    return "`" + message.replace("|", "/").replace("`", "'")[:200] + "`"
