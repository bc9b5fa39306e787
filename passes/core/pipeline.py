"""A recipe: a pipeline of passes that is a line of text, `canonicalize,partition(stage=3),dce`, and back."""

from __future__ import annotations

import dataclasses
import gc
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Protocol

from zgraph.errors import ContractError, RecipeError, did_you_mean
from zgraph.ir import Graph
from zgraph.ir.cursor import Cursor
from zgraph.passes.core.base import Context, Pass
from zgraph.passes.core.budgeted import Budgeted, Ran, one_by_one

Option = bool | int | float | str

_UNITS = {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
_WORD = re.compile(r"[A-Za-z][\w-]*")
_LITERAL = re.compile(r"[^,()\s]+(?:\([^()]*\))?")


class Instrument(Protocol):
    """Watches a pipeline run: timing, dumps, verification and counts live here, never in a pass."""

    def after(self, step: Pass, before: Graph, after: Graph, seconds: float) -> None:
        """Called after each pass."""


@dataclass(frozen=True)
class Pipeline:
    """Passes to run in order."""

    passes: tuple[Pass, ...]

    @classmethod
    def parse(cls, text: str, known: Mapping[str, type[Pass]]) -> Pipeline:
        """Read a recipe.

        Raises:
            RecipeError: with a caret under what does not parse, and the nearest name for one that does not exist.
            ContractError: where a pass needs what none before it provides.
        """
        pipeline = cls(tuple(_Recipe(text, known).passes()))
        pipeline.check()
        return pipeline

    def __str__(self) -> str:
        return ",".join(map(print_pass, self.passes))

    def check(self) -> None:
        """Check the contracts of the passes against each other."""
        provided: set[str] = set()
        for step in self.passes:
            if missing := step.requires - provided:
                makers = sorted(p.name for p in self.passes if p.provides & missing)
                remedy = f"move {', '.join(makers)} before it" if makers else f"no pass of it provides {_list(missing)}"
                raise ContractError(f"{step.name} needs a graph that is {_list(missing)}: {remedy}")
            if clash := step.conflicts & provided:
                raise ContractError(f"{step.name} cannot follow a pass that makes a graph {_list(clash)}")
            provided |= step.provides

    def run(self, graph: Graph, context: Context, instruments: Sequence[Instrument] = ()) -> Graph:
        """Run the passes, telling the instruments of each.

        Raises:
            BudgetError: no way was found to fit the memory budget.
        """
        with uncollected():
            for ran in self.steps(graph, context):
                for instrument in instruments:
                    instrument.after(ran.step, ran.before, ran.after, ran.seconds)
                graph = ran.after
        return graph

    def steps(self, graph: Graph, context: Context) -> Iterator[Ran]:
        """Run the passes, giving what each has made; an error when what came before it is told."""
        context = replace(context, lowering=tuple(step for step in self.passes if "lowered" in step.provides))
        if context.memory_budget is None:
            return one_by_one(self.passes, graph, context)
        return Budgeted(self.passes, graph, context).run()


@contextmanager
def uncollected() -> Iterator[None]:
    """Leave the search for cycles to later: graphs have none, and it would take as long as the passes do."""
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def print_pass(step: Pass) -> str:
    """A pass as the recipe writes it: its name, and the options that are not at their default or always shown."""
    options = [
        f"{f.name}={_print_option(f.name, getattr(step, f.name))}"
        for f in dataclasses.fields(step)
        if getattr(step, f.name) != f.default or f.metadata.get("always_printed")
    ]
    return step.name + (f"({', '.join(options)})" if options else "")


def parse_size(text: str) -> int:
    """Bytes of a size such as `16MiB`, `512KiB` or `1024`. Raises ValueError for anything else."""
    if found := re.fullmatch(r"(\d{1,15}(?:\.\d{1,3})?) ?(KiB|MiB|GiB)", text):
        return int(float(found.group(1)) * _UNITS[found.group(2)])
    if not re.fullmatch(r"\d{1,18}", text):
        raise ValueError(f"{text[:40]} is no size such as 16MiB")
    return int(text)


def print_size(num_bytes: int) -> str:
    """The shortest exact form that `parse_size` reads."""
    for unit, factor in sorted(_UNITS.items(), key=lambda item: -item[1]):
        if num_bytes and num_bytes % factor == 0:
            return f"{num_bytes // factor}{unit}"
    return str(num_bytes)


def _print_option(name: str, value: Option) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return print_size(value) if name.endswith("_bytes") and isinstance(value, int) else str(value)


def _list(words: Iterable[str]) -> str:
    return ", ".join(sorted(words))


class _Recipe(Cursor):
    """A cursor over a recipe's text."""

    fault = RecipeError
    blanks = re.compile(r"\s*")

    def __init__(self, text: str, known: Mapping[str, type[Pass]]) -> None:
        super().__init__(text)
        self.known = known

    def passes(self) -> Iterable[Pass]:
        if self.done:
            return
        while True:
            yield self.one()
            if self.done:
                return
            if not self.accept(","):
                raise self.error("expected a comma between passes")

    def one(self) -> Pass:
        name = self.match(_WORD, "the name of a pass")
        start = self.at - len(name)
        if name not in self.known:
            hint = did_you_mean(name, self.known, f"the passes are {', '.join(self.known)}")
            raise self.error(f"there is no pass called {name}; {hint}", start)
        kind = self.known[name]
        options: dict[str, Option] = {}
        if self.accept("("):
            while not self.accept(")"):
                if options and not self.accept(","):
                    raise self.error("expected a comma or a closing parenthesis")
                key, value = self.option(kind, options)
                options[key] = value
        try:
            return kind(**options)
        except ValueError as error:
            raise self.error(str(error), start) from None

    def option(self, kind: type[Pass], given: Mapping[str, Option]) -> tuple[str, Option]:
        fields = {f.name: f for f in dataclasses.fields(kind)}
        key = self.match(_WORD, "the name of an option")
        start = self.at - len(key)
        if key in given:
            raise self.error(f"{key} is given twice", start)
        if key not in fields:
            hint = did_you_mean(key, fields, f"its options are {', '.join(fields)}" if fields else "it has none")
            raise self.error(f"{kind.name} has no option {key}; {hint}", start)
        if not self.accept("="):
            raise self.error(f"expected = and a value for {key}")
        text = self.match(_LITERAL, f"a value for {key}")
        start = self.at - len(text)
        try:
            return key, _parse_option(key, text, type(fields[key].default))
        except ValueError:
            wanted = "a size such as 16MiB" if key.endswith("_bytes") else type(fields[key].default).__name__
            raise self.error(f"{key} must be {wanted}", start) from None


def _parse_option(name: str, text: str, kind: type) -> Option:
    if kind is bool:
        if text not in ("true", "false"):
            raise ValueError(text)
        return text == "true"
    if name.endswith("_bytes"):
        return parse_size(text)
    value: Option = kind(text)
    return value
