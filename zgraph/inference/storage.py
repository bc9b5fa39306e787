"""A model with its weights in integers, in a folder: safetensors, with its configuration beside them.

A weight `NAME` is there as `NAME.int8` [outputs, columns] with `NAME.scale` [outputs, 1]; or as `NAME.int4`, uint8
[outputs, columns / 2], even columns in the lower four bits, with `NAME.scales`, bf16 [columns / group, outputs, 2].
Everything else is as it was. Reading runs nothing of the folder's.
"""

from __future__ import annotations

import json
import weakref
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from zgraph.codegen import quantised
from zgraph.errors import UsageError
from zgraph.inference.calibration import Calibrate, check_wider, left_wide, rounded_integers
from zgraph.inference.layers import check_group, is_turned, kept_in, linear_layers, rows_of

FILE = "model.zgraph.safetensors"
KEY = "zgraph.weights"

Int4 = tuple[torch.Tensor, torch.Tensor]
"""Integers, two in a byte, uint8 [outputs, columns / 2], and scales, bf16 [columns / group, outputs, 2]."""

_STORED: weakref.WeakKeyDictionary[nn.Module, tuple[int, dict[str, Int4]]] = weakref.WeakKeyDictionary()
"""The group and the int4 by the weight's name of each model that was read from a folder."""


def save_quantised(
    model: nn.Module,
    folder: Path,
    *,
    weights: str,
    group: int = 64,
    calibrate: Calibrate = None,
    wider: float = 0.0,
) -> dict[str, str]:
    """Write a model's linear layers and embeddings as integers, and the rest as it is.

    Args:
        model: a causal language model of transformers.
        folder: where to; made if it is not there.
        weights, group: as of `zgraph.infer`.
        calibrate: what int4 is calibrated with, as there; None rounds to the nearest.
        wider: share of the weights in int4 that stay in int8, as there.

    Returns:
        What each weight is kept in, by its name.

    Raises:
        QuantisationError: a layer's columns or outputs do not fit the integers.
        UsageError: there is something to calibrate with, and nothing to calibrate; or `wider` means nothing.
    """
    if calibrate is not None and weights != "int4":
        raise UsageError('calibrate= is for weights="int4"; leave it out')
    check_wider(wider, weights, calibrate)
    settled = rounded_integers(model, calibrate, group, wider) if calibrate is not None else {}
    kept, held = _kept_in(model, weights), dict[str, torch.Tensor]()
    if calibrate is not None:
        kept |= {f"{n}.weight": ("int8", kept[f"{n}.weight"][1]) for n in left_wide(model, settled)}
    done: set[int] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) in done:
            continue  # the other name of a tied weight
        done.add(id(tensor))
        whole = tensor.detach()
        if name not in kept:
            held[name] = whole.contiguous()
        elif kept[name][0] == "int8":
            held[f"{name}.int8"], held[f"{name}.scale"] = quantised.to_int8(_turned(whole, kept[name][1]), 1)
        else:
            rows = _turned(whole, kept[name][1])
            check_group(name, rows, group)
            held[f"{name}.int4"], held[f"{name}.scales"] = settled[name] if name in settled else _nearest(rows, group)
    folder.mkdir(parents=True, exist_ok=True)
    about = {"weights": weights, "group": group, "turned": sorted(n for n in kept if kept[n][1])}
    save_file(held, folder / FILE, {KEY: json.dumps(about), "format": "pt"})
    model.config.save_pretrained(folder)  # type: ignore[operator, union-attr]
    return {name: kind for name, (kind, _) in kept.items()}


def load_quantised(folder: Path) -> tuple[nn.Module, str, int]:
    """A plain model with the numbers that the integers of a folder stand for, in fp32, what they were, and the group.

    `zgraph.infer` with the same `weights` and `group` takes the very integers of the folder, as long as the weights are
    what was read.

    Raises:
        UsageError: the folder has no such file, it does not fit its own configuration, or it is damaged.
    """
    import transformers  # not needed to write

    path = folder / FILE
    if not path.is_file():
        raise UsageError(f"{folder} has no {FILE}; zgraph quantise MODEL -o {folder} writes one")
    try:
        with safe_open(path, "pt") as file:
            about = json.loads((file.metadata() or {})[KEY])
            held = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
        turned, group, weights = set(about["turned"]), int(about["group"]), str(about["weights"])
        state = _state(held, turned, group)
    except (SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise UsageError(f"{path} is damaged, or was not written by zgraph quantise ({error}); write it anew") from None
    config: Any = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    auto: Any = transformers.AutoModelForCausalLM
    model: nn.Module = auto.from_config(config, dtype=torch.float32)
    try:
        missing, unexpected = model.load_state_dict(state, strict=False)
    except RuntimeError as error:
        raise UsageError(f"{path} does not fit the configuration beside it: {error}") from None
    tied = {n for n in missing if any(p is q for q, p in _named(model, n, state))}
    if unexpected or set(missing) - tied:
        wrong = sorted({*unexpected, *(set(missing) - tied)})
        raise UsageError(f"{path} does not fit the configuration beside it: {', '.join(wrong[:5])}")
    if weights == "int4":
        names = [key.removesuffix(".int4") for key in held if key.endswith(".int4")]
        _STORED[model] = group, {name: (held[f"{name}.int4"], held[f"{name}.scales"]) for name in names}
    return model.eval(), weights, group


def is_stored(model: nn.Module, group: int) -> bool:
    """Whether a model was read from a folder of int4 with such groups."""
    return model in _STORED and _STORED[model][0] == group


@torch.no_grad()
def stored_integers(model: nn.Module, group: int) -> dict[str, Int4]:
    """The int4 of each linear layer of a model that `is_stored`, by the weight's name in the model.

    They are the folder's where the weight is what they stand for; one that was written to is rounded to the nearest.

    Raises:
        QuantisationError: a layer's columns or outputs do not fit the integers.
    """
    stored, found = _STORED[model][1], dict[str, Int4]()
    kinds, names = kept_in(model, "int4"), {id(p): n for n, p in model.named_parameters()}
    for layer_name, layer in linear_layers(model).items():
        name, rows = names[id(layer.weight)], rows_of(layer).contiguous()
        if kinds[layer_name] != "int4" or name in found:
            continue
        check_group(layer_name, rows, group)
        if name not in stored:
            continue  # in int8 there
        both = stored[name]
        is_own = torch.equal(quantised.from_int4(*both, group).to(rows), rows)
        found[name] = both if is_own else _nearest(rows, group)
    return found


def stored_wider(model: nn.Module) -> list[str]:
    """Weights that a folder of int4 has in int8 as `wider=` said, of a model that was read from one."""
    if model not in _STORED:
        return []
    names, stored = {id(p): n for n, p in model.named_parameters()}, _STORED[model][1]
    layers, kinds = linear_layers(model), kept_in(model, "int4")
    return sorted(
        {name for n, kind in kinds.items() if kind == "int4" and (name := names[id(layers[n].weight)]) not in stored}
    )


def _named(model: nn.Module, name: str, state: dict[str, torch.Tensor]) -> list[tuple[Any, Any]]:
    """A missing parameter beside each that was loaded: it is one of them where weights are tied."""
    own = dict(model.named_parameters(remove_duplicate=False))
    return [(own.get(name), own[other]) for other in state if other in own]


def _state(held: dict[str, torch.Tensor], turned: set[str], group: int) -> dict[str, torch.Tensor]:
    """Tensors in fp32 by their own names."""
    state: dict[str, torch.Tensor] = {}
    for key, tensor in held.items():
        name, _, kind = key.rpartition(".")
        if kind == "int8" and f"{name}.scale" in held:
            wide = tensor.float() * held[f"{name}.scale"]
        elif kind == "int4" and f"{name}.scales" in held:
            wide = quantised.from_int4(tensor, held[f"{name}.scales"], group)
        elif kind in ("scale", "scales") and (f"{name}.int8" in held or f"{name}.int4" in held):
            continue
        else:
            state[key] = tensor
            continue
        state[name] = wide.t().contiguous() if name in turned else wide
    return state


def _kept_in(model: nn.Module, weights: str) -> dict[str, tuple[str, bool]]:
    """The integers of each linear layer's and embedding's weight, and whether its rows are columns."""
    tables = {f"{n}.weight": ("int8", False) for n, m in model.named_modules() if isinstance(m, nn.Embedding)}
    layers = linear_layers(model)
    return tables | {f"{n}.weight": (kind, is_turned(layers[n])) for n, kind in kept_in(model, weights).items()}


def _nearest(rows: torch.Tensor, group: int) -> tuple[torch.Tensor, torch.Tensor]:
    integers, scales = quantised.nearest(rows, group)
    return quantised.in_pairs(integers), scales


def _turned(weight: torch.Tensor, turns: bool) -> torch.Tensor:
    return weight.t().contiguous() if turns else weight.contiguous()
