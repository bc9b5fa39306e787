"""What is worked out of where things live along a model axis."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from tests.passes.programs import Case, context_of, graph_of
from tests.passes.workings.common import LOWER, TWO, scheduled, slow
from zgraph.ir import Axis, Graph, Shard
from zgraph.passes import Context, parse_recipe
from zgraph.passes.analysis.placing import along_sequence, choose
from zgraph.passes.place import cut_inputs
from zgraph.passes.placements import Search
from zgraph.passes.placements.program import Program
from zgraph.passes.placements.space import Pair, _spots
from zgraph.passes.placements.twins import _candidates, _longest, _repetitions, twins
from zgraph.passes.schedule import lower_bound_us


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


def alike(name: str) -> Iterator[Any]:
    """Nodes that repeat others."""
    yield twins(graph_of(name))


def repeated(seed: int) -> Iterator[Any]:
    """Repetitions in random rows of nodes, and places of random views."""
    rng = random.Random(seed)
    for _ in range(80):
        block = [rng.randint(0, 3) for _ in range(rng.randint(1, 6))]
        row = [rng.randint(0, 3) for _ in range(rng.randint(0, 3))] + block * rng.randint(0, 5)
        row += [rng.randint(0, 5) for _ in range(rng.randint(0, 4))] + block * rng.randint(0, 3)
        looks = np.array(row, dtype=int)
        reads = np.cumsum([0, *(rng.choice((0, 1, 1, 2)) for _ in row)])
        yield [tuple(map(int, found)) for found in _candidates(looks, reads)]
        yield [tuple(map(int, found)) for found in _repetitions(looks, reads, 0, len(row))]
        yield _longest(looks > 1)
        joins: dict[Pair, list[Pair]] = {}
        for number in range(1, 6):
            for dim in range(3):
                old = (str(rng.randint(0, number - 1)), Shard(rng.randint(0, 2)))
                joins.setdefault(old, []).append((str(number), Shard(dim)))
        yield [list(spot.items()) for spot in _spots([(str(n), Shard(d)) for n in range(6) for d in range(3)], joins)]
