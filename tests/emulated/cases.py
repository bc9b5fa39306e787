"""The cases of training that tests run: of each kind some, and many drawn by a seed."""

from __future__ import annotations

import random
from typing import Any

from tests.emulated.case import Case

ARENA = ",broadcast,all-gather,reduce-scatter,all-reduce,host-copies,release,schedule,dce,arena(always=true)"
GROUPED = ARENA.replace("all-gather", "all-gather(grouped=true)").replace(
    "reduce-scatter", "reduce-scatter(grouped=true)"
)
BUCKETS = "bucket(max_bytes=100000,pack_below_bytes=50000)"
MOVES = "offload(num_bytes=1000000)"
BF16 = {"param_dtype": "bf16"}
QUICK = {"quick_link": "h100"}


def recipe(stage: int, *passes: str, tail: str = ARENA) -> dict[str, Any]:
    """Options of a recipe with these passes between partition and lowering."""
    return {"passes": ",".join(["canonicalize", f"partition(stage={stage})", *passes]) + tail, "stage": stage}


CASES: dict[str, Case] = {
    **{f"stage {stage}": Case(options={"stage": stage}) for stage in range(4)},
    **{f"stage {s}, 3 micro-steps": Case(options={"stage": s}, num_micro_steps=3) for s in range(4)},
    **{f"stage {stage}, arena": Case(options=recipe(stage)) for stage in range(4)},
    **{f"stage {stage}, buckets": Case(options=recipe(stage, BUCKETS)) for stage in range(4)},
    **{f"stage {s}, grouped": Case(net="deep", options=recipe(s, BUCKETS, tail=GROUPED)) for s in range(1, 4)},
    "stage 3, grouped, 2 micro-steps": Case(options=recipe(3, BUCKETS, tail=GROUPED), num_micro_steps=2),
    "stage 1, arena, 2 micro-steps": Case(options=recipe(1), num_micro_steps=2),
    **{f"grid, stage {s}": Case(options={"stage": s}, num_shards=2, num_copies=2) for s in range(4)},
    "grid, 2 micro-steps": Case(num_shards=2, num_copies=2, num_micro_steps=2),
    "grid, buckets": Case(options=recipe(3, BUCKETS, tail=GROUPED), num_shards=2, num_copies=2),
    "grid, uneven": Case(net="odd", num_shards=2, num_copies=2),
    "uneven": Case(net="odd"),
    "uneven over three": Case(net="odd", num_shards=3, num_micro_steps=2),
    "tied": Case(net="tied"),
    "attention": Case(net="attending"),
    "attention, arena": Case(net="attending", options=recipe(3)),
    "bf16": Case(options=BF16),
    "one rank": Case(num_shards=1),
    **{
        f"offload {what}, stage {stage}": Case(options={"stage": stage, "offload": what})
        for what in ("optimizer", "parameters")
        for stage in (0, 1, 3)
    },
    "offload optimizer in bf16": Case(options={"offload": ("optimizer", "activations"), **BF16}),
    "offload parameters in bf16": Case(options={"offload": "parameters", **BF16}),
    "offload parameters, 2 micro-steps": Case(options={"offload": "parameters"}, num_micro_steps=2),
    "offload parameters, arena": Case(options={**recipe(3), "offload": "parameters"}),
    "offload parameters, grouped": Case(options={**recipe(3, BUCKETS, tail=GROUPED), "offload": "parameters"}),
    "offload parameters on a grid": Case(options={"offload": "parameters"}, num_shards=2, num_copies=2),
    "offload optimizer, 3 micro-steps": Case(options={"offload": "optimizer", "stage": 1}, num_micro_steps=3),
    "offload activations": Case(net="deep", num_rows=256, options={**recipe(3, MOVES), **QUICK}),
    "offload activations, grouped": Case(
        net="deep", num_rows=256, options={**recipe(3, MOVES, BUCKETS, tail=GROUPED), **QUICK}
    ),
    "offload activations, one rank": Case(
        net="deep", num_rows=256, num_shards=1, options={**recipe(0, MOVES), **QUICK}
    ),
    "offload activations by a budget": Case(
        net="deep",
        num_rows=1024,
        options={"offload": "activations", "recompute": False, "memory_budget": "6000KB"},
    ),
    "offload all": Case(
        net="deep",
        num_rows=256,
        options={**recipe(3, MOVES), **QUICK, "offload": ("parameters", "activations")},
    ),
    "offload optimizer, evaluated": Case(options={"offload": "optimizer"}, evaluates=True),
    "offload parameters, evaluated": Case(options={"offload": "parameters"}, evaluates=True),
    "offload parameters, evaluated, one rank": Case(num_shards=1, options={"offload": "parameters"}, evaluates=True),
    "averaged by the optimizer, stage 0": Case(options={"stage": 0}, syncs=False, num_micro_steps=2),
    "averaged by the optimizer, stage 1": Case(options={"stage": 1}, syncs=False, num_micro_steps=2),
    "run eagerly": Case(options={"fullgraph": "eager"}, num_micro_steps=2),
    "states on the host": Case(optimizer={"state": "host", "chunk_bytes": 8192}),
    "states on the host, one rank": Case(num_shards=1, optimizer={"state": "host", "chunk_bytes": 8192}),
    "states on the host, offloaded parameters": Case(
        options={"offload": "parameters"}, optimizer={"state": "host", "chunk_bytes": 8192}
    ),
    "states on the host, updated there": Case(
        options={"offload": "optimizer"}, optimizer={"state": "host", "update": "host"}
    ),
    "masters on the host, updated on the device": Case(
        options={"offload": "optimizer"}, optimizer={"update": "device", "chunk_bytes": 8192}
    ),
    "states on disk": Case(optimizer={"state": "disk", "access": "direct", "chunk_bytes": 8192}),
    "states on disk, mapped": Case(optimizer={"state": "disk", "access": "mapped", "chunk_bytes": 8192}),
    "states on disk, updated on the host": Case(
        options={"offload": "optimizer"}, optimizer={"state": "disk", "access": "direct", "chunk_bytes": 8192}
    ),
    "own optimizer": Case(optimizer={}),
    "kernels": Case(net="attending", options={"kernels": "triton"}, num_rows=8, num_steps=2),
    "kernels, one rank": Case(num_shards=1, options={"kernels": "triton"}, num_rows=8, num_steps=2),
    "kernels in the optimizer": Case(optimizer={"kernels": "triton"}, num_rows=8),
}
"""By name."""


def drawn(seed: int) -> Case:
    """A case drawn by a seed."""
    draw = random.Random(1000 + seed)
    stage = draw.randrange(4)
    num_shards, num_copies = draw.choice(((1, 1), (2, 1), (3, 1), (4, 1), (4, 1), (2, 2)))
    options: dict[str, Any] = {"stage": stage}
    if draw.random() < 0.7:
        between = [BUCKETS] if draw.random() < 0.5 else []
        if draw.random() < 0.3:
            between = [f"offload(num_bytes={draw.choice((500, 5000, 50000))})", *between]
        options = recipe(stage, *between, tail=draw.choice((ARENA, GROUPED, ARENA.replace(",arena(always=true)", ""))))
        options |= QUICK
    elif draw.random() < 0.5:
        options["recompute"] = True
    if draw.random() < 0.4:
        options["offload"] = draw.choice(("optimizer", "parameters"))
    optimizer = draw.choice((None, None, {}, {"state": "host", "chunk_bytes": 4096}))
    return Case(
        net=draw.choice((f"drawn-{seed}", f"drawn-{seed}", "odd", "residual", "tied")),
        options=options,
        num_shards=num_shards,
        num_copies=num_copies,
        num_micro_steps=draw.choice((1, 1, 2, 3)),
        optimizer=optimizer,
    )


OFTEN = (
    "stage 3",
    "stage 1, 3 micro-steps",
    "stage 2, 3 micro-steps",
    "stage 3, arena",
    "stage 0, buckets",
    "stage 3, grouped, 2 micro-steps",
    "grid, stage 3",
    "grid, buckets",
    "uneven over three",
    "bf16",
    "one rank",
    "offload optimizer, stage 1",
    "offload optimizer, 3 micro-steps",
    "offload parameters, stage 0",
    "offload parameters, 2 micro-steps",
    "offload parameters, grouped",
    "offload parameters on a grid",
    "offload activations",
    "offload activations by a budget",
    "offload all",
    "offload parameters, evaluated, one rank",
    "averaged by the optimizer, stage 1",
    "run eagerly",
    "states on the host",
    "masters on the host, updated on the device",
    "states on disk",
    "states on disk, updated on the host",
    "kernels, one rank",
)
"""Those that `make test` runs; `make test-deep` runs all."""
