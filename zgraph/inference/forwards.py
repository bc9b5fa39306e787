"""Plain forwards by programs: one for each shape of the inputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import nn
from torch.utils import _pytree as pytree

from zgraph.errors import InferenceError, UsageError
from zgraph.inference.programs import Program, Programs

MAX_RECORDED = 8
"""Shapes of inputs whose forwards are recorded for a GPU to repeat: each recording keeps its memory."""

Rebuild = Callable[[list[torch.Tensor]], Any]
"""From the tensors of an output to the output, as the model gives it."""


class Inference:
    """A model's forwards by programs. See `zgraph.infer`.

    Args:
        model: gives the model, or None where it is gone.
        kind: of the model.
        programs: where its programs are.
        why_not: why it cannot generate.
    """

    def __init__(self, model: Callable[[], nn.Module | None], kind: str, programs: Programs, why_not: str = "") -> None:
        self.programs, self.kind = programs, kind
        self._model, self._why_not = model, why_not
        self._forwards: dict[object, tuple[Program, Rebuild]] = {}

    @property
    def weights_bytes(self) -> int:
        """Bytes of the weights as the programs read them."""
        return self.programs.weights_bytes

    @property
    def cuda_graphs(self) -> tuple[str, ...]:
        """Of each program that was to be recorded, what the GPU repeats, and what not and why."""
        return tuple(str(found) for found in self.programs.recordings)

    @torch.no_grad()
    def __call__(self, **inputs: Any) -> Any:
        """The model's forward in eval mode, without gradients, and without a cache.

        The first call with new shapes, dtypes or other values runs the model itself, too, for the form of its output.

        Args:
            inputs: tensors and plain values, by the names of the forward's arguments.

        Raises:
            UsageError: an input is of another kind, or the model is gone.
            InferenceError: the output has tensors that a program cannot give.
            GraphBreakError, CaptureError: the forward cannot be captured as one graph.
        """
        self.programs.refresh()
        tensors = {name: value for name, value in inputs.items() if isinstance(value, torch.Tensor)}
        others = {name: value for name, value in inputs.items() if name not in tensors}
        if wrong := [n for n, v in others.items() if not isinstance(v, bool | int | float | str | None)]:
            raise UsageError(
                f"{wrong[0]} is a {type(others[wrong[0]]).__name__}; pass tensors and plain values, by name"
            )
        key = (
            tuple((n, t.shape, t.dtype) for n, t in sorted(tensors.items())),
            tuple(sorted((n, repr(v)) for n, v in others.items())),
        )
        if key not in self._forwards:
            self._forwards[key] = self._captured(tensors, others)
        program, rebuild = self._forwards[key]
        return rebuild(program(tensors))

    def generate(self, *_: Any, **__: Any) -> NoReturn:
        """Refuse: the model has no cache of keys and values. Raises UsageError."""
        raise UsageError(f"{self.kind} cannot generate here: {self._why_not}")

    def _captured(self, tensors: dict[str, torch.Tensor], others: dict[str, Any]) -> tuple[Program, Rebuild]:
        model = self._model()
        if model is None:
            raise UsageError(f"the {self.kind} is gone, and these shapes were not captured yet; keep the model")
        was_training = model.training
        model.eval()
        try:
            leaves, form = pytree.tree_flatten(model(**tensors, **others))
            names = [*tensors]

            def forward(*given: torch.Tensor) -> list[torch.Tensor]:
                made = model(**dict(zip(names, given, strict=True)), **others)
                return [leaf for leaf in pytree.tree_leaves(made) if isinstance(leaf, torch.Tensor)]

            program = self.programs.program(
                model,
                forward,
                {name: t.detach().clone() for name, t in tensors.items()},
                f"forward-{len(self._forwards)}",
                {} if len(self._forwards) < MAX_RECORDED else None,
            )
        finally:
            model.train(was_training)
        at = [position for position, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)]
        if len(at) != len(program.outputs):
            raise InferenceError(
                f"{self.kind} gives {len(at)} tensors, of which a program gives {len(program.outputs)}: some are its "
                "inputs; ask for fewer outputs"
            )
        plain = [None if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]

        def rebuild(made: list[torch.Tensor]) -> Any:
            found = [*plain]
            for position, tensor in zip(at, made, strict=True):
                found[position] = tensor
            return pytree.tree_unflatten(found, form)

        return program, rebuild
