"""What passes work out on the way to a program, as one digest each: problems, prices, choices and clocks.

Programs show only the choice that won. `python -m tests.passes.workings` writes the digests anew.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Iterator, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import fields, is_dataclass, replace
from functools import cache, partial
from typing import Any

from tests.passes.programs import FOLDER, Case, bare, context_of, graph_of
from zgraph.cost import CostTable, Link, hardware
from zgraph.errors import ZgraphError
from zgraph.ir import Axis, ExternalOp, Graph, Output, OutputKind, Phase, Shard, Value, print_graph
from zgraph.passes import RECIPES, Context, make_plan, parse_recipe
from zgraph.passes.analysis import timetable
from zgraph.passes.analysis.forward import Forward
from zgraph.passes.analysis.lookahead import lowered, makespan_us, peak_bytes
from zgraph.passes.analysis.placing import along_sequence, choose
from zgraph.passes.analysis.timetable import HeadroomTree, Problem, Transfer
from zgraph.passes.bucket import Bucket
from zgraph.passes.compress import Compress
from zgraph.passes.fit import _Fitter
from zgraph.passes.float8 import Float8
from zgraph.passes.fusion.groups import Groups
from zgraph.passes.fusion.loss import fused_losses, loss_nodes
from zgraph.passes.fusion.rotary import fused_subgraphs
from zgraph.passes.keep import Keep
from zgraph.passes.offload import Offload, Saved
from zgraph.passes.partition import Partition
from zgraph.passes.place import cut_inputs
from zgraph.passes.placements import Search
from zgraph.passes.placements.program import Program
from zgraph.passes.placements.twins import twins
from zgraph.passes.plan.fixed import only, split_fixed
from zgraph.passes.plan.no_sync import without_sync
from zgraph.passes.plan.zero_tangents import without_tangents, zero_tangents
from zgraph.passes.quantise import Quantise
from zgraph.passes.schedule import LoweredStep, lower_bound_us

RESULTS = FOLDER / "workings.json"
GRAPHS = ("tied", "convnet", "dynamic", "bf16", "mixed", "llama", "vit", "wide")
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
    if is_dataclass(thing) and type(thing).__repr__ is object.__repr__:
        return [plain(getattr(thing, f.name)) for f in fields(thing)]
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


def forward_of(graph: Graph) -> Graph:
    """The forward alone."""
    return replace(
        graph,
        inputs=tuple(i for i in graph.inputs if i.kind.value != "tangent"),
        nodes=tuple(n for n in graph.nodes if n.phase is Phase.forward),
        outputs=tuple(o for o in graph.outputs if o.phase is Phase.forward and o.kind is OutputKind.output),
    ).with_used_ops()


# --- what is worked out ------------------------------------------------------------------------------------------


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


def seeds_of(graph: Graph, num_ranks: int, pattern: str) -> dict[str, Shard]:
    """Cuts of the parameters that they divide into, by a pattern of dims that repeats."""
    found = {}
    for number, entry in enumerate(graph.params):
        dim = int(pattern[number % len(pattern)])
        shape = entry.value.tensor.shape
        if len(shape) > max(dim, 1) - (pattern == "0") and Shard(dim).divides(shape[dim], num_ranks):
            found[entry.value.name] = Shard(dim)
    return found


PATTERNS = ("0", "1", "0001", "10", "00011")


def choices(name: str, num_ranks: int) -> Iterator[Any]:
    """Where values live along a model axis."""
    graph = parse_recipe("canonicalize").run(graph_of(name), Context())
    for pattern in PATTERNS:
        seeds = seeds_of(graph, num_ranks, pattern)
        for sequence in (False, True):
            found = choose(graph, seeds, num_ranks, sequence=sequence)
            yield [(repr(s), r is None) for s, r in zip(found.strategies, found.rules, strict=True)]
            yield sorted(found.reduced.items(), key=repr), found.views, found.graph
            if sequence:
                yield sorted(along_sequence(found.graph, found.rules, num_ranks).items(), key=repr)


def cut(name: str, num_ranks: int, options: str, pattern: str) -> Iterator[Any]:
    """Graphs cut along a model axis."""
    graph = graph_of(name)
    by_value = seeds_of(graph, num_ranks, pattern)
    graph = cut_inputs(
        graph, "tensor", {i.target: by_value[i.value.name] for i in graph.params if i.value.name in by_value}
    )
    mesh = (Axis("tensor", num_ranks), *TWO)
    context = replace(context_of(Case(name, "", mesh), graph), costs=slow())
    cut_graph = parse_recipe(f"canonicalize,place{options}").run(graph, context)
    yield cut_graph
    for stage in (1, 3):
        recipe = f"partition(stage={stage}),exchange,{LOWER}"
        whole = parse_recipe(f"canonicalize,place{options},{recipe}").run(graph, context)
        yield whole, lower_bound_us(whole, context)
    yield from scheduled(whole, context)


def spaces(name: str, num_ranks: int, num_data: int) -> Iterator[Any]:
    """The integer program of a search of placements."""
    axis = Axis("tensor", num_ranks)
    mesh = (axis, Axis("shard", num_data)) if num_data > 1 else (axis,)
    graph = parse_recipe("canonicalize").run(graph_of(name), Context())
    for free in (True, False):
        seeds = {} if free else seeds_of(graph, num_ranks, "0001")
        search = Search(graph, axis, Context(mesh=mesh, costs=slow()), seeds, free=free)
        program: Program = search.program
        space = search.space
        yield program.costs, program.integral, program.rows
        yield [(key, [(repr(c), v) for c, v in found.items()]) for key, found in program.chosen.items()]
        yield program.own, space.stands, space.keys, space.views, space.most_blocks, space.trained
        yield sorted((repr(key), sorted(map(repr, found))) for key, found in space.known.items())
        yield sorted((repr(key), sorted(map(repr, found))) for key, found in space.barred.items())
        yield [
            (g.root.name, list(g.parents.items()), list(map(sorted, map(dict.items, g.spots)))) for g in space.groups
        ]


def eights(name: str) -> Iterator[Any]:
    """Matrices in eight bits and less."""
    graph = parse_recipe("canonicalize").run(graph_of(name), Context())
    for recipe in ("tensorwise", "rowwise"):
        for exclude in ("lm_head", "none", "fc2+up"):
            found = Float8(recipe=recipe, exclude=exclude)
            yield found.layers(graph), found.left_out(graph), found.run(graph, Context())
    alone = forward_of(graph)
    for options in (
        {},
        {"activations": "int8"},
        {"activations": "int8", "precise": "up+q_proj"},
        {"weights": "int4", "group": 32},
        {"weights": "int4", "group": 64},
        {"weights": "int4", "group": 32, "wider": "first+lm_head+v_proj"},
    ):
        made = Quantise(**options)
        yield outcome(lambda m=made: m.layers(alone)), outcome(lambda m=made: m.run(alone, Context()))
        yield outcome(lambda m=made: parts_of(m.run(alone, Context())))


def parts_of(graph: Graph) -> tuple[Graph, ...]:
    """What depends on parameters alone, the rest, and parts of the former."""
    fixed, call = split_fixed(graph)
    return fixed, call, only(fixed, {0}), only(fixed, {len(fixed.outputs) - 1})


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


def grown(name: str) -> Iterator[Any]:
    """Groups of ops that can be kernels, and what may stand in their place."""
    context = replace(
        context_of(Case(name, "", ()), graph_of(name)), costs=CostTable(hardware=hardware("h100"), per_host=1)
    )
    graph = parse_recipe("canonicalize").run(graph_of(name), context)
    for matmuls in ("never", "auto", "always"):
        for found in Groups(graph, "fuse").candidates(matmuls, context.hints):
            yield found.key, sorted(found.nodes), [repr(nodes) for nodes in found.nodes.values()]
            yield found.best(context, matmuls), found.best(context, matmuls, only_measured=True)
        for only_measured in ("true", "false"):
            recipe = parse_recipe(f"canonicalize,fuse(matmuls={matmuls},only_measured={only_measured})")
            yield recipe.run(graph_of(name), context)


def varied(graph: Graph, *, rows: tuple[ExternalOp, ...] = (ExternalOp(),)) -> Iterator[Graph]:
    """The graph with another reader of each value, and with another op in the place of each node.

    Args:
        graph: the graph.
        rows: what is known of the other op; of what it writes to or views, the first argument if that is a value.
    """
    for node in graph.nodes:
        if any(v.name in graph.param_names for v in node.results) or not node.results:
            continue
        for value in node.results:
            yield replace(graph, outputs=(*graph.outputs, Output(OutputKind.output, value, "", node.phase)))
        op, is_single = "test.other.default", bool(node.args) and isinstance(node.args[0], Value)
        for row in rows:
            if (row.writes or row.views) and not is_single:
                continue
            nodes = tuple(replace(n, op=op) if n is node else n for n in graph.nodes)
            foreign = {**graph.foreign, op: replace(row, multi=len(node.results) > 1)}
            yield replace(graph, nodes=nodes, foreign=foreign)


def new_nodes(before: Graph, after: Graph) -> list[Any]:
    """What a pass made, and how many nodes there are."""
    old = set(map(id, before.nodes))
    return [len(after.nodes), *(repr(n) for n in after.nodes if id(n) not in old)]


def matched(name: str) -> Iterator[Any]:
    """What is found to fuse where a graph is a little different."""
    graph = parse_recipe("canonicalize").run(graph_of(name), Context())
    for other in varied(graph):
        yield new_nodes(other, fused_losses(other, "fuse")), new_nodes(other, fused_subgraphs(other, "fuse"))
        yield sorted(loss_nodes(other))


def layered(name: str) -> Iterator[Any]:
    """Which layers have eight bits, and what carries zeros alone, where a graph is a little different."""
    graph = parse_recipe("canonicalize").run(graph_of(name), Context())
    zeros = zero_tangents(graph) or frozenset(i.value.name for i in graph.inputs if i.kind.value == "tangent")
    for other in varied(graph):
        yield Float8().layers(other), Float8().left_out(other), Quantise().layers(other)
        found = without_tangents(other, zeros)
        yield None if found is None else [len(found.nodes), found.outputs]


ROWS = (
    ExternalOp(random=True),
    ExternalOp(opaque=True),
    ExternalOp(writes=(0,)),
    ExternalOp(views=(0,)),
)


def odd(name: str, stage: int) -> Iterator[Any]:
    """What becomes of graphs with ops of which nothing else is known."""
    whole = parse_recipe("canonicalize").run(graph_of(name), Context())
    context = placed(name, stage)[1]
    for other in varied(whole, rows=ROWS):

        def found(graph: Graph = other) -> Any:
            graph = passed("dce", Partition(stage).run(graph, context), context)
            forward, saved = Forward(graph, context), Saved(graph, context, 1)
            again = [[(m.us, m.runs_again) for m in block.makers] for block, _ in forward.blocks]
            step = lowered(graph, context)
            transfers = [(t.first, t.due, t.num_bytes) for t in step.transfers]
            plan = make_plan(graph, only_step=True)
            return [new_nodes(other, graph), again, saved.num_bytes, transfers, plan.saved, step.canonical().nodes]

        yield outcome(found)
        yield outcome(
            lambda graph=other: [(c.key, sorted(c.nodes)) for c in Groups(graph, "fuse").candidates("auto", {})]
        )
        yield outcome(lambda graph=other: passed("in-place", graph, context))


def alike(name: str) -> Iterator[Any]:
    """Nodes that repeat others."""
    yield twins(graph_of(name))


SYMBOLIC = ("dynamic",)
"""Sizes that are symbols cannot be cut."""


def _of_graph(name: str) -> Iterator[tuple[str, Callable[[], Iterator[Any]]]]:
    for stage in (0, 1, 2, 3):
        if stage in (0, 3):
            yield f"what is kept, stage {stage}", partial(forwards, name, stage)
            yield f"what may leave, stage {stage}", partial(leaving, name, stage)
        if stage in (1, 3):
            yield f"predictions, stage {stage}", partial(ahead, name, stage)
        yield f"problem, stage {stage}", partial(problems, name, stage, TWO_HOSTS if stage % 2 else (Axis("shard", 3),))
        yield f"plans, stage {stage}", partial(plans, name, stage)
    yield "problem with groups", partial(problems, name, 3, TWO, grouped=True, most=3000)
    yield "problem with copies", partial(moved, name)
    yield "kernels", partial(grown, name)
    yield "eight bits", partial(eights, name)
    yield "choices on 2", partial(choices, name, 2)
    for stage, codec in ((0, "q8(block=8)"), (2, "sign(block=8)"), (3, "q4(block=16)"), (3, "topk(10%, chunk=16)")):
        yield f"{codec}, stage {stage}", partial(coded, name, stage, codec)
    if name not in SYMBOLIC:
        yield "cut", partial(cut, name, 2, "", "0001")
        yield "cut along the sequence", partial(cut, name, 2, "(sequence=true)", "10")
        if name != "llama":
            yield "choices on 3", partial(choices, name, 3)
            yield "cut as found around it", partial(cut, name, 2, "(search=values)", "01")
        yield "cut as found", partial(cut, name, 2, "(search=all)", "01")
        yield "space of 2", partial(spaces, name, 2, 1)
        yield "space of 3 by 2", partial(spaces, name, 3, 2)


def _workings() -> Iterator[tuple[str, Callable[[], Iterator[Any]]]]:
    for name in GRAPHS:
        yield from ((f"{name}, {what}", work) for what, work in _of_graph(name))
    for name in ("mixed", "llama", "convnet"):
        yield f"{name}, what is tried to fit", partial(fitted, name, 3)
    for seed in range(3):
        yield f"timetables {seed}", partial(random_problems, seed)
    for name in ("gpt2", "bf16-llama"):
        yield f"{name}, eight bits", partial(eights, name)
        yield f"{name}, kernels", partial(grown, name)
        yield f"{name}, repeated", partial(alike, name)
    for name in ("wide", "llama", "bf16"):
        yield f"{name}, matched if varied", partial(matched, name)
        yield f"{name}, layers if varied", partial(layered, name)
    for name, stage in (("tied", 3), ("bf16", 1), ("convnet", 2), ("mixed", 0)):
        yield f"{name}, odd ops", partial(odd, name, stage)


WORKINGS = dict(_workings())


def digest(name: str) -> str:
    """A digest of what is worked out."""
    found = hashlib.sha256()

    def all_of() -> None:
        for item in WORKINGS[name]():
            found.update(repr(plain(item)).encode())

    found.update(repr(outcome(all_of)).encode())
    return found.hexdigest()[:16]


def write() -> None:
    """Write all digests."""
    RESULTS.write_text(json.dumps({name: digest(name) for name in WORKINGS}, indent=1) + "\n")


if __name__ == "__main__":
    write()
