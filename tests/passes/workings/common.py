"""Placed graphs, and texts of what is worked out of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import replace
from functools import cache
from typing import Any

from tests.passes.programs import Case, bare, context_of, graph_of
from zgraph.cost import CostTable, Link, hardware
from zgraph.errors import ZgraphError
from zgraph.ir import Axis, Graph, print_graph
from zgraph.passes import Context, parse_recipe
from zgraph.passes.analysis import timetable
from zgraph.passes.schedule import LoweredStep, lower_bound_us

TWO, TWO_HOSTS = (Axis("shard", 2),), (Axis("replicate", 2), Axis("shard", 2))


SLOW = {"launch_us": 0.5, "matmul_half_flop": 1e3, "memory_bytes_per_s": 1e9, "matmul_flops": {"f32": 1e9, "bf16": 2e9}}


@cache
def slow(num_devices: int = 8) -> CostTable:
    """Costs of devices so slow that sizes count in small graphs."""
    known = hardware("cpu")
    link = Link(bytes_per_s=3e8, latency_us=1.5)
    device = known.device.model_copy(update=SLOW)
    update = {"device": device, "devices_per_host": num_devices, "within": link}
    return CostTable(hardware=known.model_copy(update=update), per_host=num_devices)


def plain(thing: Any) -> Any:
    """The same in an order of its own, floats but for what rounding makes of them."""
    if isinstance(thing, float):
        return f"{thing:.9g}"
    if isinstance(thing, Graph):
        return print_graph(bare(thing))
    if isinstance(thing, Mapping):
        return [(plain(key), plain(value)) for key, value in thing.items()]
    if isinstance(thing, AbstractSet):
        return sorted(repr(plain(item)) for item in thing)
    if isinstance(thing, list | tuple):
        return [plain(item) for item in thing]
    return repr(thing)


def outcome(work: Callable[[], Any]) -> Any:
    """What a piece of work gives, or the whole message of the error that it ends with."""
    try:
        return plain(work())
    except (ZgraphError, ValueError) as error:
        return f"{type(error).__name__}: {error}"


@cache
def placed(name: str, stage: int, mesh: tuple[Axis, ...] = TWO, *, is_slow: bool = True) -> tuple[Graph, Context]:
    """A graph that is placed, and what passes know of it."""
    context = context_of(Case(name, "", mesh), graph_of(name))
    context = replace(context, costs=slow()) if is_slow else context
    return parse_recipe(f"canonicalize,partition(stage={stage})").run(graph_of(name), context), context


def passed(recipe: str, graph: Graph, context: Context) -> Graph:
    """A graph that is placed, after more passes."""
    for step in parse_recipe(f"partition,{recipe}").passes[1:]:
        graph = step.run(graph, context)
    return graph


def scheduled(graph: Graph, context: Context) -> Iterator[Any]:
    """A lowered graph as a problem, and its answers."""
    step = LoweredStep(graph, context)
    yield [(c.start, c.before, c.after, c.is_gather) for c in step.collectives], step.ops, step.phase_end
    yield [(t.us, t.first, t.due, t.num_bytes, t.until, t.lane) for t in step.transfers]
    for num_ahead in (0, 1, 3):
        yield step.ahead_bytes(num_ahead), step.headroom(num_ahead)
    yield step.canonical(), step.over_bytes(graph), lower_bound_us(graph, context)
    problem = step.problem(step.headroom(1))
    yield problem.compute_us, problem.lower_bound_us
    found = timetable.search(problem, 20)
    for slack in (0.0, 2.0):
        late = timetable.delayed(problem, found, slack)
        yield late.starts, late.begins_us, late.ops_us, late.makespan_us, late.stalls
        room = tuple(h // 3 for h in problem.headroom)
        sooner, clock, waits = step.waits(replace(problem, headroom=room), late, slack)
        yield [t.due for t in sooner.transfers], clock.makespan_us, sorted(waits.items()), step.placed(clock, waits)
    limited = replace(context, memory_budget=step.plain[1].peak.total_bytes + 100)
    yield LoweredStep(graph, limited).headroom(2), LoweredStep(graph, limited).over_bytes(graph)
    yield outcome(lambda: LoweredStep(graph, replace(context, memory_budget=64)).headroom(2))


LOWER = "broadcast,all-gather,reduce-scatter,all-reduce,host-copies,release"
