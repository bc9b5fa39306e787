"""Every reader of texts and files, with valid inputs to change: what the fuzz test runs."""

from __future__ import annotations

import io
import json
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from tests.passes.test_goldens import GOLDENS, Golden
from zgraph.codegen.spec import KernelSpec
from zgraph.cost import CostTable, hardware, load_table, simulate
from zgraph.cost.hardware import FOLDER, load
from zgraph.engine.config.read import read_config
from zgraph.ir import Axis, parse_graph, print_graph, verify
from zgraph.ir.lines import node_lines, read_line
from zgraph.ir.symbols import evaluate, parse_dim
from zgraph.passes import RECIPES, Context, fusing, make_plan, parse_recipe
from zgraph.runfile.diff import compare
from zgraph.runfile.explain import explain
from zgraph.runfile.format import MANIFEST, Provenance, Recording, RunFile, load_run

SMALL = """graph "small"
op aten.mm.default
op aten.relu.default
op py.mul
param %w: f32[8, 8] "w" stage=3 master=f64
input %x: f32[4, 8]
input %s: int(s0)
tangent %t: f32[4, 8]
fwd %n: int(2*s0 + 1) = py.mul(%s, 2)
fwd %h: f32[4, 8] = aten.mm.default(%x, %w) @ "layers.0" "model.py":3
fwd %y: f32[4, 8] = aten.relu.default(%h)
bwd %g: f32[4, 8] = aten.mm.default(%t, %w)
return fwd output %y
return bwd grad "x" %g
"""


@dataclass(frozen=True)
class Reader:
    """Something that reads what may come from anywhere.

    Args:
        read: what it does with it; raises a ZgraphError for what is not right.
        valid: inputs that are right.
    """

    read: Callable[[bytes], object]
    valid: tuple[bytes, ...]


def text(of: bytes) -> str:
    """Bytes as the text that an argument may be; what is no UTF-8 as surrogates, as the command line has it."""
    return of.decode(errors="surrogateescape")


@cache
def small_run() -> RunFile:
    """A run of a small graph, through all passes of stage 3."""
    graph = parse_graph(SMALL)
    context = Context(mesh=(Axis("shard", 4),), hints={"s0": 7}, costs=CostTable(hardware=hardware("h100")))
    recording = Recording(graph, sources={"model.py": {3: "h = x @ w"}})
    parse_recipe(RECIPES[3]).run(graph, context, [recording])
    return recording.run_file(Provenance(model="Small"), context)


def graph(of: bytes) -> object:
    """A graph's text: parsed, printed, verified, planned and simulated; and its lines as they are."""
    compare(of.decode(errors="replace"), of.decode(errors="replace"))
    found = parse_graph(of.decode(errors="replace"))
    assert parse_graph(print_graph(found)) == found
    verify(found)
    return simulate(make_plan(found), CostTable(hardware=hardware("h100")), {})


def lines(of: bytes) -> object:
    """A graph's lines as the commands that parse nothing read them."""
    return [read_line(line, key).origin for key, line in node_lines(of.decode(errors="replace")).items()]


def run(of: bytes) -> object:
    """A whole file: all of its graphs, its timeline, and an explanation."""
    found = load_run(io.BytesIO(of))
    for name in found.names:
        found.graph(name)
    return found.timeline, explain(found, "h")


def member(name: str) -> Callable[[bytes], object]:
    """A file in which one member is this."""

    def read(of: bytes) -> object:
        stream = io.BytesIO()
        with zipfile.ZipFile(io.BytesIO(packed())) as old, zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as new:
            for other in old.namelist():
                new.writestr(other, of if other == name else old.read(other))
        return load_run(stream).timeline

    return read


def timeline(of: bytes) -> object:
    return replace(small_run(), predicted=of).timeline


@cache
def packed() -> bytes:
    stream = io.BytesIO()
    small_run().save(stream)
    return stream.getvalue()


def in_file(read: Callable[[Path], object], suffix: str) -> Callable[[bytes], object]:
    """A reader of a path, given bytes."""

    def reader(of: bytes) -> object:
        with tempfile.NamedTemporaryFile(suffix=suffix) as file:
            file.write(of)
            file.flush()
            return read(Path(file.name))

    return reader


def costs(path: Path) -> object:
    """A profile, and what a step takes on it."""
    return simulate(make_plan(small_run().graph()), CostTable(hardware=load(path)), {"s0": 7})


SPECS = (
    b"rms 64: x bf16[M,N], w bf16[N] -> y bf16[M,N]; s = mul(x, x); y = mul(s, w)",
    b"silu_mul 64: x0 bf16[M,N], x1 bf16[M,N] -> t1 bf16[M,N]; t0 = mul(x0, 2.0); t1 = mul(t0, x1)",
)
CONFIGURATION = {
    "train_batch_size": 8,
    "train_micro_batch_size_per_gpu": 2,
    "gradient_accumulation_steps": 4,
    "zero_optimization": {"stage": 3},
    "bf16": {"enabled": True},
    "gradient_clipping": 1.0,
    "optimizer": {"type": "AdamW", "params": {"lr": 0.001, "betas": [0.9, 0.95], "weight_decay": 0.1}},
    "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 10}},
}


@cache
def readers() -> dict[str, Reader]:
    """All of them, by name."""
    found = small_run()
    goldens = tuple(g.after.encode() for g in map(Golden.read, sorted(GOLDENS)[:12]))
    tables = CostTable(hardware=hardware("2x8-h100"), ops={"a": 1.5}, groups={"a": {"aten": 2.0}})
    with zipfile.ZipFile(io.BytesIO(packed())) as archive:
        sources = archive.read("sources.json")
    profiles = tuple(p.read_bytes() for p in sorted(FOLDER.glob("*.toml"))[:4])
    recipes = (*RECIPES.values(), fusing(RECIPES[3]), "bucket(max_bytes=1KiB),dce")
    return {
        "graph": Reader(graph, (SMALL.encode(), found.texts[found.member("final")].encode(), *goldens)),
        "lines": Reader(lines, (SMALL.encode(), found.texts[found.member("final")].encode())),
        "run file": Reader(run, (packed(),)),
        MANIFEST: Reader(member(MANIFEST), (found.manifest.model_dump_json().encode(),)),
        "sources.json": Reader(member("sources.json"), (sources,)),
        "timeline.json": Reader(timeline, (found.predicted,)),
        "recipe": Reader(lambda of: str(parse_recipe(text(of))), tuple(r.encode() for r in recipes)),
        "hardware": Reader(lambda of: hardware(text(of)), (b"h100", b"16x8-a100-80", b"2x8-h100", b"none.toml")),
        "profile": Reader(in_file(costs, ".toml"), profiles),
        "cost table": Reader(in_file(load_table, ".json"), (tables.model_dump_json().encode(),)),
        "kernel": Reader(lambda of: str(KernelSpec.parse(text(of))), SPECS),
        "configuration": Reader(
            in_file(lambda path: read_config(path, world_size=1), ".json"), (json.dumps(CONFIGURATION).encode(),)
        ),
        "size": Reader(
            lambda of: evaluate(parse_dim(text(of)), {"s0": 1, "s1": 7}),
            (b"2*s0 + 1", b"Mod(s1, 8)", b"Max(1, floor(s0/2))", b"s0**3 - s1", b"ceiling(s0/(s1 + 1))", b"4096"),
        ),
    }
