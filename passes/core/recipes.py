"""The recipe of each ZeRO stage: a line of text that a user can pass, edit and read back."""

from __future__ import annotations

import re
from collections.abc import Mapping

_LOWER = "broadcast,all-gather,reduce-scatter,all-reduce,host-copies"
"""Every stage lowers every kind of reshard: a scalar parameter is not sharded whatever the stage, so its gradient is
all-reduced."""

_KEEP = ("", "", "", "keep,")

RECIPES: Mapping[int, str] = {
    stage: f"canonicalize,partition(stage={stage}),fit,{_KEEP[stage]}bucket,{_LOWER},release,schedule,dce,arena"
    for stage in range(4)
}


def fusing(recipe: str, *, only_measured: bool = False) -> str:
    """The recipe with what is between matmuls in generated kernels; or with those that were measured to be fastest."""
    fuse = "fuse(only_measured=true)" if only_measured else "fuse"
    return recipe.replace("canonicalize,", f"canonicalize,{fuse},", 1)


def recipe_for(kernels: str, recipe: str) -> str:
    """A stage's own recipe, for what runs the ops between collectives: a word that `zgraph.compile` takes.

    The backward makes views of the forward's values again: a value that is kept costs the host more than a view.
    """
    recipe = re.sub(r"partition\(stage=(\d)\)", r"partition(stage=\1,repeat_views=true)", recipe)
    return fusing(recipe, only_measured=kernels == "auto") if kernels in ("triton", "auto") else recipe


MIXED = RECIPES[3]
"""For a stage given per parameter: what `partition` is told counts for no parameter then."""
