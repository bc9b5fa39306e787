"""Prediction of published steps by the path of the product: capture, recipe, schedule, simulation, update.

A model is captured with placeholder sizes, once for each kind of block, and read with each row's sizes
(`zgraph.estimate.placeholders`); layers beyond the third are counted, not captured (`zgraph.estimate.layer_scaling`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from statistics import fmean

import torch

from benchmarks.published.models import Sizes, Transformer
from benchmarks.published.rows import Row, at
from zgraph.codegen import library as _kernels  # noqa: F401 - registers the workspace of ops
from zgraph.cost import CostTable
from zgraph.cost.replay import Replay
from zgraph.cost.rest import at_rest
from zgraph.estimate.layer_scaling import LayerSamples, capture_samples
from zgraph.estimate.placeholders import with_sizes
from zgraph.estimate.stage_plan import Planner
from zgraph.ir import Axis, DType, Graph, Phase
from zgraph.passes import RECIPES, Context, make_plan, parse_recipe, recipe_for
from zgraph.passes.partition import Partition

BATCH, SEQUENCE, KV, GROUP, SIZE, INNER, VOCABULARY = 11, 13, 17, 41, 19, 23, 29
"""Primes that stand for sizes: the sequence in units of 32, the size of a head in units of 8."""

CAPABILITY = (8, 0)
"""Of a GPU whose attention is torch's flash attention; which kernel's rate it has, the row's table says."""


@dataclass(frozen=True)
class Part:
    """A step of one rank, as far as costs go, weighted: a row may be the mean of several.

    Args:
        weight: of it in the row.
        times: how often it runs in a step.
        missing: layers that the smallest captured model lacks.
        replays: of that model, and of one with a layer more.
    """

    weight: float
    times: int
    missing: int
    replays: tuple[Replay, Replay]

    def us(self, costs: CostTable) -> float:
        """Microseconds of all its runs in a step."""
        base, longer = (replay.step_us(costs) for replay in self.replays)
        return self.times * (base + self.missing * (longer - base))


@dataclass(frozen=True)
class Prediction:
    """Graph that was captured, placed and scheduled for a row; times are those of a cost table."""

    row: Row
    parts: tuple[Part, ...]
    master_bytes: int
    peak_bytes: float

    def step_s(self, costs: CostTable) -> float:
        """Seconds of a step with its update."""
        us = sum(part.weight * part.us(costs) for part in self.parts)
        return (us + costs.update_us(self.master_bytes)) / 1e6


def costs_of(row: Row) -> CostTable:
    """The costs of a row's hardware, with its attention kernel."""
    return CostTable(hardware=row.hardware, attention=row.attention)


def predicted(row: Row, costs: CostTable) -> Prediction:
    """Capture, place and schedule a row."""
    found: list[Part] = []
    kinds = {"none": ("none",), "full": ("full",), "ops": ("full",), "layers": ("none", "full")}[row.recomputed]
    for kind in kinds:
        samples = _marked(row, kind)
        missing = samples.missing[0]
        synced = Part(1 / len(kinds), 1, missing, _replays(row, samples, costs, row.num_ranks))
        if row.num_micro > 1 and row.stage < 2:
            alone = _replays(row, samples, costs, 1)
            found += [synced, Part(1 / len(kinds), row.num_micro - 1, missing, alone)]
        else:
            found.append(replace(synced, times=row.num_micro))
    placed = [Partition(stage=row.stage).run(g, _context(row, costs, row.num_ranks)) for g in samples.members]
    masters = samples.scale([at_rest(graph)["masters"] for graph in placed])
    peak_bytes = fmean(_peak_bytes(row, _marked(row, kind), costs) for kind in kinds) if row.memory[0] else 0.0
    return Prediction(row, tuple(found), int(masters), peak_bytes)


def _peak_bytes(row: Row, samples: LayerSamples, costs: CostTable) -> float:
    """The peak of a step, as `zgraph.plan` counts it where the budget is no limit: the logits are whole then.

    Where that of reserved memory was published it is that, in segments that do not grow.
    """
    planner = Planner(
        samples,
        row.num_ranks,
        costs,
        budget=1 << 50,
        host_budget=None,
        places=("",),
        moves=False,
        kernels="auto" if row.is_fused else "aten",
        compute="float8" if row.compute else None,
        reduce_dtype=DType(row.reduce_dtype) if row.reduce_dtype else None,
        accumulation=row.num_micro,
        num_copies=row.num_copies,
    )
    return planner.reserved_bytes(row.stage) if row.memory[1] == "reserved" else planner.peak_bytes(row.stage)


def _replays(row: Row, samples: LayerSamples, costs: CostTable, num_ranks: int) -> tuple[Replay, Replay]:
    context = _context(row, costs, num_ranks)
    recipe = recipe_for("triton" if row.is_fused else "aten", RECIPES[row.stage], row.compute or None)
    steps = parse_recipe(recipe)
    base, longer = (
        Replay.of(make_plan(steps.run(graph, context), only_step=True), context.hints) for graph in samples.members
    )
    return base, longer


def _context(row: Row, costs: CostTable, num_ranks: int) -> Context:
    mesh: tuple[Axis, ...] = (Axis("shard", num_ranks),) if num_ranks > 1 else ()
    if row.num_copies > 1 and num_ranks > 1:
        mesh = (Axis("replica", row.num_copies), Axis("shard", num_ranks // row.num_copies))
    reduce_dtype = DType(row.reduce_dtype) if row.reduce_dtype else None
    return Context(mesh=mesh, costs=costs, groups_calls=True, reduce_dtype=reduce_dtype)


def _marked(row: Row, checkpointed: str) -> LayerSamples:
    """The row's model, with the ops that it keeps."""
    samples = _samples(row, checkpointed)
    return samples.changed(_kept_ops) if row.recomputed == "ops" else samples


def _samples(row: Row, checkpointed: str) -> LayerSamples:
    sizes = at(row, checkpointed)
    values = {
        BATCH: row.batch,
        SEQUENCE: row.sequence // 32,
        KV: sizes.num_kv,
        GROUP: sizes.num_heads // sizes.num_kv,
        SIZE: sizes.hidden // sizes.num_heads // 8,
        INNER: sizes.inner,
        VOCABULARY: sizes.vocabulary,
    }
    kind = sizes.is_gated, sizes.num_kv < sizes.num_heads, sizes.has_bias, sizes.is_unfused, checkpointed
    samples = _captured(*kind).changed(lambda graph: with_sizes(graph, values))
    if not row.has_masters:
        samples = samples.changed(_without_masters)
    return replace(samples, missing=(sizes.num_layers - FEWEST,))


def _without_masters(graph: Graph) -> Graph:
    return replace(graph, inputs=tuple(replace(entry, master=None) for entry in graph.inputs))


FEWEST = 2
"""Layers of the smallest captured model."""


@cache
def _captured(is_gated: bool, is_grouped: bool, has_bias: bool, is_unfused: bool, checkpointed: str) -> LayerSamples:
    """A model with placeholder sizes, in two layers and in three."""
    num_heads = KV * GROUP if is_grouped else KV
    sequence = 32 * SEQUENCE
    sizes = Sizes(
        FEWEST + 2,
        8 * SIZE * num_heads,
        num_heads,
        KV,
        INNER,
        VOCABULARY,
        is_gated,
        sequence,
        has_bias,
        is_unfused,
        checkpointed,
    )
    with torch.device("meta"):
        model = Transformer(sizes)
        tokens = torch.zeros(BATCH, sequence, dtype=torch.int64)
        table = torch.zeros(sequence, 8 * SIZE, dtype=torch.bfloat16)
    return capture_samples(model, (tokens, tokens, table, table), {}, torch.bfloat16, CAPABILITY)


def _kept_ops(graph: Graph) -> Graph:
    """The graph with attention, and every second matmul of a layer, kept from what is computed again."""
    nodes, count = [], dict[str, int]()
    for node in graph.nodes:
        name = node.op.split(".")[1]
        if node.checkpoint and node.phase is Phase.forward:
            if name in ("mm", "addmm"):
                count[node.origin.layer] = count.get(node.origin.layer, 0) + 1
            if "attention" in name or (name in ("mm", "addmm") and count[node.origin.layer] % 2 == 0):
                node = replace(node, checkpoint=0)
        nodes.append(node)
    return graph.with_nodes(nodes)
