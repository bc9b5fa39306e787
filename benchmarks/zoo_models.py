"""Architectures of transformers, each as small as its configuration allows."""

from __future__ import annotations

import dataclasses
import importlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from benchmarks.zoo_sizes import VARIANTS, Variant, small

SEED = 3


@dataclass(frozen=True)
class Task:
    """Kind of model: its name in the table, and the mapping of transformers that says which class it is."""

    name: str
    mapping: str


TASKS = (
    Task("causal LM", "CAUSAL_LM"),
    Task("seq2seq", "SEQ_TO_SEQ_CAUSAL_LM"),
    Task("masked LM", "MASKED_LM"),
    Task("image classification", "IMAGE_CLASSIFICATION"),
    Task("speech seq2seq", "SPEECH_SEQ_2_SEQ"),
    Task("CTC", "CTC"),
    Task("vision-language", "IMAGE_TEXT_TO_TEXT"),
    Task("segmentation", "SEMANTIC_SEGMENTATION"),
    Task("segmentation without labels", "UNIVERSAL_SEGMENTATION"),
    Task("depth", "DEPTH_ESTIMATION"),
    Task("CLIP-like", "ZERO_SHOT_IMAGE_CLASSIFICATION"),
    Task("audio classification", "AUDIO_CLASSIFICATION"),
    Task("video classification", "VIDEO_CLASSIFICATION"),
    Task("masked image", "MASKED_IMAGE_MODELING"),
    Task("backbone", "BACKBONE"),
)
"""In the order in which an architecture is looked for: it is tried in the first task that has it, and what reads images
as well as text with both."""


@dataclass(frozen=True)
class Architecture:
    """An entry of the mappings: its name there, its task, and the name of its class."""

    name: str
    task: str
    model: str


def architectures() -> list[Architecture]:
    """All entries of the tasks' mappings, each name once, in alternation between the tasks."""
    auto = importlib.import_module("transformers.models.auto.modeling_auto")
    seen: set[str] = set()
    columns: list[list[Architecture]] = []
    for task in TASKS:
        names = dict(getattr(auto, f"MODEL_FOR_{task.mapping}_MAPPING_NAMES"))
        if task.mapping == "CAUSAL_LM":
            seeing = auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
            names = {name: model for name, model in names.items() if name not in seeing}
        column = [Architecture(name, task.name, _one(model)) for name, model in names.items() if name not in seen]
        seen.update(names)
        columns.append(column)
    return list(_spread(columns))


KINDS: tuple[tuple[str, str], ...] = (
    (
        "state space or recurrent",
        r"mamba|ssm|state_size|linear_num_key_heads|lru_width|rwkv|xlstm|attention_hidden_size",
    ),
    ("mixture of experts", r"expert"),
)
"""What the fields of a language model's configuration tell of it, by a pattern of their names."""


def kind_of(name: str, task: str) -> str:
    """The task, or what sort of language model an entry of the mappings is; "causal LM" if neither sort."""
    if task != "causal LM":
        return task
    mapping = importlib.import_module("transformers.models.auto.configuration_auto").CONFIG_MAPPING
    fields = " ".join(field.name for field in dataclasses.fields(mapping[name]))
    return next((kind for kind, pattern in KINDS if re.search(pattern, fields)), task)


def _one(model: str | tuple[str, ...]) -> str:
    return model if isinstance(model, str) else model[0]


def _spread(columns: list[list[Architecture]]) -> Iterator[Architecture]:
    """Members of all columns, such that any beginning has about the same share of each."""
    placed = [((i + 0.5) / len(column), which, a) for which, column in enumerate(columns) for i, a in enumerate(column)]
    return (a for _, _, a in sorted(placed, key=lambda p: p[:2]))


def build(architecture: Architecture, variant: Variant = VARIANTS[0]) -> nn.Module:
    """The model with random weights, the same each time, in training mode and without dropout."""
    mapping = importlib.import_module("transformers.models.auto.configuration_auto").CONFIG_MAPPING
    config = small(mapping[architecture.name], variant)
    for part in parts(config):
        for name, value in vars(part).items():
            if re.search(r"dropout|drop_path|layerdrop|pdrop|drop_rate", name) and isinstance(value, float):
                setattr(part, name, 0.0)
            elif name == "use_cache":
                setattr(part, name, False)
    config._attn_implementation, config.num_labels = "eager", 5
    if getattr(config, "is_encoder_decoder", False) and getattr(config, "decoder_start_token_id", None) is None:
        config.decoder_start_token_id = 1
    model = _made(architecture.model, config).float().train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


MISSING = re.compile(r"'(\w+)' object has no attribute '(\w+)'")


def _made(name: str, config: Any) -> nn.Module:
    """An instance of the class of that name; what it misses in a configuration is taken from the other parts."""
    cls: Any = getattr(importlib.import_module("transformers"), name)
    for _ in range(4):
        torch.manual_seed(SEED)
        try:
            model: nn.Module = cls(config)
            return model
        except AttributeError as error:
            if not (found := MISSING.search(str(error))) or not _mended(config, found[1], found[2]):
                raise
    raise ValueError(f"{name}: the configuration misses too many fields")


def _mended(config: Any, kind: str, name: str) -> bool:
    """Whether parts of this kind could be given a field that they miss."""
    having = [vars(part)[name] for part in parts(config) if vars(part).get(name) is not None]
    value = having[0] if having else {"pad_token_id": 0, "rope_theta": 10000.0}.get(name)
    missing = [part for part in parts(config) if type(part).__name__ == kind]
    for part in missing:
        setattr(part, name, value)
    return value is not None and bool(missing)


def parts(config: Any) -> Iterator[Any]:
    yield config
    for name in getattr(config, "sub_configs", {}) or {}:
        part = getattr(config, name, None)
        if part is not None and hasattr(part, "to_dict"):
            yield from parts(part)
