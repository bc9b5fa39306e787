"""Which parameters of a model are the matrices of its experts, one behind the other, and what batch these are given."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from zgraph.errors import PlacementError
from zgraph.runtime.alike import is_of_rows, rows_of

__all__ = ["experts_of", "of_all_ranks"]

_COUNTS = ("num_experts", "num_local_experts")
"""Attributes by which a module says how many experts its parameters have."""


def experts_of(model: nn.Module, num_ranks: int) -> frozenset[str]:
    """Names of the parameters that have a matrix for each expert of their module.

    They are those of three dims, [experts, ...], of modules that say how many experts they have.

    Args:
        model: the model.
        num_ranks: ranks that share the experts.

    Raises:
        PlacementError: there are none, or they do not divide.
    """
    found = frozenset(_named(model))
    if not found:
        listed = next(_listed(model), "")
        instead = f"; {listed} is a list of modules" if listed else ""
        raise PlacementError(
            f"{type(model).__name__} has no experts that can be divided over ranks: parameters of three dims, "
            f"[experts, in, out], of a module with an attribute num_experts{instead}. Keep experts in such parameters, "
            "and not in a list of modules, as transformers 5 does, and multiply by torch.nn.functional.grouped_mm; or "
            "leave expert_parallel= out"
        )
    for name, parameter in model.named_parameters():
        if name in found and parameter.shape[0] % num_ranks:
            raise PlacementError(
                f"{name} has {parameter.shape[0]} experts, which do not divide over {num_ranks} ranks; take an "
                f"expert_parallel= that divides {parameter.shape[0]}"
            )
    return found


def _listed(model: nn.Module) -> Iterator[str]:
    """Paths of lists of modules that are experts, by their name."""
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) > 1 and "expert" in path.rpartition(".")[2].lower():
            yield path


def _named(model: nn.Module) -> Iterator[str]:
    for path, module in model.named_modules():
        counts = {count for key in _COUNTS if isinstance(count := getattr(module, key, None), int)}
        for name, parameter in module.named_parameters(path, recurse=False):
            if parameter.dim() == 3 and parameter.shape[0] in counts:
                yield name


def of_all_ranks(
    args: Sequence[Any], kwargs: Mapping[str, Any], num_ranks: int
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments of a forward where ranks that share experts put their batches together.

    Args:
        args, kwargs: what it is called with on one of them. Tensors with as many rows as `input_ids`, else as the
            first, have a batch's.
        num_ranks: ranks that share experts, each with as many rows.
    """
    given = tuple(args), dict(kwargs)
    if num_ranks == 1:
        return given
    num_rows = rows_of(given)

    def joined(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.repeat(num_ranks, *[1] * (tensor.dim() - 1)) if is_of_rows(tensor, num_rows) else tensor

    found: tuple[tuple[Any, ...], dict[str, Any]] = pytree.tree_map_only(torch.Tensor, joined, given)
    return found
