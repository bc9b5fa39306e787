"""Capturing a deep model: a few of its layers are captured, and the rest extrapolated from them.

torch takes about a second for each layer. Where the layers of a stack repeat, the model is captured with two of
them, with three and with four, and the graph of all is read off these (`zgraph.capture.extrapolate`). It is the one
that capturing all of them gives, names of values included. Where the layers differ, or their graphs do, all are
captured.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any

import torch
from torch import nn

from zgraph.bridge.private_gpu import Capability
from zgraph.capture import trace
from zgraph.capture.extrapolate import Counts, extrapolate
from zgraph.capture.layers import shortened, stacks
from zgraph.errors import CaptureError, ZgraphError
from zgraph.ir import Graph, InputKind

FEWEST_LAYERS = (2, 3, 4)
"""With so many layers a model is captured first; with more where the first and the last are not as those between."""


def capture_deep(
    model: nn.Module,
    inputs: Mapping[str, Any],
    param_dtype: torch.dtype | None,
    capability: Capability | None = None,
) -> tuple[Graph, str]:
    """The graph of a training step, as `zgraph.trace` captures it, and how it was come by, in words.

    Args:
        model: on any device; it is not changed.
        inputs: what its forward is called with, by name.
        param_dtype: dtype to compute in.
        capability: the GPU's that it is captured for; None for a processor.

    Raises:
        GraphBreakError, CaptureError: as `zgraph.compile` does at the first call.
    """
    why = ""
    shallow = _Shallow(model, inputs, param_dtype, capability)
    for fewest in FEWEST_LAYERS:
        lengths = [stack.length(fewest) for stack in shallow.stacks]
        if not shallow.saves(lengths):
            break
        try:
            return shallow.extrapolated(lengths), shallow.described
        except Exception as error:  # a model may count on its number of layers, and fail in its own way
            said = next(iter(str(error).splitlines()), "")
            why = f": {said}" if isinstance(error, ZgraphError) and said else f": {type(error).__name__}: {said}"
    return trace(model, **inputs, param_dtype=param_dtype, capability=capability), f"whole{why}"


class _Shallow:
    """A model with a few layers of each stack."""

    def __init__(
        self,
        model: nn.Module,
        inputs: Mapping[str, Any],
        param_dtype: torch.dtype | None,
        capability: Capability | None,
    ) -> None:
        self.model, self.inputs, self.param_dtype, self.capability = model, inputs, param_dtype, capability
        self.stacks = [s for s in stacks(model) if s.length(FEWEST_LAYERS[-1]) + 2 * s.period < len(s.layers)]
        self.graphs: dict[tuple[int, ...], Graph] = {}

    def saves(self, lengths: Sequence[int]) -> bool:
        """Whether fewer layers are captured in all than the model has."""
        captured = sum(sum(self.longer(lengths, counts)) for counts in self.counts)
        return captured < sum(len(stack.layers) for stack in self.stacks)

    @property
    def counts(self) -> list[Counts]:
        """How many periods more of each stack are captured: none, one and two of each alone, and one of all."""
        return [c for c in product(range(3), repeat=len(self.stacks)) if sum(map(bool, c)) < 2 or set(c) == {1}]

    def longer(self, lengths: Sequence[int], counts: Counts) -> tuple[int, ...]:
        return tuple(n + more * s.period for n, more, s in zip(lengths, counts, self.stacks, strict=True))

    def extrapolated(self, lengths: Sequence[int]) -> Graph:
        """The graph of all layers. Raises CaptureError if that of a few does not tell it."""
        captured = {counts: self.capture(self.longer(lengths, counts)) for counts in self.counts}
        missing = (len(s.layers) - n for s, n in zip(self.stacks, lengths, strict=True))
        graph = extrapolate(captured, tuple(n // s.period for n, s in zip(missing, self.stacks, strict=True)))
        tensors = dict(self.model.named_parameters()) | dict(self.model.named_buffers())
        for entry in graph.inputs:
            if entry.kind in (InputKind.param, InputKind.buffer):
                if entry.target not in tensors or tensors[entry.target].shape != entry.value.tensor.shape:
                    raise CaptureError(f"{entry.target} is not what other layers have in its place")
        return graph

    def capture(self, lengths: tuple[int, ...]) -> Graph:
        if lengths not in self.graphs:
            with shortened(dict(zip((s.layers for s in self.stacks), lengths, strict=True))):
                self.graphs[lengths] = trace(
                    self.model, **self.inputs, param_dtype=self.param_dtype, capability=self.capability
                )
        return self.graphs[lengths]

    @property
    def described(self) -> str:
        """Description of what was captured, for people."""
        numbers = [sorted({lengths[n] for lengths in self.graphs}) for n in range(len(self.stacks))]
        return "with " + ", and ".join(
            f"{', '.join(map(str, few))} of {len(stack.layers)} layers"
            for few, stack in zip(numbers, self.stacks, strict=True)
        )
