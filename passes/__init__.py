"""The passes, in one explicit tuple. Pure rewrites of graphs: no torch, no clock, no environment."""

from __future__ import annotations

from collections.abc import Mapping

from zgraph.passes.all_gather import AllGather
from zgraph.passes.all_reduce import AllReduce
from zgraph.passes.arena import Arena
from zgraph.passes.broadcast import Broadcast
from zgraph.passes.bucket import Bucket
from zgraph.passes.canonicalize import Canonicalize
from zgraph.passes.core.base import Context, Numerics, Pass
from zgraph.passes.core.pipeline import Pipeline
from zgraph.passes.core.recipes import MIXED, RECIPES, fusing
from zgraph.passes.dce import DeadCode
from zgraph.passes.fit import Fit
from zgraph.passes.fuse import Fuse
from zgraph.passes.host_copies import HostCopies
from zgraph.passes.keep import Keep
from zgraph.passes.offload import Offload
from zgraph.passes.partition import Partition
from zgraph.passes.plan.make_plan import make_plan
from zgraph.passes.prefetch import Prefetch
from zgraph.passes.recompute import Recompute
from zgraph.passes.reduce_scatter import ReduceScatter
from zgraph.passes.release import Release
from zgraph.passes.schedule import Schedule

ALL: tuple[type[Pass], ...] = (
    Canonicalize, Fuse, Partition, Recompute, Offload, Fit, Keep, Bucket, Broadcast, AllGather, ReduceScatter,
    AllReduce, HostCopies, Release, Prefetch, Schedule, DeadCode, Arena,
)  # fmt: skip

BY_NAME: Mapping[str, type[Pass]] = {kind.name: kind for kind in ALL}

__all__ = [
    "ALL", "BY_NAME", "MIXED", "RECIPES", "Arena", "Context", "Numerics", "Pass", "Pipeline", "fusing", "make_plan",
    "parse_recipe",
]  # fmt: skip


def parse_recipe(text: str) -> Pipeline:
    """The pipeline that a recipe writes. Raises RecipeError (with a caret) or ContractError."""
    return Pipeline.parse(text, BY_NAME)
