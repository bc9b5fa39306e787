"""The recipe of each ZeRO stage: a line of text that a user can pass, edit and read back."""

from __future__ import annotations

from collections.abc import Mapping

RECIPES: Mapping[int, str] = {
    0: "canonicalize,partition(stage=0),bucket,broadcast,all-reduce,prefetch,dce",
    1: "canonicalize,partition(stage=1),bucket,broadcast,all-gather,reduce-scatter,release,prefetch,dce",
    2: "canonicalize,partition(stage=2),bucket,broadcast,all-gather,reduce-scatter,release,prefetch,dce",
    3: "canonicalize,partition(stage=3),bucket,broadcast,all-gather,reduce-scatter,release,prefetch,dce",
}

MIXED = "canonicalize,partition,bucket,broadcast,all-gather,reduce-scatter,all-reduce,release,prefetch,dce"
"""For a stage given per parameter."""
