"""Would the tests notice? Faults put into the source of the passes one by one, and the fast tests run on each.

A mutant changes one place: a comparison, an operator, `and` and `or`, a `not`, a number, a truth value, `min` and
`max`, `all` and `any`, `sorted`; or a call is dropped, or an `if` is never taken. Each runs in a process of its own,
which gets the changed module in place of the file's; no file is changed. What is captured of models is captured once.
Annotations and decorators are left as they are, and `strict=True`, which only fails where something else is wrong.
A mutant that no test can tell is a row of `EQUIVALENT`, with the reason; it is counted apart.
"""

from __future__ import annotations

import ast
import copy
import importlib.abc
import importlib.machinery
import importlib.util
import json
import os
import pickle
import random
import resource
import signal
import sys
import tempfile
import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

import typer

from benchmarks.results import environment

ROOT = Path(__file__).parents[1]
PASSES = ROOT / "passes"
FAST = (
    "tests/passes/test_goldens.py",
    "tests/passes/test_refusals.py",
    "tests/passes/test_workings.py",
    "tests/passes/test_programs.py",
    "tests/passes/test_decisions.py",
    "tests/passes/test_pipeline.py",
    "tests/passes/test_readme.py",
    "tests/passes/test_random_graphs.py",
    "tests/passes/test_planning.py",
    "tests/interp/test_random_graphs.py",
    "tests/trust/test_valid_recipes.py::test_random_recipes_on_random_graphs",
    "tests/interp/test_captured.py",
)
FIRST = FAST[:3]
"""Those that find most in the least time run before a module's own."""
ALSO = {
    "zero_tangents": ("passes/test_absent.py",),
    "arena": ("passes/test_arena.py",),
    "bucket": ("passes/test_bucket.py",),
    "fit": ("passes/test_fit.py",),
    "exchange": ("interp/test_placed.py",),
    "float8": ("single/test_float8.py", "interp/test_float8.py"),
    "fixed": ("passes/test_fixed.py",),
    "fuse": ("passes/test_fusion.py", "passes/test_losses.py"),
    "groups": ("passes/test_fusion.py",),
    "candidates": ("passes/test_fusion.py",),
    "forward": ("passes/test_forward.py", "passes/test_fit.py"),
    "instruments": ("passes/test_instruments.py",),
    "loss": ("passes/test_losses.py",),
    "no_sync": ("interp/test_no_sync.py",),
    "blocks": ("passes/test_blocks.py",),
    "order": ("passes/test_order.py",),
    "sequences": ("interp/test_contexts.py", "interp/test_placed_tokens.py"),
    "float8_gathers": ("interp/test_float8.py",),
    "expert_rows": ("interp/test_experts.py",),
    "code_gathers": ("interp/test_exact_codes.py",),
    "coded_gathers": ("interp/test_exact_codes.py", "interp/test_coded_parameters.py"),
    "schedule": ("passes/test_headroom.py",),
    "partition": ("interp/test_placed.py::test_a_model_axis_without_place_is_refused",),
    "patterns": ("kernels/test_patterns.py",),
    "place": ("interp/test_placed.py",),
    "placing": ("passes/test_placing.py", "interp/test_placed.py"),
    "rows": ("passes/test_rows.py", "passes/test_fusion.py", "kernels/test_patterns.py"),
    "registry": ("passes/test_registry.py",),
    "rotary": ("passes/test_subgraphs.py",),
    "subgraphs": ("passes/test_subgraphs.py",),
    "timetable": ("passes/test_timetable.py",),
    "budgeted": ("passes/test_within.py",),
    "compress": ("interp/test_codes.py", "interp/test_codes_outside.py", "interp/test_coded_parameters.py"),
    **dict.fromkeys(("prices", "program", "search", "space", "twins"), ("passes/test_placements.py",)),
}
"""Tests of one module's own, which run with more examples of hypothesis."""

OWN_EXAMPLES = 10
"""How many times as many."""

MODELS = ("tied", "convnet", "bf16", "mixed stages", "llama", "dynamic")

COMPARED: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
}
COMPUTED: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.FloorDiv,
    ast.FloorDiv: ast.Mult,
    ast.Div: ast.Mult,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
}
CALLED = {"min": "max", "max": "min", "all": "any", "any": "all", "sorted": "list"}


@dataclass(frozen=True)
class Equivalent:
    """A change that computes the same, or as good a result, and why it does.

    Args:
        path: the file.
        before, after: the code.
        reason: as above.
        line: what the line has where there are several such changes.
    """

    path: str
    before: str
    after: str
    reason: str
    line: str = ""


_BLOCKS = "passes/analysis/blocks.py"
_CONVEX = "of two corners, the one with fewer bytes takes longer, but for what rounding makes of equal ones"
_ROUNDING = "what is compared is equal but for rounding then, and either choice is as good"
_TUNED = "how long a search may take is no promise"
_GUESSED = "which guesses are tried is no promise, and of those that fit the first is taken"
_TWICE = "a value that is looked at twice is found to be the same: slower"

EQUIVALENT = (
    Equivalent(
        "passes/schedule.py", "0", "1", "the bound is of all memory being free", "headroom = (0,) * len(step.ops)"
    ),
    Equivalent(
        "passes/fit.py",
        "over.kept_bytes - fits.kept_bytes > 1",
        "over.kept_bytes - fits.kept_bytes >= 1",
        "an allocation is 64 bytes: two choices do not differ by one",
    ),
    Equivalent(
        "passes/fit.py",
        "if found.kept_bytes == over.kept_bytes:",
        "if False:",
        "the same choice is tried again, so often as is allowed: slower",
    ),
    Equivalent(
        "passes/placements/program.py",
        "output.kind is OutputKind.grad and output.target in space.graph.param_names",
        "output.kind is OutputKind.grad or output.target in space.graph.param_names",
        "only gradients have the name of a parameter",
    ),
    Equivalent("passes/recompute.py", "0", "1", "a byte that is left has room for no value", "exactly=self.keep_bytes"),
    Equivalent("passes/bucket.py", "0", "1", "no parameter has less than a byte", "        return 0"),
    Equivalent("passes/analysis/rows.py", "0", "1", "no op of a pattern has a dim and no tensor", "rank = next((len("),
    Equivalent(_BLOCKS, "1000", "1001", _TUNED),
    Equivalent(_BLOCKS, "seen.add(other)", "pass", _TWICE),
    Equivalent(_BLOCKS, "reached.add(other)", "pass", _TWICE),
    Equivalent(
        _BLOCKS,
        "high.num_bytes <= low.num_bytes or low.us <= high.us",
        "high.num_bytes <= low.num_bytes and low.us <= high.us",
        _CONVEX,
    ),
    Equivalent(_BLOCKS, "high.num_bytes <= low.num_bytes", "high.num_bytes < low.num_bytes", _CONVEX),
    Equivalent(_BLOCKS, "low.us <= high.us", "low.us < high.us", "nothing is found at a price of 0"),
    Equivalent(
        _BLOCKS,
        "found.us + price * found.num_bytes >= line * (1 - 1e-09) - 1e-09",
        "found.us + price * found.num_bytes > line * (1 - 1e-09) - 1e-09",
        _ROUNDING,
    ),
    Equivalent(_BLOCKS, "line * (1 - 1e-09) - 1e-09", "line * (1 - 1e-09) + 1e-09", _ROUNDING),
    Equivalent(
        _BLOCKS,
        "_bound(high, low, headroom) >= self.best_us - 1e-09",
        "_bound(high, low, headroom) > self.best_us - 1e-09",
        _ROUNDING,
    ),
    Equivalent(_BLOCKS, "self.best_us - 1e-09", "self.best_us + 1e-09", _ROUNDING),
    Equivalent("passes/analysis/timetable.py", "400000", "400001", _TUNED),
    Equivalent(
        "passes/core/budgeted.py",
        "step.name in _UNLIMITED",
        "step.name not in _UNLIMITED",
        "passes that no budget concerns run again with each trial: slower",
    ),
    Equivalent("passes/fit.py", "unused // 2", "unused * 2", _GUESSED),
    Equivalent(
        "passes/analysis/lowering.py",
        "if not any((node.op == 'reshard' and wanted(node) for node in graph.nodes)):",
        "if False:",
        "a graph without such a reshard is copied, node by node",
    ),
    Equivalent(
        "passes/analysis/timetable.py",
        "candidate.makespan_us < best.makespan_us - 1e-09",
        "candidate.makespan_us <= best.makespan_us - 1e-09",
        _ROUNDING,
    ),
    Equivalent("passes/analysis/timetable.py", "200", "201", _TUNED),
    Equivalent("passes/plan/make_plan.py", "if only_step:", "if False:", "programs that nobody reads are made: slower"),
    Equivalent(
        "passes/analysis/subgraphs.py",
        "max((len(k.shape) for k in kinds))",
        "min((len(k.shape) for k in kinds))",
        "the ops that have this word read and make tensors of one rank",
    ),
    Equivalent(
        "passes/core/budgeted.py",
        "self.context.rest_bytes - 1",
        "self.context.rest_bytes + 1",
        "an allocation is 64 bytes: no step has only one",
    ),
    Equivalent(
        "passes/fit.py",
        "if any((not t.is_again or t.us <= fitter.least_us(move_bytes) for t in fitting)):",
        "if False:",
        "what is tried beside moves more and is slower, so that it is not taken",
    ),
    Equivalent("passes/fit.py", "self.target - fits.peak_bytes", "self.target + fits.peak_bytes", _GUESSED),
    Equivalent(
        "passes/dce.py",
        "max((last[root] for root in memory.roots(name)))",
        "min((last[root] for root in memory.roots(name)))",
        "what is released lies in one memory, and no other is asked for",
    ),
    Equivalent(
        "passes/analysis/timetable.py",
        "best.makespan_us > bound * (1 + 1e-09)",
        "best.makespan_us >= bound * (1 + 1e-09)",
        _ROUNDING,
    ),
    Equivalent(
        "passes/offload.py", "if not values:", "if False:", "a graph of which nothing moves is copied, node by node"
    ),
    Equivalent(
        "passes/core/budgeted.py",
        "1",
        "2",
        "an allocation is 64 bytes: no step has only two",
        "self.context.rest_bytes - 1",
    ),
    Equivalent(
        "passes/schedule.py",
        "as_it_came.peak.total_bytes < curve.peak.total_bytes",
        "as_it_came.peak.total_bytes <= curve.peak.total_bytes",
        "both are over the limit by as much",
    ),
    Equivalent("passes/fit.py", "2", "3", _GUESSED, "limit // (2 * PRECISION)"),
    Equivalent("passes/fit.py", "2", "3", _GUESSED, "factor = 1 if num_trials < 2"),
    Equivalent(
        "passes/fit.py",
        "num_trials < MAX_TRIALS",
        "num_trials <= MAX_TRIALS",
        _TUNED,
        "fits is None and over.kept_bytes",
    ),
    Equivalent(
        "passes/fit.py",
        "0",
        "1",
        "an allocation is 64 bytes: no value that could be kept has only one",
        "self.trial(0 if context.recomputes",
    ),
    Equivalent(
        "passes/analysis/timetable.py",
        "1 + 1e-09",
        "1 - 1e-09",
        "orders are tried although none can be better: slower",
        "best.makespan_us > bound",
    ),
    Equivalent(
        "passes/schedule.py", "1", "2", "one more entry, which nobody reads", "held = [0] * (problem.num_ops + 1)"
    ),
    Equivalent(
        "passes/analysis/lookahead.py",
        "if all((node.op != 'reshard' for node in graph.nodes)):",
        "if False:",
        "a graph without a reshard comes back from each lowering as it is",
    ),
    Equivalent(
        _BLOCKS,
        "max((high.kept ^ low.kept) - kept, key=lambda v: block.num_bytes[v])",
        "min((high.kept ^ low.kept) - kept, key=lambda v: block.num_bytes[v])",
        _TUNED,
    ),
    Equivalent(
        "passes/core/budgeted.py",
        "0 < found < limit",
        "0 <= found < limit",
        "what is needed within a limit of 0 is among what the least is taken from",
    ),
    Equivalent(
        "passes/fusion/rotary.py",
        "all((a in (1, d) for a, d in zip(angle[:-1], turned[:-1], strict=True)))",
        "any((a in (1, d) for a, d in zip(angle[:-1], turned[:-1], strict=True)))",
        "angles with more rows make a result of another shape, which is told by its type",
    ),
    Equivalent(
        "passes/schedule.py",
        "max((last + 1 for root, (_, last) in self._uses.items() if root in roots), default=0)",
        "min((last + 1 for root, (_, last) in self._uses.items() if root in roots), default=0)",
        "what is moved to the host lies in one memory",
    ),
    Equivalent("passes/fit.py", "64", "65", _GUESSED),
    Equivalent("passes/fit.py", "0", "1", "no value of one byte is worth moving", "self.trial(most.keep_bytes, 0)"),
    Equivalent(
        "passes/recompute.py",
        "self.keep_bytes > 0",
        "self.keep_bytes >= 0",
        "where no bytes are given there is no number of them to keep exactly",
    ),
    Equivalent(
        "passes/plan/make_plan.py",
        "True",
        "False",
        "the programs of other steps take longer to make, and are not looked at",
        "make_plan(graph, only_step=True)",
    ),
    Equivalent("passes/analysis/forward.py", "2", "3", "above all prices either way", "2 * slopes[-1] + 1.0"),
    Equivalent(
        "passes/analysis/timetable.py",
        "best.makespan_us - 1e-09",
        "best.makespan_us + 1e-09",
        _ROUNDING,
    ),
    Equivalent("passes/fit.py", "4", "5", _GUESSED, "(unused, unused // 2, unused // 4, 0)"),
    Equivalent(
        "passes/release.py",
        "max((p for r in sends.results for p in graph.users.get(r.name, ())), default=-1)",
        "min((p for r in sends.results for p in graph.users.get(r.name, ())), default=-1)",
        "a start is waited for once",
    ),
    Equivalent(
        "passes/release.py", "1", "2", "a start is waited for once", "graph.users.get(r.name, ())), default=-1)"
    ),
    Equivalent("passes/fit.py", "0", "1", _GUESSED, "(unused, unused // 2, unused // 4, 0)"),
    Equivalent("passes/fuse.py", "0", "1", "a node of the graph has its moments", "max(alive, default=0)"),
    Equivalent(
        "passes/analysis/timetable.py",
        "0",
        "1",
        "a tree for two ops serves one as well",
        "max(len(headroom) - 1, 0).bit_length()",
    ),
    Equivalent(
        "passes/core/budgeted.py",
        "best.num_bytes > rest + self.context.update_bytes",
        "best.num_bytes >= rest + self.context.update_bytes",
        "what takes no more than the optimizer's step is not found to take less",
    ),
    Equivalent(
        "passes/dce.py",
        "if len(swept.nodes) == len(used.nodes):",
        "if False:",
        "where nothing is dropped, what is released is behind the same nodes",
    ),
    Equivalent(
        "passes/schedule.py",
        "last + 0.05 * is_release",
        "last - 0.05 * is_release",
        "a release runs after the op before it either way, and before what starts behind that",
    ),
    Equivalent(
        "passes/core/budgeted.py",
        "1",
        "2",
        "an allocation is 64 bytes: two bytes less are as many whole allocations as one byte less",
        "self.below(rounded_down(",
    ),
    Equivalent("passes/placements/twins.py", "0", "1", "only differences of these sums are looked at", "np.cumsum([0"),
)
"""Each row must be one place of the source, which the tests check."""


@dataclass(frozen=True)
class Mutant:
    """One change, and what became of it.

    Args:
        outcome: killed, timeout, survived or equivalent.
        test: the first that failed, or the reason why none can.
    """

    path: str
    line: int
    before: str
    after: str
    outcome: str = ""
    test: str = ""
    seconds: float = 0.0

    def __str__(self) -> str:
        return f"{self.outcome:8} {self.path}:{self.line}  {self.before}  ->  {self.after}  {self.test}"


# --- the changes -------------------------------------------------------------------------------------------------


def mutated(node: ast.AST) -> Iterator[ast.AST]:
    """Nodes that may stand in the place of a node."""
    new: Any = copy.deepcopy(node)
    match new:
        case ast.Compare(ops=[op, *_]) if type(op) in COMPARED:
            new.ops[0] = COMPARED[type(op)]()
            yield new
        case ast.BinOp(op=op) if type(op) in COMPUTED:
            new.op = COMPUTED[type(op)]()
            yield new
        case ast.BoolOp(op=op):
            new.op = ast.And() if isinstance(op, ast.Or) else ast.Or()
            yield new
        case ast.UnaryOp(op=ast.Not()):
            yield new.operand
        case ast.Constant(value=bool()):
            new.value = not new.value
            yield new
        case ast.Constant(value=int()):
            new.value += 1
            yield new
        case ast.Call(func=ast.Name(id=name)) if name in CALLED:
            if name == "sorted" and new.keywords:
                new.keywords = []  # the order that they had
            new.func.id = CALLED[name]
            yield new
        case ast.If():
            new.test = ast.Constant(value=False)
            yield new
        case ast.Expr(value=ast.Call()):
            yield ast.Pass()


class _Replace(ast.NodeTransformer):
    def __init__(self, number: int, new: ast.AST) -> None:
        self.number, self.new, self.count = number, new, -1

    def visit(self, node: ast.AST) -> ast.AST:
        self.count += 1
        if self.count == self.number:
            self.count += sum(1 for _ in ast.walk(node)) - 1
            return ast.copy_location(self.new, node)
        return super().generic_visit(node)


NOTES = ("annotation", "returns", "decorator_list")
"""Fields of nodes that say something of what runs, rather than do it."""


def in_order(node: ast.AST) -> Iterator[tuple[ast.AST, bool]]:
    """All nodes as a transformer visits them, and whether a node is a part of what is left as it is."""
    yield node, False
    for name, field in ast.iter_fields(node):
        for child in field if isinstance(field, list) else [field]:
            if isinstance(child, ast.AST):
                is_strict = isinstance(child, ast.keyword) and child.arg == "strict"
                for inner, is_note in in_order(child):
                    yield inner, is_note or is_strict or name in NOTES


def sites(path: Path) -> list[tuple[Mutant, int, ast.AST]]:
    """Every change of a file: what it is, the number of the node that is replaced, and by what."""
    found = []
    for number, (node, is_note) in enumerate(in_order(ast.parse(path.read_text()))):
        if is_note:
            continue
        for new in mutated(node):
            shown = (node, new)
            if isinstance(node, ast.If) and isinstance(new, ast.If):
                texts = [f"if {ast.unparse(node.test)}:", "if False:"]
            else:
                texts = [ast.unparse(n) for n in shown]
            line = getattr(node, "lineno", 0)
            found.append((Mutant(str(path.relative_to(ROOT)), line, *texts), number, new))
    return found


def reasons() -> dict[Mutant, str]:
    """The changes of `EQUIVALENT`, and why each is there.

    Raises:
        ValueError: a row is no place of the source, or several.
    """
    found, places = {}, {path: sites(ROOT / path) for path in {row.path for row in EQUIVALENT}}
    for row in EQUIVALENT:
        lines = (ROOT / row.path).read_text().splitlines()
        here = [
            mutant
            for mutant, _, _ in places[row.path]
            if (mutant.before, mutant.after) == (row.before, row.after) and row.line in lines[mutant.line - 1]
        ]
        if len(here) != 1:
            raise ValueError(f"{len(here)} places are as this row of EQUIVALENT says: {row}")
        found[here[0]] = row.reason
    return found


def chosen(count: int, seed: int, only: Sequence[str], at: Sequence[str]) -> list[tuple[Mutant, int, ast.AST]]:
    """Random changes, of each file as many as it has places to change; or all at some lines."""
    files = sorted(p for p in PASSES.rglob("*.py") if not only or p.stem in only)
    every = [site for path in files for site in sites(path)]
    if at:
        return [site for site in every if f"{Path(site[0].path).stem}:{site[0].line}" in at]
    return random.Random(seed).sample(every, min(count, len(every)))


# --- a process with a mutant --------------------------------------------------------------------------------------


class _Loader(importlib.machinery.SourceFileLoader):
    """Loads a file with one node replaced."""

    def __init__(self, name: str, path: str, number: int, new: ast.AST) -> None:
        super().__init__(name, path)
        self.number, self.new = number, new

    def get_code(self, fullname: str) -> CodeType:
        tree = _Replace(self.number, self.new).visit(ast.parse(Path(self.path).read_text()))
        return compile(ast.fix_missing_locations(tree), self.path, "exec")


class _Finder(importlib.abc.MetaPathFinder):
    """Finds the mutant where its module is asked for."""

    def __init__(self, mutant: Mutant, number: int, new: ast.AST) -> None:
        self.name = "zgraph." + mutant.path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        self.number, self.new = number, new

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != self.name:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path)
        assert spec is not None
        assert spec.origin is not None
        loader = _Loader(fullname, spec.origin, self.number, self.new)
        return importlib.util.spec_from_file_location(
            fullname, spec.origin, loader=loader, submodule_search_locations=spec.submodule_search_locations
        )


class _Plugin:
    """Caps the examples of hypothesis, and keeps the first failure."""

    def __init__(self, num_examples: int, own: Collection[str]) -> None:
        self.num_examples, self.own, self.failed = num_examples, own, ""

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        from hypothesis import Phase, settings

        for item in items:
            function = item.function
            most = self.num_examples * (OWN_EXAMPLES if item.nodeid.partition("::")[0] in self.own else 1)
            if given := getattr(function, "_hypothesis_internal_use_settings", None):
                function._hypothesis_internal_use_settings = settings(
                    given,
                    max_examples=min(given.max_examples, most),
                    derandomize=True,
                    database=None,
                    deadline=None,
                    phases=(Phase.explicit, Phase.generate),
                    suppress_health_check=(),
                )

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed and not self.failed:
            self.failed = report.nodeid

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed and not self.failed:
            self.failed = f"{report.nodeid} (collection)"


def run_tests(tests: Sequence[str], own: Collection[str], num_examples: int, captures: Path) -> str:
    """In this process: the first test that fails, or nothing."""
    import pytest

    plugin = _Plugin(num_examples, own)
    try:
        from tests.interp import models

        models._CAPTURES.update(pickle.loads(captures.read_bytes()))
        models.captured = models._CAPTURES.__getitem__  # type: ignore[assignment]
        code = 0
        for some in ([t for t in tests if t in FIRST], [t for t in tests if t not in FIRST]):
            if some and not code:  # the others are not even collected where the first ones find it
                code = pytest.main(["-x", "-q", "-p", "no:cacheprovider", "--no-header", *some], plugins=[plugin])
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return plugin.failed or ("" if code == 0 else f"pytest ended with {int(code)}")


def in_child(work: Any, timeout: float) -> tuple[str, bool]:
    """The result of `work` in a process of its own, and whether it had to be ended.

    Args:
        timeout: seconds of a core, so that other work on the machine ends nothing; of the clock, ten times as many.
    """
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "answer"
        pid = os.fork()
        if not pid:
            os.setpgrp()
            resource.setrlimit(resource.RLIMIT_CPU, (int(timeout), int(timeout) + 1))
            silent = os.open(os.devnull, os.O_WRONLY)
            for stream in (1, 2):
                os.dup2(silent, stream)
            try:
                answer.write_text(work())
            finally:
                os._exit(0)
        end = time.monotonic() + 10 * timeout
        while (ended := os.waitpid(pid, os.WNOHANG))[0] == 0:
            if time.monotonic() > end:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                return "", True
            time.sleep(0.05)
        if os.WIFSIGNALED(ended[1]) and os.WTERMSIG(ended[1]) in (signal.SIGXCPU, signal.SIGKILL):
            return "", True
        return (answer.read_text() if answer.exists() else "the process died"), False


def capture(into: Path) -> str:
    from tests.interp.models import captured

    into.write_bytes(pickle.dumps({name: captured(name) for name in MODELS}))
    return "done"


def own_tests(mutant: Mutant) -> list[str]:
    return [f"tests/{name}" for name in ALSO.get(Path(mutant.path).stem, ())]


def tests_of(mutant: Mutant, without: Sequence[str]) -> list[str]:
    """Those that find the most, those of the module's own, then all others."""
    tests = dict.fromkeys((*FIRST, *own_tests(mutant), *FAST))
    return [test for test in tests if not any(name in test for name in without)]


def tried(
    mutant: Mutant, number: int, new: ast.AST, tests: Sequence[str], num_examples: int, captures: Path, timeout: float
) -> Mutant:
    def work() -> str:
        sys.meta_path.insert(0, _Finder(mutant, number, new))
        return run_tests(tests, own_tests(mutant), num_examples, captures)

    began = time.monotonic()
    failed, is_late = in_child(work, timeout)
    outcome = "timeout" if is_late else "killed" if failed else "survived"
    return replace(mutant, outcome=outcome, test=failed, seconds=round(time.monotonic() - began, 1))


def main(
    count: int = 100,
    seed: int = 0,
    only: list[str] = typer.Option([], help="modules, as schedule"),  # noqa: B008
    at: list[str] = typer.Option([], help="all changes of a line, as schedule:311"),  # noqa: B008
    without: list[str] = typer.Option([], help="tests to leave out, as test_goldens"),  # noqa: B008
    examples: int = typer.Option(10, help="of each test of hypothesis, at most; ten times as many of the module's own"),
    timeout: float = typer.Option(150.0, help="seconds of a core for one mutant's tests"),
    minutes: float = typer.Option(0.0, help="begin no mutant after so long; 0 tries all"),
    json_path: Path | None = typer.Option(None, "--json", help="write the results here"),  # noqa: B008
) -> None:
    """Put faults into the passes and count those that the fast tests find."""
    os.environ.setdefault("TRITON_INTERPRET", "1")
    os.chdir(ROOT)
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    import hypothesis  # noqa: F401  once for all processes
    import networkx  # noqa: F401
    import pydantic  # noqa: F401
    import pytest  # noqa: F401
    import sympy  # noqa: F401
    import torch
    import torch._dynamo
    import transformers.models.llama.modeling_llama  # noqa: F401
    import triton  # noqa: F401

    import small  # noqa: F401

    torch.set_num_threads(1)
    began, known = time.monotonic(), reasons()
    with tempfile.TemporaryDirectory() as folder:
        captures = Path(folder) / "captures"
        if in_child(lambda: capture(captures), 600)[0] != "done":
            raise typer.Exit("the models could not be captured")
        picked = chosen(count, seed, only, at)
        every = list(dict.fromkeys(test for mutant, _, _ in picked for test in tests_of(mutant, without)))
        own = {test for mutant, _, _ in picked for test in own_tests(mutant)}
        sound = in_child(lambda: run_tests(every, own, examples, captures), 2400)
        if sound != ("", False):
            typer.echo(f"the tests fail without a mutant: {sound}")
            raise typer.Exit(1)
        typer.echo(f"without a mutant: {time.monotonic() - began:.0f} s")
        found: list[Mutant] = []
        for mutant, number, new in picked:
            if minutes and time.monotonic() - began > 60 * minutes:
                break
            if reason := known.get(mutant):
                found.append(replace(mutant, outcome="equivalent", test=reason))
            else:
                found.append(tried(mutant, number, new, tests_of(mutant, without), examples, captures, timeout))
            typer.echo(str(found[-1]))
            if json_path:
                json_path.write_text(_report(found, count, seed, examples, only, at, without))
    survived = [m for m in found if m.outcome == "survived"]
    equivalent = sum(m.outcome == "equivalent" for m in found)
    typer.echo(f"{len(found) - len(survived) - equivalent} of {len(found)} killed, {equivalent} equivalent")
    for mutant in survived:
        typer.echo(str(mutant))


def _report(
    found: Sequence[Mutant],
    count: int,
    seed: int,
    examples: int,
    only: Sequence[str],
    at: Sequence[str],
    without: Sequence[str],
) -> str:
    options = [f"--count {count} --seed {seed} --examples {examples}"]
    options += (
        [f"--only {name}" for name in only]
        + [f"--at {line}" for line in at]
        + [f"--without {name}" for name in without]
    )
    counts = {o: sum(m.outcome == o for m in found) for o in ("killed", "timeout", "equivalent", "survived")}
    report = {"command": f"python -m benchmarks.mutants {' '.join(options)}", "tried": len(found), **counts}
    return json.dumps({"environment": environment(), **report, "mutants": [asdict(m) for m in found]}, indent=1) + "\n"


if __name__ == "__main__":
    typer.run(main)
