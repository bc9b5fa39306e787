"""Weights in integers for ranks that compute together: made of whole weights, before each rank takes its part."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from zgraph.codegen import quantised
from zgraph.errors import QuantisationError, UsageError
from zgraph.inference.calibration import Calibrate, rounded_integers
from zgraph.inference.layers import check_group, is_turned, kept_in, linear_layers, rows_of
from zgraph.inference.storage import is_stored, stored_integers, stored_wider
from zgraph.passes.analysis.integers import int8_of, integers_cut, integers_of
from zgraph.runtime.model_ranks import Cuts

Apart = tuple[dict[str, torch.Tensor], dict[str, Cuts]]
"""Whole integers and scales by their targets in graphs, and how ranks have them."""


@torch.no_grad()
def integers_apart(
    model: nn.Module, weights: str, group: int, calibrate: Calibrate, cuts: Mapping[str, Cuts], num_ranks: int
) -> Apart:
    """The integers of each linear layer and each table of embeddings, and how they are cut.

    They are those that one rank has. A scale of int8 is that of a whole row, also where ranks have some of its columns.

    Args:
        model: a causal language model.
        weights, group, calibrate: as of `zgraph.infer`.
        cuts: of parameters, by name.
        num_ranks: ranks along each axis.

    Raises:
        QuantisationError: groups of int4 do not divide a layer, or not over the ranks.
        UsageError: the inputs to calibrate with mean nothing, or the model's folder has layers in int8 as `wider` said.
    """
    names, kinds = {id(p): n for n, p in model.named_parameters()}, kept_in(model, weights)
    settled: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    if weights == "int4" and calibrate is not None:
        settled = rounded_integers(model, calibrate, group)
    elif weights == "int4":
        if wide := stored_wider(model):
            raise UsageError(
                f"{wide[0]} and {len(wide) - 1} more weights are in int8 in this folder, as wider= said, and "
                "tensor_parallel= would round them again: leave tensor_parallel= out, or write a folder without wider="
            )
        settled = stored_integers(model, group) if is_stored(model, group) else {}
    found, where = dict[str, torch.Tensor](), dict[str, Cuts]()
    layers: dict[str, Any] = linear_layers(model)
    tables = {n: m for n, m in model.named_modules() if isinstance(m, nn.Embedding)}
    for layer_name, layer in (layers | tables).items():
        name, in_int4 = names[id(layer.weight)], kinds.get(layer_name) == "int4"
        targets = integers_of(name) if in_int4 else int8_of(name)
        if targets[0] in found:
            continue  # the other name of a tied weight
        rows = rows_of(layer).contiguous()
        places = integers_cut(cuts.get(name, ()), is_turned=is_turned(layer), in_int4=in_int4)
        if in_int4:
            check_group(layer_name, rows, group)
            _check_parts(layer_name, rows, group, places[0], num_ranks)
            both = settled[name] if name in settled else _nearest(rows, group)
        else:
            both = quantised.to_int8(rows, 1)
        found |= zip(targets, both, strict=True)
        where |= zip(targets, places, strict=True)
    return found, where


def _nearest(rows: torch.Tensor, group: int) -> tuple[torch.Tensor, torch.Tensor]:
    integers, scales = quantised.nearest(rows, group)
    return quantised.in_pairs(integers), scales


def _check_parts(name: str, rows: torch.Tensor, group: int, cuts: Cuts, num_ranks: int) -> None:
    """Refuse a layer whose groups do not divide over ranks. Raises QuantisationError."""
    num_groups = rows.shape[1] // group
    for axis, place in cuts:
        if place.dim == 1 and not place.divides(num_groups, num_ranks):
            raise QuantisationError(
                f"{name} has {num_groups} groups of {group} columns, which do not divide over {num_ranks} ranks of "
                f'{axis}; take smaller groups, fewer ranks, or weights="int8"'
            )
