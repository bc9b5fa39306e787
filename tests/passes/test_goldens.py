"""Every file in goldens/ is a graph, a pass (or a recipe) to run on it, and the graph that must come out.

    # What the case shows.
    #: pass all-gather
    #: ranks 2
    graph ...
    #: gives
    graph ...

`UPDATE_GOLDENS=1 pytest tests/passes/test_goldens.py` writes anew what comes out.
"""

import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest

from benchmarks.prefetch import Prefetch
from zgraph.ir import Axis, DType, Graph, parse_graph, print_graph, verify
from zgraph.passes import BY_NAME, RECIPES, Context, Pass, Pipeline

FOLDER = Path(__file__).parent / "goldens"
GOLDENS = sorted(FOLDER.glob("*.zir"))
PASSES = {**BY_NAME, Prefetch.name: Prefetch}


@dataclass
class Golden:
    """One file: its comment and directives as they stand, and the two graphs."""

    head: str
    before: str
    after: str

    @classmethod
    def read(cls, path: Path) -> "Golden":
        before, _, after = path.read_text().partition("#: gives\n")
        at = before.index("graph ")
        return cls(before[:at], before[at:], after)

    @property
    def options(self) -> dict[str, str]:
        lines = [line.removeprefix("#: ") for line in self.head.splitlines() if line.startswith("#: ")]
        return {line.partition(" ")[0]: line.partition(" ")[2] for line in lines}

    @property
    def pipeline(self) -> Pipeline:
        return Pipeline.parse(self.options["pass"], {name: alone(kind) for name, kind in PASSES.items()})

    @property
    def context(self) -> Context:
        reduce_dtype = self.options.get("reduce_dtype")
        beside = tuple(Axis(a, int(self.options[a])) for a in ("tensor", "context") if a in self.options)
        return Context(
            (*beside, Axis("shard", int(self.options["ranks"]))),
            DType(reduce_dtype) if reduce_dtype else None,
            memory_budget=int(self.options["budget"]) if "budget" in self.options else None,
            offloads="auto" if "offloads" in self.options else "never",
        )

    def run(self) -> Graph:
        graph = parse_graph(self.before)
        verify(graph)
        return self.pipeline.run(graph, self.context)


def alone(kind: type[Pass]) -> type[Pass]:
    """The pass without what it requires: a golden's input is what earlier passes would have given."""
    return type(kind.__name__, (kind,), {"requires": frozenset()})


@pytest.mark.parametrize("path", GOLDENS, ids=lambda path: path.stem)
def test_golden(path):
    golden = Golden.read(path)
    after = golden.run()
    verify(after)
    if os.environ.get("UPDATE_GOLDENS"):
        path.write_text(f"{golden.head}{golden.before}#: gives\n{print_graph(after)}")
    assert print_graph(after) == Golden.read(path).after
    assert parse_graph(Golden.read(path).after) == after


def test_every_pass_has_two_goldens():
    counts = Counter(p.name for path in GOLDENS for p in Golden.read(path).pipeline.passes)
    assert {name: counts[name] for name in PASSES if counts[name] < 2} == {}
    assert all(path.read_text().startswith("# ") for path in GOLDENS)


@pytest.mark.parametrize("stage", RECIPES)
def test_the_recipe_of_each_stage_has_a_golden(stage):
    assert Golden.read(FOLDER / f"recipe-stage{stage}.zir").options["pass"] == RECIPES[stage]
