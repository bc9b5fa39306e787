"""The recipe of each ZeRO stage: a line of text that a user can pass, edit and read back."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

_LOWER = "broadcast,all-gather,reduce-scatter,all-reduce,host-copies"
"""Every stage lowers every kind of reshard: a scalar parameter is not sharded whatever the stage, so its gradient is
all-reduced."""

_KEEP = ("", "", "", "keep,")

RECIPES: Mapping[int, str] = {
    stage: f"canonicalize,partition(stage={stage}),fit,{_KEEP[stage]}bucket,{_LOWER},release,schedule,dce,arena"
    for stage in range(4)
}

COMPUTES: Mapping[str, str] = {"float8": "float8", "float8-rowwise": "float8(recipe=rowwise)"}
"""The pass for each word of `compute`."""


EXACT: Mapping[str, str] = {"exact": "auto", "delta": "delta", "exponent": "exponent"}
"""The codec of `code-gathers` for each word of `compress` that stands for exact codes."""


def fusing(recipe: str, *, only_measured: bool = False) -> str:
    """The recipe with what is between matmuls in generated kernels; or with those that were measured to be fastest."""
    fuse = "fuse(only_measured=true)" if only_measured else "fuse"
    return recipe.replace("canonicalize,", f"canonicalize,{fuse},", 1)


def recipe_for(kernels: str, recipe: str, compute: str | None = None) -> str:
    """A stage's own recipe, for what runs the ops between collectives: a word that `zgraph.compile` takes.


    Args:
        kernels: the word.
        recipe: of the stage.
        compute: what matrices are multiplied in, as `zgraph.compile` takes it.
    """
    recipe = fusing(recipe, only_measured=kernels == "auto") if kernels in ("triton", "auto") else recipe
    if compute is None:
        return recipe
    recipe = recipe.replace("broadcast,", "float8-gathers,broadcast,") if compute == "float8" else recipe
    return recipe.replace("canonicalize,", f"canonicalize,{COMPUTES[compute]},")


def compressing(recipe: str, gradients: str, parameters: str = "") -> str:
    """The recipe with codes on the wire in the place of numbers.

    Args:
        recipe: of a stage.
        gradients: the text of their codec; "auto" leaves it to the costs which. Empty for none.
        parameters: likewise; "exact" leaves it to the costs which of the exact codecs.
    """
    made = [f"code-gathers(codec={EXACT[parameters]}),"] if parameters in EXACT else []
    lossy = "" if parameters in EXACT else parameters
    if gradients or lossy:
        more = f",parameters={lossy}" if lossy else ""
        made.append(f"compress(gradients={gradients or 'none'}{more}),")
    return recipe.replace("broadcast,", f"{''.join(made)}broadcast,")


def along_model_axes(
    recipe: str, axes: Sequence[str] = ("tensor",), *, sequence: bool = False, searches: str = ""
) -> str:
    """The recipe with values placed along the axes along which ranks compute together, of which no kernels are made.

    Args:
        recipe: of a stage.
        axes: the axes.
        sequence: whether activations between blocks are cut along the sequence, over the ranks of tensor parallelism.
        searches: what `place` searches there: nothing, `values`, or with parameters `all`.
    """
    tensor = f"place(search={searches})" if searches else "place(sequence=true)" if sequence else "place"
    steps = ",".join(tensor if axis == "tensor" else f"place(axis={axis})" for axis in axes)
    recipe = re.sub(r"fuse(\([^)]*\))?,", "", recipe)
    return recipe.replace("canonicalize,", f"canonicalize,{steps},").replace("broadcast,", "exchange,broadcast,")


MIXED = RECIPES[3]
"""For a stage given per parameter: what `partition` is told counts for no parameter then."""
