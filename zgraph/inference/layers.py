"""Linear layers of a model: their weights by rows, and the integers that these are kept in."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from zgraph.errors import QuantisationError
from zgraph.passes.quantise import GROUPS, INT4_ROWS, Quantise

Hook = Callable[[str, Any, torch.Tensor], torch.Tensor | None]
"""From a layer's name, the layer, and its inputs [rows, columns] to its output without bias, [rows, outputs]; or None,
which leaves the output as it is."""


def is_turned(module: nn.Module) -> bool:
    """Whether a layer is GPT-2's, whose weight is [columns, outputs]."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def linear_layers(model: nn.Module) -> dict[str, Any]:
    """The linear layers of a model by name."""
    return {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) or is_turned(m)}


def rows_of(layer: Any) -> torch.Tensor:
    """A layer's weight, [outputs, columns]."""
    weight: torch.Tensor = layer.weight.detach()
    return weight.t() if is_turned(layer) else weight


def kept_in(model: nn.Module, weights: str) -> dict[str, str]:
    """The integers that the weight of each linear layer is kept in, by the layer's name."""
    wider = Quantise().wider.split("+")
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    return {
        name: "int8" if name.rpartition(".")[2] in wider or id(layer.weight) in tables else weights
        for name, layer in linear_layers(model).items()
    }


def check_group(name: str, rows: torch.Tensor, group: int) -> None:
    """Refuse a layer that groups of int4 do not divide. Raises QuantisationError."""
    outputs, columns = rows.shape
    if columns % group or outputs % INT4_ROWS:
        fits = [g for g in GROUPS if columns % g == 0 and outputs % INT4_ROWS == 0]
        remedy = f"take groups of {max(fits)}" if fits else "take int8"
        raise QuantisationError(
            f"{name} has {outputs} outputs, of which {INT4_ROWS} go together, and {columns} columns, which groups of "
            f"{group} do not divide; {remedy}"
        )


@contextmanager
def watched(model: nn.Module, hook: Hook) -> Iterator[None]:
    """A model that tells what its linear layers are given."""

    def told(name: str) -> Any:
        def forward(layer: Any, given: Any, named: Any, output: torch.Tensor) -> torch.Tensor | None:
            x: torch.Tensor = given[0] if given else next(iter(named.values()))
            made = hook(name, layer, x.detach().reshape(-1, x.shape[-1]))
            if made is None:
                return None
            if layer.bias is not None:
                made = made + layer.bias
            return made.view_as(output).to(output.dtype)

        return forward

    handles = [
        layer.register_forward_hook(told(name), with_kwargs=True) for name, layer in linear_layers(model).items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
