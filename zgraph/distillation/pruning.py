"""A student out of a teacher's own layers."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from zgraph.errors import UsageError
from zgraph.options.validate import ATTRIBUTE

_PER_LAYER = ("layer_types", "no_rope_layers", "mlp_layer_types", "attention_layers")
"""Entries of a configuration that have one value for each layer."""
_COUNTS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")


def prune_layers(model: nn.Module, keep: Iterable[int]) -> nn.Module:
    """A copy of a model of transformers with some of its layers, a student to begin with (Sanh et al., "DistilBERT",
    2019).

    Args:
        model: with a configuration, and one list of layers as long as that says. It is left as it is.
        keep: indices of the layers that stay, in any order; they keep their own.

    Raises:
        UsageError: there is no such list or more than one, or no such layer; the model is compiled; or its
            configuration cannot describe what is left.
    """
    if any(ATTRIBUTE in module.__dict__ for module in model.modules()):
        raise UsageError(f"this {type(model).__name__} is compiled already: prune the plain model, then compile it")
    config = getattr(model, "config", None)
    count = getattr(config, "num_hidden_layers", None)
    if not isinstance(count, int):
        raise UsageError(f"{type(model).__name__} has no config.num_hidden_layers: prune its layers by hand")
    names = [n for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == count]
    if len(names) != 1:
        raise UsageError(
            f"{type(model).__name__} has {len(names)} lists of {count} layers ({', '.join(names) or 'none'}): prune "
            "its layers by hand"
        )
    kept = sorted(set(keep))
    if not kept or not 0 <= kept[0] <= kept[-1] < count:
        raise UsageError(f"keep must name some of the layers 0 to {count - 1}, not {kept}")
    made = copy.deepcopy(model)
    layers: Any = made.get_submodule(names[0])
    parent, _, attribute = names[0].rpartition(".")
    setattr(made.get_submodule(parent), attribute, nn.ModuleList(layers[i] for i in kept))
    for number, index in enumerate(kept):
        for module in layers[index].modules():
            if getattr(module, "layer_idx", None) == index:
                module.layer_idx = number
    for found in {id(m.config): m.config for m in made.modules() if hasattr(m, "config")}.values():
        _shorten(found, kept, count)
    _check_described(made)
    return made


def _check_described(model: Any) -> None:
    """Raise UsageError if the configuration describes another model than its layers make, which none could load."""
    problem = "other parameters"
    try:
        with torch.device("meta"):
            again = type(model)(copy.deepcopy(model.config)).state_dict()
        same = {n: t.shape for n, t in again.items()} == {n: t.shape for n, t in model.state_dict().items()}
    except Exception as error:  # whatever the model's own code raises
        same, problem = False, f"{type(error).__name__}: {error}"
    if not same:
        raise UsageError(
            f"the configuration of {type(model).__name__} does not describe the layers that are left ({problem}): keep "
            "other layers, or prune its layers by hand"
        )


def _shorten(config: Any, kept: list[int], count: int) -> None:
    for name in _PER_LAYER:
        values = getattr(config, name, None)
        if isinstance(values, list) and len(values) == count:
            setattr(config, name, [values[i] for i in kept])
    for name in _COUNTS:
        if getattr(config, name, None) == count:
            setattr(config, name, len(kept))
