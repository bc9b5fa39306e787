"""Which parameters of a model are the matrices of its experts, one behind the other."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from zgraph.errors import PlacementError

__all__ = ["experts_of"]

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
        raise PlacementError(
            f"{type(model).__name__} has no experts that can be divided over ranks: parameters of three dims, "
            "[experts, in, out], of a module with an attribute num_experts. Keep experts in such parameters, and not "
            "in a list of modules, and multiply by torch.nn.functional.grouped_mm; or leave expert_parallel= out"
        )
    for name, parameter in model.named_parameters():
        if name in found and parameter.shape[0] % num_ranks:
            raise PlacementError(
                f"{name} has {parameter.shape[0]} experts, which do not divide over {num_ranks} ranks; take an "
                f"expert_parallel= that divides {parameter.shape[0]}"
            )
    return found


def _named(model: nn.Module) -> Iterator[str]:
    for path, module in model.named_modules():
        counts = {count for key in _COUNTS if isinstance(count := getattr(module, key, None), int)}
        for name, parameter in module.named_parameters(path, recurse=False):
            if parameter.dim() == 3 and parameter.shape[0] in counts:
                yield name
