"""Keys of kept plans: a hash of a text of all that the passes read. Two plans of one key are the same text.

Passes are pure: what they make follows from the captured graph, the context, their own options, and their code. The
graph and the context are values with a text. The code is zgraph's own source, the packages that it computes with, and
torch, whose version says which ops there are. Options of `zgraph.compile` that no pass reads are in the key as well:
that costs a run of the passes, where leaving out one that matters would cost the truth.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import platform
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter
from torch.distributed.device_mesh import DeviceMesh

from zgraph.bridge.processor import processor
from zgraph.environment import environment, has_expandable_segments
from zgraph.ir import Graph, print_graph
from zgraph.ir.names import known_namespaces
from zgraph.options.settings import Settings
from zgraph.passes import Context, Pipeline
from zgraph.runfile.kept import FORMAT
from zgraph.version import package_versions

PACKAGES = ("networkx", "numpy", "pydantic", "scipy", "sympy", "torch")
"""Packages that passes compute with, and torch."""

APART = frozenset({"costs", "mesh", "pipeline", "record", "remark", "replayed", "save", "search"})
"""Settings that have a line of their own, or none: words for people, and files for whose sake no plan is kept."""

_CONTEXT = TypeAdapter(Context)


def settings_text(settings: Settings) -> str:
    """Text of the options of `zgraph.compile`, resolved: a line each."""
    lines = [
        f"{field.name} {_text(getattr(settings, field.name))}"
        for field in dataclasses.fields(settings)
        if field.name not in APART
    ]
    return "\n".join([*lines, f"mesh {_text(settings.mesh)}"])


def key_of(options: str, pipeline: Pipeline, context: Context, graph: Graph) -> str:
    """The key of what passes make of a graph.

    Args:
        options: see `settings_text`.
        pipeline: the passes; zgraph's own, see `foreign`.
        context: what they know.
        graph: as captured.
    """
    made = hashlib.sha256()
    for line in (*lines_of(options, pipeline, context), print_graph(graph)):
        made.update(f"{len(line)} {line}\n".encode())
    return made.hexdigest()


def foreign(pipeline: Pipeline) -> str:
    """The name of a pass that is not zgraph's own, whose code no key knows; empty if there is none."""
    return next((p.name for p in pipeline.passes if type(p).__module__.partition(".")[0] != "zgraph"), "")


def lines_of(options: str, pipeline: Pipeline, context: Context) -> Iterator[str]:
    """Lines of a key, but for the graph."""
    yield f"kept plan {FORMAT}"
    yield f"source {source_digest()}"
    yield from (f"{name} {version}" for name, version in _versions().items())
    yield f"processor {platform.machine()} {processor()}"
    yield f"namespaces {sorted(known_namespaces())}"
    yield f"ZGRAPH_DISABLE {sorted(environment().disable)}"
    yield f"ZGRAPH_ARENAS {environment().arenas}"
    yield f"expandable segments {has_expandable_segments()}"
    yield f"passes {pipeline.passes!r}"
    yield f"context {_CONTEXT.dump_json(context).decode()}"
    yield options


@cache
def _versions() -> Mapping[str, str]:
    return {**package_versions(PACKAGES, "missing"), "torch's source": str(torch.version.git_version)}


@cache
def source_digest() -> str:
    """A hash of zgraph's own files, which may change while its version does not."""
    made, root = hashlib.sha256(), Path(__file__).parents[1]
    for folder, folders, files in os.walk(root, followlinks=True):
        folders[:] = sorted(name for name in folders if name != "__pycache__")
        for path in (Path(folder, name) for name in sorted(files)):
            held = path.read_bytes()
            made.update(f"{path.relative_to(root)}\0{len(held)}\0".encode() + held)
    return made.hexdigest()


def _text(value: Any) -> str:
    """Text of a setting that is the same in each process and on each rank of a host."""
    if isinstance(value, torch.device):
        name = torch.cuda.get_device_name(value) if value.type == "cuda" else ""
        return f"{value.type} {name}"
    if isinstance(value, DeviceMesh):
        return f"{tuple(value.shape)} {value.mesh_dim_names}"
    if isinstance(value, Mapping):
        return str([(name, _text(each)) for name, each in value.items()])
    return repr(value)
