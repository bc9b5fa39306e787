"""What is worked out of a step: what it keeps, its memory, its clock, its plans."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from tests.passes.programs import graph_of
from tests.passes.workings.common import LOWER, passed, placed, scheduled
from zgraph.ir import Axis
from zgraph.passes import RECIPES, make_plan, parse_recipe
from zgraph.passes.analysis import timetable
from zgraph.passes.analysis.forward import Forward
from zgraph.passes.analysis.lookahead import lowered, makespan_us, peak_bytes
from zgraph.passes.analysis.timetable import HeadroomTree, Problem, Transfer
from zgraph.passes.bucket import Bucket
from zgraph.passes.compress import Compress
from zgraph.passes.fit import _Fitter
from zgraph.passes.keep import Keep
from zgraph.passes.offload import Offload, Saved
from zgraph.passes.plan.no_sync import without_sync
from zgraph.passes.plan.zero_tangents import without_tangents, zero_tangents


def forwards(name: str, stage: int) -> Iterator[Any]:
    """The problem of what is kept for the backward, and its solutions at several sizes."""
    forward = Forward(*placed(name, stage))
    yield forward.needed, forward.there, sorted(forward.again), forward.changed, forward.parts, forward.crossing
    for block, names in forward.blocks:
        yield block.num_bytes, block.may_keep, block.needed, names
        yield [(m.us, m.reads, m.makes, m.runs_again) for m in block.makers]
    yield forward.us, forward.hidden_bytes, forward.prices()
    most = sum(c.num_bytes for c in forward.choices(None))
    for share in (0.0, 0.3, 0.5, 0.8, 1.0):
        for exactly in (False, True):
            found = forward.choices(int(share * most), exactly=exactly)
            yield [(c.num_bytes, c.us, c.kept, c.again) for c in found]
        yield forward.keeping(found)
    for price in forward.prices():
        yield [(c.num_bytes, c.us) for c in forward.choices_at(price)]
    yield forward.keeping(forward.choices_at(forward.prices()[-1]))


def leaving(name: str, stage: int) -> Iterator[Any]:
    """What may wait on the host."""
    graph, context = placed(name, stage)
    saved = Saved(graph, context, 1)
    yield [(v.name, n) for v, n in saved.num_bytes.items()], Saved(graph, context).min_bytes
    total = sum(saved.num_bytes.values())
    for share in (0.2, 0.6, 1.0):
        yield saved.offloading(saved.first(int(share * total)))
    yield Offload(num_bytes=total, min_bytes=64).run(graph, context)


def fitted(name: str, stage: int) -> Iterator[Any]:
    """All that is tried to fit budgets."""
    graph, known = placed(name, stage)
    most = peak_bytes(graph, known)
    for share in (0.6, 0.8, 0.95):
        for offloads, recomputes in (("auto", "auto"), ("always", "never"), ("never", "always")):
            context = replace(known, memory_budget=int(share * most), offloads=offloads, recomputes=recomputes)
            fitter = _Fitter(Forward(graph, context), int(share * most))
            for move_bytes in fitter.shares():
                best = fitter.best(move_bytes)
                yield share, move_bytes, fitter.least_us(move_bytes), best.keep_bytes, best.kept_bytes, best.move_bytes
                yield best.peak_bytes, best.us, best.is_again
            yield [(key, t.peak_bytes) for key, t in fitter.tried.items()]


def problems(name: str, stage: int, mesh: tuple[Axis, ...], *, grouped: bool = False, most: int = 400) -> Iterator[Any]:
    """Scheduling problems of a graph."""
    graph, context = placed(name, stage, mesh)
    context = replace(context, groups_calls=grouped)
    recipe = f"bucket(max_bytes={most},pack_below_bytes=300),{LOWER}"
    yield from scheduled(passed(recipe, graph, context), context)


def moved(name: str) -> Iterator[Any]:
    """Scheduling problems with copies to and from the host."""
    graph, context = placed(name, 3)
    graph = Offload(num_bytes=1 << 20, min_bytes=64).run(graph, context)
    yield from scheduled(passed(LOWER, graph, context), context)


def ahead(name: str, stage: int) -> Iterator[Any]:
    """Predictions of graphs that are not lowered yet, and what passes do by them."""
    graph, context = placed(name, stage)
    peak = peak_bytes(graph, context)
    yield peak, [makespan_us(graph, context, num_ahead=n) for n in (0, 1, 2)]
    yield [lowered(graph, context).uses(n.name) for n in graph.nodes if n.op.startswith("aten.mm")]
    for most, below in ((200, 100), (400, 4000), (4000, 1000)):
        yield Bucket().groups(graph, most, below)
    for budget in (None, peak, peak + 500, 2 * peak):
        given = replace(context, memory_budget=budget)
        yield Bucket().run(graph, given), Keep().run(graph, given), Keep(num_ahead=0).run(graph, given)


def coded(name: str, stage: int, codec: str) -> Iterator[Any]:
    """Codes in the place of gradients."""
    graph, context = placed(name, stage)
    graph = Bucket(max_bytes=300, pack_below_bytes=200).run(graph, context)
    for least in (0, 64, 256):
        yield Compress(codec, at_least_bytes=least).run(graph, context)
    yield from scheduled(passed(f"compress(gradients={codec},at_least_bytes=0),{LOWER}", graph, context), context)
    yield Compress("auto").times_us(graph, context)


def random_problems(seed: int) -> Iterator[Any]:
    """Timetables of random problems."""
    rng = random.Random(seed)
    for _ in range(60):
        num_ops = rng.randint(1, 12)
        transfers = []
        for _ in range(rng.randint(0, 8)):
            due = rng.randint(0, num_ops)
            first = rng.randint(0, due)
            is_gather = rng.random() < 0.6
            lane = rng.choice(("comm", "comm", "d2h", "h2d"))
            until = rng.randint(first, due) if is_gather else first
            transfers.append(Transfer(float(rng.randint(0, 9)), first, due, rng.randint(0, 5), until, lane))
        us = tuple(float(rng.randint(0, 9)) for _ in range(num_ops))
        problem = Problem(us, tuple(rng.randint(0, 9) for _ in us), tuple(transfers))
        yield problem.lower_bound_us
        orders = [timetable.first_use_order(problem), timetable.latest_first_order(problem)]
        yield orders, [timetable.earliest_starts(problem, order) for order in orders]
        for effort in (0, 1, 7, 50):
            found = timetable.search(problem, effort)
            late = [timetable.delayed(problem, found, slack) for slack in (0.0, 0.5, 3.0)]
            for table in (found, *late):
                yield table.order, table.starts, table.begins_us, table.ops_us, table.makespan_us, table.stalls
        yield [*timetable._neighbours(found)]
        tree = HeadroomTree(problem.headroom)
        for _ in range(6):
            begin, end = sorted((rng.randint(0, num_ops), rng.randint(0, num_ops)))
            tree.take(rng.randint(0, 3), begin, end)
            yield [tree.last_below(n, e) for n in range(-3, 10) for e in range(num_ops + 1)]


def plans(name: str, stage: int) -> Iterator[Any]:
    """Plans and the graphs that they are made of."""
    graph, context = placed(name, stage)
    tangents = [i.value.name for i in graph.inputs if i.kind.value == "tangent"]
    yield zero_tangents(graph), without_sync(graph)
    for wanted in (*({t} for t in tangents), set(tangents)):
        yield without_tangents(graph, frozenset(wanted))
    full = parse_recipe(RECIPES[stage]).run(graph_of(name), context)
    for only_step in (False, True):
        plan = make_plan(full, only_step=only_step)
        yield repr((plan.forward, plan.backward, plan.unsynced, plan.saved, sorted(plan.zero_tangents), plan.loss_only))
