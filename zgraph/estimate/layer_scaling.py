"""A model captured in few layers, for figures of the whole.

Repeated layers are not captured one by one. The model is captured with two layers of each stack, and with one
more; every figure grows linearly from there, as the layers of a stack do the same. The first may differ from the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from zgraph.bridge.private_gpu import Capability
from zgraph.capture import trace
from zgraph.capture.layers import kinds_and_shapes, shortened, stacks
from zgraph.ir import Graph

FEW_LAYERS = 2


@dataclass(frozen=True)
class LayerSamples:
    """A model captured with few layers, and with one period more of each stack.

    Args:
        base: with `FEW_LAYERS` of each stack, or the first and one period, whichever is more.
        longer: for each stack, with one period more of it.
        missing: for each stack, how many periods the model has beyond the base.
    """

    base: Graph
    longer: tuple[Graph, ...]
    missing: tuple[int, ...]

    @property
    def members(self) -> tuple[Graph, ...]:
        return (self.base, *self.longer)

    def changed(self, change: Callable[[Graph], Graph]) -> LayerSamples:
        """The same change made to all members."""
        return replace(self, base=change(self.base), longer=tuple(map(change, self.longer)))

    def scale(self, figures: Sequence[float]) -> float:
        """A figure of the whole model from those of the members; never below zero."""
        base, *longer = figures
        return max(base + sum(n * (value - base) for n, value in zip(self.missing, longer, strict=True)), 0.0)

    def scale_by_key(self, figures: Sequence[Mapping[str, int]]) -> dict[str, int]:
        """Figures of the whole model under the names that any member has."""
        names = dict.fromkeys(name for f in figures for name in f)
        return {name: int(self.scale([f.get(name, 0) for f in figures])) for name in names}


def capture_samples(
    model: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    param_dtype: torch.dtype | None,
    capability: Capability | None = None,
) -> LayerSamples:
    """Capture a model in few layers: layers of one class, with parameters of the same shapes, count as repeated.

    Args:
        model: a module on any device; it is not changed.
        args, kwargs: what its forward is called with.
        param_dtype: dtype to compute in.
        capability: the GPU's that it is captured for; None for a processor.
    """

    def capture(lengths: Mapping[nn.Module, int]) -> Graph:
        with shortened(lengths):
            return trace(model, *args, param_dtype=param_dtype, capability=capability, **kwargs)

    found = stacks(model, kinds_and_shapes, (nn.ModuleList,))
    found = [s for s in found if len(s.layers) > s.length(FEW_LAYERS) + s.period]
    few: dict[nn.Module, int] = {s.layers: s.length(FEW_LAYERS) for s in found}
    longer = tuple(capture({**few, s.layers: few[s.layers] + s.period}) for s in found)
    missing = tuple((len(s.layers) - few[s.layers]) // s.period for s in found)
    return LayerSamples(capture(few), longer, missing)
