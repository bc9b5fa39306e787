"""How each parameter of a model is cut for tensor parallelism: by patterns of names, or by a plan for its type."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from typing import Literal

from torch import nn
from torch.distributed.tensor import Placement, Replicate

from zgraph.bridge.private_dtensor import blocks_of
from zgraph.errors import UsageError, did_you_mean
from zgraph.ir import Shard

__all__ = ["Placements", "given", "planned"]

Placements = Mapping[str, Placement | str] | Literal["auto"]
"""From patterns of parameters' names to `Shard(dim)` or `Replicate()` of torch, or a graph's text of it: `S1/3` cuts
dim 1 in each of three blocks. `"auto"` searches for them."""

_TEXT = re.compile(r"S([0-9]{1,2})(?:/([0-9]{1,3}))?")

_STYLES: Mapping[str, tuple[Shard, Shard | None]] = {
    "colwise": (Shard(0), Shard(0)),
    "colwise_gather_output": (Shard(0), Shard(0)),
    "colwise_rep": (Shard(0), Shard(0)),
    "packed_colwise": (Shard(0, (1, 1)), Shard(0, (1, 1))),
    "rowwise": (Shard(1), None),
    "rowwise_split_input": (Shard(1), None),
}
"""Placements of a linear layer's weight and bias by the style that a plan of transformers has for it. A parameter that
is the matrices of many experts, one behind the other, has one dim before them."""

_GATHERED = ("colwise_gather_output", "colwise_rep")
"""Styles of layers whose output is needed whole: they stay so where their sizes do not divide."""

_BERT = {
    **dict.fromkeys(("*.attention.self.query.*", "*.attention.self.key.*", "*.attention.self.value.*"), "S0"),
    "*.intermediate.dense.*": "S0",
    "*.output.dense.weight": "S1",
}
_T5 = {
    **dict.fromkeys(("*Attention.q.weight", "*Attention.k.weight", "*Attention.v.weight"), "S0"),
    "*Attention.o.weight": "S1",
    "*.relative_attention_bias.weight": "S1",
    "*.DenseReluDense.wi*.weight": "S0",
    "*.DenseReluDense.wo.weight": "S1",
}

_OWN_PLANS: Mapping[str, Mapping[str, str]] = {
    "gpt2": {
        "*.attn.c_attn.weight": "S1/3",
        "*.attn.c_proj.weight": "S0",
        "*.mlp.c_fc.weight": "S1",
        "*.mlp.c_fc.bias": "S0",
        "*.mlp.c_proj.weight": "S0",
    },
    **dict.fromkeys(("bert", "roberta"), _BERT),
    **dict.fromkeys(("t5", "mt5"), _T5),
    "vit": {
        **dict.fromkeys(("*.attention.q_proj.*", "*.attention.k_proj.*", "*.attention.v_proj.*", "*.mlp.fc1.*"), "S0"),
        **dict.fromkeys(("*.attention.o_proj.weight", "*.mlp.fc2.weight"), "S1"),
    },
}
"""Megatron's placements for models that transformers has no plan for, by type; rows of GPT-2's weights are inputs."""


def given(model: nn.Module, placements: Mapping[str, Placement | str]) -> Iterator[tuple[str, Shard]]:
    """Placements by the user's patterns: the last that fits a name counts."""
    parameters = dict(model.named_parameters())
    found: dict[str, Shard | None] = {}
    for pattern, placement in placements.items():
        names = [name for name in parameters if fnmatchcase(name, pattern)]
        if not names:
            some = f"its parameters are {', '.join([*parameters][:6])}, ..."
            hint = did_you_mean(pattern.rpartition("*")[2].lstrip("."), parameters, some)
            raise UsageError(f"placements: no parameter of {type(model).__name__} is called {pattern}; {hint}")
        found |= {name: _read(pattern, placement, parameters[name].dim()) for name in names}
    return ((name, place) for name, place in found.items() if place is not None)


def _read(pattern: str, placement: Placement | str, rank: int) -> Shard | None:
    """A placement as the graph has it; None where the parameter stays whole."""
    if isinstance(placement, Replicate) or placement == "R":
        return None
    if isinstance(placement, str):
        if text := _TEXT.fullmatch(placement):
            return Shard(int(text[1]), (1,) * int(text[2] or 1))
    elif (cut := blocks_of(placement)) is not None:
        dim, blocks = cut
        return Shard(dim % rank if rank and -rank <= dim < rank else abs(dim), (1,) * blocks)
    raise UsageError(
        f"placements[{pattern!r}] must be Shard(dim) or Replicate() of torch.distributed.tensor, or a text such as "
        f'"S1" or "S1/3" (dim 1, in each of three blocks), not {placement!r}'
    )


def planned(model: nn.Module, num_ranks: int) -> Iterator[tuple[str, Shard]]:
    """Placements by the plan that transformers has for a model, or zgraph for it, with its vocabulary in parts.

    Args:
        model: the model.
        num_ranks: ranks that it is cut over.
    """
    kind = getattr(getattr(model, "config", None), "model_type", None)
    own = _OWN_PLANS.get(kind or "")
    found = dict(given(model, own) if own else _by_style(model, num_ranks))
    if found:
        yield from _vocabulary(model, num_ranks)
    yield from found.items()


def _by_style(model: nn.Module, num_ranks: int) -> Iterator[tuple[str, Shard]]:
    plan = getattr(model, "tp_plan", None)
    modules, parameters = dict(model.named_modules()), dict(model.named_parameters())
    for pattern, style in plan.items() if isinstance(plan, dict) else ():
        places = _STYLES.get(style)
        if places is None:
            continue
        for name, experts in parameters.items():
            if experts.dim() == 3 and _fits(pattern, name):
                yield name, Shard(places[0].dim + 1, places[0].blocks)
        for name in modules:
            if not isinstance(modules[name], nn.Linear) or not _fits(pattern, name):
                continue
            for key, place in zip(("weight", "bias"), places, strict=True):
                parameter = parameters.get(f"{name}.{key}")
                if parameter is None or place is None:
                    continue
                if style not in _GATHERED or place.divides(parameter.shape[place.dim], num_ranks):
                    yield f"{name}.{key}", place


def _vocabulary(model: nn.Module, num_ranks: int) -> Iterator[tuple[str, Shard]]:
    """Rows of the tables of words that a model reads and writes, tied or not: those that divide."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for getter in ("get_input_embeddings", "get_output_embeddings"):
        try:
            layer = getattr(model, getter)()
        except (AttributeError, NotImplementedError):
            continue
        is_table = isinstance(layer, nn.Embedding) and layer.max_norm is None and not layer.scale_grad_by_freq
        for parameter in (
            (layer.weight, getattr(layer, "bias", None)) if is_table or isinstance(layer, nn.Linear) else ()
        ):
            if parameter is not None and id(parameter) in names and parameter.shape[0] % num_ranks == 0:
                yield names[id(parameter)], Shard(0)


def _fits(pattern: str, name: str) -> bool:
    """Whether a name is one of a pattern of transformers, in which `*` is a number."""
    return re.fullmatch(re.escape(pattern).replace(r"\*", r"\d+"), name) is not None
