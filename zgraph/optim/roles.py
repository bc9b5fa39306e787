"""Roles of parameters in the model that holds them: matrices of hidden layers, and all else."""

from __future__ import annotations

import torch
from torch import nn

from zgraph.runtime.shards import slots_at_rest

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)


def hidden_matrices(model: nn.Module) -> set[int]:
    """The parameters, by their ids, that are matrices between two layers of hidden features.

    Those of two dimensions, and the weights of convolutions; but not what an embedding reads, nor what makes the
    output. That is what `get_output_embeddings()` returns (transformers), and every `lm_head`; where there is none of
    both, the last `nn.Linear`. A tied parameter has both roles.
    """
    at_the_ends = {id(m.weight) for m in model.modules() if isinstance(m, _EMBEDDINGS)}
    at_the_ends |= {id(p) for head in _heads(model) for p in head.parameters()}
    convolved = {id(m.weight) for m in model.modules() if isinstance(m, _CONVOLUTIONS)}
    return {id(p) for p in model.parameters() if p.dim() == 2 or id(p) in convolved} - at_the_ends


def _heads(model: nn.Module) -> list[nn.Module]:
    found = [m for name, m in model.named_modules() if name.rpartition(".")[2] == "lm_head"]
    of_transformers = getattr(model, "get_output_embeddings", None)
    head = of_transformers() if callable(of_transformers) else None
    if isinstance(head, nn.Module):
        found.append(head)
    layers: list[nn.Module] = [m for m in model.modules() if isinstance(m, nn.Linear)]
    return found or layers[-1:]


class Roles:
    """The roles of parameters of compiled models, by what `hidden_matrices` says of each model."""

    def __init__(self) -> None:
        found = slots_at_rest()
        self._slots = {key: slot for key, (_, slot) in found.items()}
        self._matrices = set[int]()
        for store in {store for store, _ in found.values()}:
            self._matrices |= hidden_matrices(store.model)

    def name(self, parameter: torch.Tensor) -> str | None:
        """The parameter's name in the model; None if no compiled model holds it."""
        slot = self._slots.get(id(parameter))
        return slot.name if slot is not None else None

    def is_matrix(self, parameter: torch.Tensor) -> bool | None:
        """Whether it is a matrix of a hidden layer; None if no compiled model holds it."""
        return id(parameter) in self._matrices if id(parameter) in self._slots else None
