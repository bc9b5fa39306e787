"""FLOP of a training step by module, counted in the graph: exact, with no hooks, and with what is computed again."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from rich.console import Group, RenderableType
from rich.table import Table

from zgraph.compiler.report import Entry
from zgraph.cost import work
from zgraph.engine.config.keys import FlopsProfiler
from zgraph.ir import Node, Phase
from zgraph.ir.symbols import evaluate
from zgraph.passes.recompute import Recompute


@dataclass
class ModuleFlop:
    """FLOP of one rank's matmuls in a forward and backward of a module, and of all modules in it."""

    path: str
    forward: int = 0
    backward: int = 0
    again: int = 0

    @property
    def total(self) -> int:
        return self.forward + self.backward + self.again

    @property
    def depth(self) -> int:
        return len(self.path.split(".")) if self.path else 0


def flop_by_module(entry: Entry) -> list[ModuleFlop]:
    """Modules with matmuls in them, each before those that it holds; the model itself is first, with no path."""
    found = {"": ModuleFlop("")}
    for node in entry.plan.graph.nodes:
        flop = int(evaluate(work(entry.plan.graph, node).flop, entry.hints))
        for path in _above(node.origin.module) if flop else ():
            _add(found.setdefault(path, ModuleFlop(path)), node, flop)
    order = {path: at for at, path in enumerate(found)}
    return sorted(found.values(), key=lambda module: [order[path] for path in _above(module.path)])


def useful_flop(entry: Entry) -> int:
    """FLOP that the model asks for: all but those computed again."""
    whole = flop_by_module(entry)[0]
    return whole.forward + whole.backward


def _above(path: str) -> Iterator[str]:
    """A module and those that hold it, from the model on."""
    yield ""
    parts = path.split(".") if path else []
    for count in range(1, len(parts) + 1):
        yield ".".join(parts[:count])


def _add(module: ModuleFlop, node: Node, flop: int) -> None:
    if node.origin.made_by == Recompute.name:
        module.again += flop
    elif node.phase is Phase.forward:
        module.forward += flop
    else:
        module.backward += flop


def flop_tables(entry: Entry, model: str, keys: FlopsProfiler) -> RenderableType:
    """The largest modules of each depth, and with `detailed` all modules down to `module_depth` (-1: to the last)."""
    modules = flop_by_module(entry)
    last = max(m.depth for m in modules) if keys.module_depth < 0 else keys.module_depth
    largest = [
        module
        for depth in range(last + 1)
        for module in sorted((m for m in modules if m.depth == depth), key=lambda m: -m.total)[: keys.top_modules]
    ]
    whole = modules[0].total
    tables = [_table("FLOP of a forward and backward: the largest of each depth", largest, model, whole)]
    if keys.detailed:
        tables.append(_table("all modules", [m for m in modules if m.depth <= last], model, whole))
    return Group(*tables)


def _table(title: str, modules: list[ModuleFlop], model: str, whole: int) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column("depth", justify="right")
    table.add_column("module", overflow="fold")
    for name in ("forward", "backward", "computed again", "share"):
        table.add_column(name, justify="right")
    for m in modules:
        share = f"{m.total / whole:.1%}" if whole else ""
        table.add_row(str(m.depth), m.path or model, giga(m.forward), giga(m.backward), giga(m.again), share)
    return table


def giga(flop: int) -> str:
    """FLOP for people."""
    return f"{flop / 1e9:,.3f} GFLOP"
