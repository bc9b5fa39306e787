"""The passes: pure rewrites of graphs. No torch, no clock, no environment."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from zgraph.errors import RecipeError
from zgraph.passes.all_gather import AllGather
from zgraph.passes.all_reduce import AllReduce
from zgraph.passes.arena import Arena
from zgraph.passes.broadcast import Broadcast
from zgraph.passes.bucket import Bucket
from zgraph.passes.canonicalize import Canonicalize
from zgraph.passes.code_gathers import CodeGathers
from zgraph.passes.compress import Compress
from zgraph.passes.core.base import Context, Numerics, Pass
from zgraph.passes.core.pipeline import Pipeline
from zgraph.passes.core.recipes import COMPUTES, MIXED, RECIPES, along_model_axes, compressing, fusing, recipe_for
from zgraph.passes.core.registry import build_in, known_passes, register_pass
from zgraph.passes.dce import DeadCode
from zgraph.passes.exchange import Exchange
from zgraph.passes.fit import Fit
from zgraph.passes.float8 import Float8
from zgraph.passes.float8_gathers import Float8Gathers
from zgraph.passes.fuse import Fuse
from zgraph.passes.grouped_heads import GroupedHeads
from zgraph.passes.host_copies import HostCopies
from zgraph.passes.in_place import InPlace
from zgraph.passes.keep import Keep
from zgraph.passes.offload import Offload
from zgraph.passes.partition import Partition
from zgraph.passes.place import Place
from zgraph.passes.plan.make_plan import make_plan
from zgraph.passes.quantise import Quantise
from zgraph.passes.recompute import Recompute
from zgraph.passes.reduce_scatter import ReduceScatter
from zgraph.passes.release import Release
from zgraph.passes.schedule import Schedule

ALL: tuple[type[Pass], ...] = (
    Canonicalize,
    Float8,
    Place,
    Fuse,
    Partition,
    Recompute,
    Offload,
    Fit,
    Keep,
    Bucket,
    Float8Gathers,
    CodeGathers,
    Compress,
    Exchange,
    Broadcast,
    AllGather,
    ReduceScatter,
    AllReduce,
    HostCopies,
    Release,
    Schedule,
    DeadCode,
    Arena,
    InPlace,
    Quantise,
    GroupedHeads,
)

BY_NAME: Mapping[str, type[Pass]] = {kind.name: kind for kind in ALL}
"""Zgraph's own; `known_passes` has those of others, too."""

build_in(ALL)

__all__ = [
    "ALL",
    "BY_NAME",
    "COMPUTES",
    "MIXED",
    "RECIPES",
    "Arena",
    "Context",
    "Numerics",
    "Pass",
    "Pipeline",
    "along_model_axes",
    "compressing",
    "fusing",
    "known_passes",
    "make_plan",
    "parse_recipe",
    "pipeline_of",
    "recipe_for",
    "register_pass",
]


def parse_recipe(text: str) -> Pipeline:
    """The pipeline that a recipe writes. Raises RecipeError (with a caret) or ContractError."""
    return Pipeline.parse(text, known_passes())


def pipeline_of(passes: str | Pipeline | Sequence[Pass]) -> Pipeline:
    """The pipeline of a recipe's text, of passes in order, or itself.

    Raises:
        RecipeError: the text does not parse, or what is in the sequence is no pass.
        ContractError: the passes do not fit together.
    """
    if isinstance(passes, str):
        return parse_recipe(passes)
    steps = passes.passes if isinstance(passes, Pipeline) else tuple(passes)
    for step in steps:
        if not isinstance(step, Pass):
            what = f"the class {step.__name__}; call it" if isinstance(step, type) else f"a {type(step).__name__}"
            raise RecipeError(f"a sequence of passes holds instances of zgraph.passes.Pass, not {what}")
    pipeline = Pipeline(steps)
    pipeline.check()
    return pipeline
