"""Programs that the passes make of captured graphs, as one line each.

`python -m tests.passes.programs` captures the graphs in programs/ anew, and writes what comes out of them.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import zgraph.codegen.library  # noqa: F401 - kernels say what they need beside operands and results
from zgraph.cost import CostTable, Link, hardware
from zgraph.errors import BudgetError
from zgraph.ir import OPS, Axis, DType, Graph, Origin, Shard, parse_graph, print_graph
from zgraph.passes import RECIPES, Context, make_plan, parse_recipe
from zgraph.passes.core.recipes import along_model_axes, fusing
from zgraph.passes.place import cut_inputs
from zgraph.passes.placements import Search
from zgraph.passes.plan.make_plan import memory_of
from zgraph.passes.schedule import lower_bound_us

FOLDER = Path(__file__).parent / "programs"
RESULTS = FOLDER / "programs.json"
SIZE = 9
"""Of each symbol."""


@dataclass(frozen=True)
class Case:
    """A graph, and how a program is made of it.

    Args:
        graph: its file in programs/.
        recipe: the passes.
        mesh: the ranks.
        share: of the bytes between the least that a step takes and what it takes without a budget; None for no budget.
        profile: a profile of hardware.
        cuts: words in names of parameters, and the dim that each is cut along on the axis "tensor".
        options: of the context.
    """

    graph: str
    recipe: str
    mesh: tuple[Axis, ...] = (Axis("shard", 2),)
    share: float | None = None
    profile: str = ""
    cuts: tuple[tuple[str, int], ...] = ()
    options: dict[str, Any] = field(default_factory=dict)


@cache
def graph_of(name: str) -> Graph:
    """A graph of programs/."""
    return parse_graph((FOLDER / f"{name}.zir").read_text())


def context_of(case: Case, graph: Graph) -> Context:
    """Facts that the passes know."""
    hints = dict.fromkeys(sorted(set(re.findall(r"\bs\d+\b", print_graph(graph)))), SIZE)
    context = Context(mesh=case.mesh, hints=hints, **case.options)
    if not case.profile:
        return context
    return replace(context, costs=CostTable(hardware=hardware(case.profile), per_host=case.mesh[-1].size))


def made(case: Case) -> tuple[Graph, Context]:
    """The program, and the context with its budget."""
    graph = graph_of(case.graph)
    if case.cuts:
        cuts = {i.target: Shard(dim) for i in graph.params for word, dim in case.cuts if f".{word}." in i.target}
        graph = cut_inputs(graph, "tensor", cuts)
    context, pipeline = context_of(case, graph), parse_recipe(case.recipe)
    if case.share is None:
        return pipeline.run(graph, context), context
    most = memory_of(pipeline.run(graph, context), context.hints).peak.total_bytes
    try:
        pipeline.run(graph, replace(context, memory_budget=0))
    except BudgetError as error:
        least = error.needed_bytes
    context = replace(context, memory_budget=least + int(case.share * (most - least)))
    return pipeline.run(graph, context), context


def line(case: Case) -> dict[str, Any]:
    """The program in figures, and a digest of it and of all that training runs of it."""
    program, context = made(case)
    plan = make_plan(program)
    kinds = Counter(n.op for n in program.nodes if n.op in OPS and OPS[n.op].transfer is not None)
    memory = memory_of(program, context.hints)
    programs = [plan.forward, plan.backward, plan.unsynced, plan.saved, sorted(plan.zero_tangents), plan.loss_only]
    text = "\n".join([print_graph(program), *map(repr, programs), repr([m.total_bytes for m in memory.moments])])
    return {
        "nodes": len(program.nodes),
        "moved": dict(sorted(kinds.items())),
        "budget": context.memory_budget,
        "peak_bytes": memory.peak.total_bytes,
        "bound_us": round(lower_bound_us(program, context), 3),
        "digest": hashlib.sha256(text.encode()).hexdigest()[:16],
    }


def searched(graph_name: str, num_ranks: int, num_data: int = 1) -> dict[str, Any]:
    """What a search of placements may choose from, and what it finds: times, as another choice may be as good.

    The device is slow, so that it pays to cut small models.
    """
    graph, axis = graph_of(graph_name), Axis("tensor", num_ranks)
    known = hardware("cpu")
    rates = {"launch_us": 0.0, "matmul_half_flop": 0.0, "memory_bytes_per_s": 1e10, "matmul_flops": {"f32": 1e9}}
    device = known.device.model_copy(update=rates | {"matmul_flops": {"f32": 1e9, "bf16": 1e9}})
    within = Link(bytes_per_s=3e8, latency_us=1.0)
    profile = known.model_copy(update={"device": device, "devices_per_host": 8, "within": within})
    mesh = (axis, Axis("shard", num_data)) if num_data > 1 else (axis,)
    search = Search(graph, axis, Context(mesh=mesh, costs=CostTable(hardware=profile, per_host=8)), {})
    space = search.space
    strategies = {graph.nodes[at].name: sorted(map(repr, found)) for at, found in space.strategies.items()}
    groups = [(g.root.name, sorted(g.parents.items()), [sorted(s.items()) for s in g.spots]) for g in space.groups]
    text = repr((space.stands, strategies, sorted(space.inputs.items()), groups, sorted(space.trained)))
    named = [i for i in graph.params if len(space.inputs[i.value.name]) > 1]
    most = [max(named, key=lambda i: (i.value.tensor.numel, i.value.name)).value.name] if named else []
    return {
        "groups": len(groups),
        "strategies": sum(map(len, strategies.values())),
        "us": round(search.found.total_us, 3),
        "bound_us": round(search.found.bound_us, 2),
        "more_us": [round(a.more_us, 2) for name in most for a in search.alternatives(name)],
        "digest": hashlib.sha256(text.encode()).hexdigest()[:16],
    }


SEARCHED: dict[str, tuple[str, int, int]] = {
    f"{name}, searched on {num_ranks} x {num_data}": (name, num_ranks, num_data)
    for name, num_ranks, num_data in (
        ("convnet", 2, 1),
        ("mixed", 2, 2),
        ("bf16", 3, 1),
        ("llama", 2, 1),
        ("llama", 3, 2),
        ("gpt2", 2, 2),
        ("gpt2", 3, 1),
        ("vit", 2, 1),
        ("vit", 3, 1),
        ("bf16-llama", 3, 1),
    )
}


ONE, THREE = (Axis("shard", 1),), (Axis("shard", 3),)
TWO_HOSTS = (Axis("replicate", 2), Axis("shard", 2))
GRAPHS = ("tied", "convnet", "dynamic", "bf16", "mixed", "llama", "gpt2", "vit", "bf16-llama")


def cases() -> Iterator[tuple[str, Case]]:
    """All cases, by name."""
    for name in GRAPHS:
        for stage, recipe in RECIPES.items():
            yield f"{name}, stage {stage}", Case(name, recipe, THREE if stage % 2 else TWO_HOSTS)
    for name in ("llama", "gpt2", "convnet", "bf16-llama"):
        for share in (0.0, 0.3, 0.7):
            yield f"{name}, budget {share}", Case(name, RECIPES[3], share=share)
        yield f"{name}, budget, to the host", Case(name, RECIPES[3], share=0.1, options={"offloads": "auto"})
        yield f"{name}, always to the host", Case(name, RECIPES[2], share=0.5, options={"offloads": "always"})
        yield f"{name}, always again", Case(name, RECIPES[1], share=0.5, options={"recomputes": "always"})
        yield f"{name}, never again", Case(name, RECIPES[3], share=0.9, options={"recomputes": "never"})
        yield f"{name}, kernels", Case(name, fusing(RECIPES[3]), THREE)
        yield f"{name}, kernels in a budget", Case(name, fusing(RECIPES[3], only_measured=True), share=0.2)
        yield f"{name}, arenas", Case(name, RECIPES[3], THREE, options={"keeps_blocks": True})
        yield f"{name}, arenas in a budget", Case(name, RECIPES[2], share=0.4, options={"keeps_blocks": True})
        yield f"{name}, grouped", Case(name, RECIPES[3], THREE, options={"groups_calls": True})
        yield f"{name}, reduced in fp64", Case(name, RECIPES[2], THREE, options={"reduce_dtype": DType.f64})
        yield f"{name}, on GPUs", Case(name, RECIPES[3], TWO_HOSTS, profile="2x8-h100")
        yield f"{name}, one rank", Case(name, RECIPES[3], ONE)
    cuts = (
        ("q_proj", 0),
        ("k_proj", 0),
        ("v_proj", 0),
        ("gate_proj", 0),
        ("up_proj", 0),
        ("o_proj", 1),
        ("down_proj", 1),
    )
    for stage in (0, 3):
        mesh = (Axis("tensor", 2), *TWO_HOSTS)
        yield (
            f"bf16-llama, tensor, stage {stage}",
            Case("bf16-llama", along_model_axes(RECIPES[stage]), mesh, cuts=cuts),
        )


CASES = dict(cases())


def bare(graph: Graph) -> Graph:
    """The graph without places in files."""
    return replace(graph, nodes=tuple(replace(n, origin=Origin(module=n.origin.module)) for n in graph.nodes))


def capture() -> None:
    """Capture the graphs anew."""
    import torch

    import small
    import zgraph
    from tests.interp import models

    tokens = torch.zeros(2, 8, dtype=torch.int64)
    torch.manual_seed(0)
    graphs = {name: models.captured(name) for name in ("tied", "convnet", "dynamic", "bf16", "llama")}
    graphs["mixed"] = models.captured("mixed stages")
    graphs["gpt2"] = zgraph.trace(small.gpt2(16, 2, 24), input_ids=tokens, labels=tokens)
    graphs["vit"] = zgraph.trace(small.vit(16, 1, inner=32, image_size=16), torch.zeros(2, 3, 16, 16))
    model = small.llama(16, 2, 24, num_heads=4, num_kv_heads=2, inner=32)
    graphs["bf16-llama"] = zgraph.trace(model, input_ids=tokens, labels=tokens, param_dtype=torch.bfloat16)
    graphs["wide"] = zgraph.trace(models.Wide(), torch.zeros(2, 16, dtype=torch.int64))
    FOLDER.mkdir(exist_ok=True)
    for name, graph in graphs.items():
        (FOLDER / f"{name}.zir").write_text(print_graph(bare(graph)))


def lines() -> dict[str, Any]:
    """All lines, by name."""
    placed = {name: searched(*what) for name, what in SEARCHED.items()}
    return {name: line(case) for name, case in CASES.items()} | placed


def write() -> None:
    """Write what comes out."""
    RESULTS.write_text(json.dumps(lines(), indent=1) + "\n")


if __name__ == "__main__":
    if "--results" not in sys.argv:
        capture()
    write()
