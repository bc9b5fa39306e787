"""Architectures of transformers, each as small as its configuration allows, with inputs for its task."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Batch = dict[str, Any]

WORDS = 100
LENGTH = 16
ROWS = 2
IMAGE = 32
SAMPLES = 1600
SEED = 3


@dataclass(frozen=True)
class Task:
    """Kind of model: its name in the table, and the mapping of transformers that says which class it is."""

    name: str
    mapping: str
    most: int | None = None


TASKS = (
    Task("causal LM", "CAUSAL_LM"),
    Task("seq2seq", "SEQ_TO_SEQ_CAUSAL_LM"),
    Task("masked LM", "MASKED_LM"),
    Task("image classification", "IMAGE_CLASSIFICATION"),
    Task("speech seq2seq", "SPEECH_SEQ_2_SEQ"),
    Task("CTC", "CTC"),
    Task("vision-language", "IMAGE_TEXT_TO_TEXT"),
    Task("segmentation", "SEMANTIC_SEGMENTATION"),
    Task("segmentation", "UNIVERSAL_SEGMENTATION"),
    Task("depth", "DEPTH_ESTIMATION"),
    Task("CLIP-like", "ZERO_SHOT_IMAGE_CLASSIFICATION"),
    Task("audio classification", "AUDIO_CLASSIFICATION"),
    Task("video classification", "VIDEO_CLASSIFICATION"),
    Task("masked image", "MASKED_IMAGE_MODELING"),
    Task("backbone", "BACKBONE"),
)
"""In the order in which an architecture is looked for: it is tried in the first task that has it."""


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
        names = getattr(auto, f"MODEL_FOR_{task.mapping}_MAPPING_NAMES")
        column = [Architecture(name, task.name, _one(model)) for name, model in names.items() if name not in seen]
        seen.update(names)
        columns.append(column)
    return list(_spread(columns))


def _one(model: str | tuple[str, ...]) -> str:
    return model if isinstance(model, str) else model[0]


def _spread(columns: list[list[Architecture]]) -> Iterator[Architecture]:
    """Members of all columns, such that any beginning has about the same share of each."""
    placed = [((i + 0.5) / len(column), which, a) for which, column in enumerate(columns) for i, a in enumerate(column)]
    return (a for _, _, a in sorted(placed, key=lambda p: p[:2]))


EXACT: dict[str, Any] = {
    "use_cache": False, "vocab_size": WORDS, "src_vocab_size": WORDS, "tgt_vocab_size": WORDS, "type_vocab_size": 2,
    "vocab_size_per_layer_input": WORDS, "decoder_vocab_size": WORDS, "entity_vocab_size": WORDS,
    "max_position_embeddings": 64, "n_positions": 64, "n_ctx": 64, "max_source_positions": 64,
    "max_target_positions": 64, "max_seq_len": 64, "max_sequence_length": 64, "seq_length": 64,
    "hidden_size": 64, "d_model": 64, "n_embd": 64, "dim": 64, "emb_dim": 64, "embed_dim": 64, "d_embed": 64,
    "embedding_size": 64, "word_embed_proj_dim": 64, "projection_dim": 32, "encoder_hidden_size": 64,
    "decoder_hidden_size": 64, "output_hidden_size": 64, "lru_width": 64, "projector_hidden_size": 64,
    "out_hidden_size": 64, "hidden_dim": 96, "mamba_d_state": 8, "mamba_d_head": 16, "mamba_n_heads": 8,
    "mamba_n_groups": 1, "mamba_head_dim": 16, "mamba_num_heads": 8, "mamba_expand": 2, "mamba_chunk_size": 8,
    "state_size": 8, "ssm_state_size": 8, "chunk_size": 8, "num_heads": 4, "n_head": 4, "n_heads": 4,
    "head_dim": 16, "d_kv": 16, "attention_head_dim": 16, "global_head_dim": 16, "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8, "v_head_dim": 16, "qk_head_dim": 24, "kv_lora_rank": 16, "q_lora_rank": 16,
    "o_lora_rank": 16, "index_topk": 4, "index_n_heads": 2, "index_head_dim": 16, "linear_key_head_dim": 16,
    "linear_value_head_dim": 16, "linear_num_key_heads": 2, "linear_num_value_heads": 4, "n_group": 1,
    "topk_group": 1, "num_experts": 4, "n_routed_experts": 4, "num_local_experts": 4, "moe_num_experts": 4,
    "num_experts_per_tok": 2, "num_experts_per_token": 2, "moe_k": 2, "moe_topk": 2, "moe_top_k": 2,
    "n_shared_experts": 1, "num_shared_experts": 1, "first_k_dense_replace": 1, "num_dense_layers": 1,
    "sliding_window": 8, "attention_window": 8, "local_attention": 8, "attention_chunk_size": 8,
    "image_size": IMAGE, "patch_size": 8, "image_height": IMAGE, "image_width": IMAGE, "window_size": 2,
    "spatial_merge_size": 2, "num_labels": 5, "num_mel_bins": 16, "num_mel_banks": 16, "max_length": 64,
    "num_feat_extract_layers": 2, "conv_dim": [32, 32], "conv_stride": [5, 4], "conv_kernel": [10, 4],
    "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 4, "apply_spec_augment": False,
    "problem_type": "single_label_classification", "query_length": 4, "num_queries": 4, "num_latents": 4,
    "codevector_dim": 32, "proj_codevector_dim": 32, "encoder_stride": 8, "mlp_ratio": 2,
    "vision_feature_layer": -1, "num_frames": 4, "tubelet_size": [2, 8, 8], "use_pretrained_backbone": False,
    "adapter_kernel_size": 3, "mrope_section": [2, 3, 3], "max_window_layers": 1, "num_nextn_predict_layers": 0,
    "use_mamba_kernels": False, "use_timm_backbone": False, "router_jitter_noise": 0.0, "layer_norm_eps": 1e-5,
    "num_hash_functions": 2, "num_hash_buckets": 16, "downsampling_rates": [1, 2], "axial_pos_embds": False,
    "sampling_ratio": 1, "max_2d_position_embeddings": 64, "coordinate_size": 12, "shape_size": 8,
    "num_mem_blocks": 2, "num_codebooks": 2, "altup_num_inputs": 2, "num_global_layers": 1, "pad_token_id": 0,
    "decoder_start_token_id": 1, "cross_attention_hidden_size": None, "backbone_config": ...,
    "num_groups": 4, "rotary_dim": 8, "laurel_rank": 8, "hidden_size_per_layer_input": 8,
    "attention_out_dim": 64, "num_classes": 5,
}  # fmt: skip
"""What fields of that name are made, where they have another value by default than None."""

PATTERNS: tuple[tuple[str, Any], ...] = (
    (r"drop|mask_(time|feature)_prob|jitter|noise", 0.0),
    (r"vocab_size$", WORDS),
    (r"max_.*position|max_.*length", 64),
    (r"^(num|n)_(key_value|kv)_heads$|(num|n)_.*kv_heads|num_key_value_groups", 2),
    (r"(num|n)_.*heads$|^.*attention_heads$|_heads$", 4),
    (r"(num|n)_.*experts_per", 2),
    (r"(num|n)_.*experts", 4),
    (r"^(num|n)_(hidden_)?layers?$|num_.*_layers$|_layers$|^n_layer|_num_blocks$|^depth$|^num.*depth$", 2),
    (r"intermediate|ffn_dim|ffn_hidden|inner_dim|^d_ff$|^n_inner$|mlp_dim|feed_?forward|hidden_dim", 96),
    (r"hidden_size|embed_dim|d_model|embedding_size|_width$|^width$|hidden_dim", 64),
    (r"head_dim|_head_size$", 16),
    (r"(channels|_dim|_rank|_size)$", 32),
)  # fmt: skip
KEPT = re.compile(
    r"num_channels|in_channels|in_chans|kernel_size|_stride|patch_size|group_size|reduction|block_size|codebook_size"
    r"|temporal_patch_size|chunk_size_feed_forward"
)


def small(config: type[Any], overrides: dict[str, Any] | None = None) -> Any:
    """An instance of a class of configurations with all sizes shrunk."""
    chosen = _shrunk(config)
    chosen.update(overrides or {})
    return config(**chosen)


def _shrunk(config: type[Any]) -> dict[str, Any]:
    chosen: dict[str, Any] = {}
    subs: dict[str, Any] = dict(getattr(config, "sub_configs", {}) or {})
    default = config()
    layers = _num_layers(default)
    names = [f.name for f in dataclasses.fields(config) if f.init]
    for name in names:
        value = _default(config, name)
        if name in subs:
            continue
        if (new := _size(name, value, getattr(default, name, None), layers)) is not ...:
            chosen[name] = new
    if getattr(default, "kv_lora_rank", None) and "num_key_value_heads" in names:
        chosen["num_key_value_heads"] = chosen.get("num_attention_heads", 4)
    for name in subs:
        sub = getattr(default, name, None)
        if name in names and sub is not None and not isinstance(sub, dict):
            chosen[name] = small(type(sub))
    return chosen


def _default(config: type[Any], name: str) -> Any:
    field = next(f for f in dataclasses.fields(config) if f.name == name)
    if field.default is not dataclasses.MISSING:
        return field.default
    return field.default_factory() if field.default_factory is not dataclasses.MISSING else None


def _num_layers(config: Any) -> int | None:
    for name in ("num_hidden_layers", "n_layer", "num_layers", "n_layers"):
        with suppress(Exception):
            return int(getattr(config, name))
    return None


def _size(name: str, value: Any, used: Any, layers: int | None) -> Any:
    """What to make of a field with this default, of which an instance made the other; `...` to leave it."""
    if name in ("problem_type", "num_labels"):
        return EXACT[name]
    if name.endswith(("_token_id", "_token_index")):
        return _token(name, value)
    if value is None and used is None:
        return 0 if name == "pad_token_id" else ...
    if isinstance(used, dict) and isinstance(value, dict):
        return _rope(value)
    if isinstance(used, list | tuple) and not isinstance(value, int | float):
        if value is None and not re.search(r"hidden_sizes|depths|dims", name):
            return ...
        return _list(name, list(used), layers)
    if value is None or isinstance(value, str) or KEPT.search(name):
        return ...
    if name in EXACT:
        return _like(EXACT[name], value) if not isinstance(value, bool) or isinstance(EXACT[name], bool) else ...
    if isinstance(value, bool):
        return ...
    for pattern, new in PATTERNS:
        if re.search(pattern, name):
            return (
                min(new, value) if isinstance(new, int) and isinstance(value, int) and value >= 0 else _like(new, value)
            )
    return ...


def _like(new: Any, value: Any) -> Any:
    """A number as an integer or not, as the one that it replaces: configurations insist on it."""
    return type(value)(new) if type(new) in (int, float) and type(value) in (int, float) else new


TOKENS = {"pad": 0, "bos": 1, "eos": 2, "decoder_start": 1, "image": 90, "video": 91, "audio": 92, "mask": 93}


def _token(name: str, value: Any) -> Any:
    stem = re.sub(r"_token_(id|index)$", "", name)
    if value is None and stem != "pad":
        return ...
    return TOKENS.get(stem, 80 + sum(map(ord, stem)) % 10)


def _rope(value: dict[str, Any]) -> Any:
    return {k: [2, 3, 3] if k == "mrope_section" else v for k, v in value.items()} if value else ...


def _list(name: str, used: list[Any], layers: int | None) -> Any:
    """A list as long, of small numbers; one with an entry a layer gets two entries, of two kinds if there are two."""
    if isinstance(EXACT.get(name), list):
        return EXACT[name]
    if not used or any(isinstance(x, list | tuple | dict) for x in used):
        return ...
    if isinstance(used[0], str):
        other = next((x for x in used if x != used[0]), used[-1])
        return [used[0], other] if layers and len(used) >= layers else ...
    if re.search(r"depth|layers|blocks", name) and "out" not in name and "index" not in name:
        return [1] * len(used)
    if re.search(r"head", name):
        return [2] * len(used)
    if re.search(r"(hidden_size|dims?|channels|sizes|embed.*)s?$", name) and min(used) >= 16 and "window" not in name:
        return [16 * (1 + (used[i] > used[0])) * (1 if i < 2 else 2) for i in range(len(used))]
    if re.search(r"out_(indices|features)|layer", name) and all(isinstance(x, int) for x in used):
        return [min(i, 1) if layers else x for i, x in enumerate(used)] if max(used) > 4 else ...
    return ...


def build(architecture: Architecture) -> nn.Module:
    """The model with random weights, the same each time, in training mode and without dropout."""
    import transformers

    mapping = importlib.import_module("transformers.models.auto.configuration_auto").CONFIG_MAPPING
    config = small(mapping[architecture.name])
    for part in _parts(config):
        for name, value in vars(part).items():
            if re.search(r"dropout|drop_path|layerdrop|pdrop|drop_rate", name) and isinstance(value, float):
                setattr(part, name, 0.0)
            elif name == "use_cache":
                setattr(part, name, False)
    config._attn_implementation, config.num_labels = "eager", 5
    if getattr(config, "is_encoder_decoder", False) and getattr(config, "decoder_start_token_id", None) is None:
        config.decoder_start_token_id = 1
    torch.manual_seed(SEED)
    cls = getattr(transformers, architecture.model)
    model: nn.Module = cls(config).float().train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def _parts(config: Any) -> Iterator[Any]:
    yield config
    for name in getattr(config, "sub_configs", {}) or {}:
        part = getattr(config, name, None)
        if part is not None and hasattr(part, "to_dict"):
            yield from _parts(part)


def _find(config: Any, *names: str, otherwise: Any = None) -> Any:
    """The first of these fields that the configuration or a part of it has."""
    for name in names:
        for part in _parts(config):
            if (value := getattr(part, name, None)) is not None:
                return value
    return otherwise


class Inputs:
    """Makes batches for a model by what its forward takes.

    Args:
        model: it.
        task: what it is for.
        num_image_tokens: places of a sequence that an image takes, where that is known.
    """

    def __init__(self, model: nn.Module, task: str, num_image_tokens: int = 4) -> None:
        self.config: Any = model.config
        self.task, self.num_image_tokens = task, num_image_tokens
        self.dtype = torch.float32
        self.names = set(inspect.signature(model.forward).parameters)
        self.main = str(getattr(model, "main_input_name", "input_ids"))

    def batch(self, seed: int) -> Batch:
        """A batch drawn with this seed."""
        self.random = torch.Generator().manual_seed(seed)
        made: Batch = {}
        for name, make in self._makers().items():
            if name in self.names and (value := make()) is not None:
                made[name] = value
        if "attention_mask" in self.names and "input_ids" in made:
            made["attention_mask"] = torch.ones_like(made["input_ids"])
        if self.main not in made and self.main in ("input_values", "input_features"):
            made[self.main] = self._sound(self.main)
        if "labels" in self.names and (labels := self._labels(made)) is not None:
            made["labels"] = labels
        return {name: self._cast(value) for name, value in made.items()}

    def _cast(self, value: Any) -> Any:
        if isinstance(value, list):
            return [self._cast(one) for one in value]
        return value.to(self.dtype) if isinstance(value, Tensor) and value.is_floating_point() else value

    def _makers(self) -> dict[str, Callable[[], Any]]:
        return {
            "input_ids": self._ids,
            "pixel_values": self._image,
            "image_grid_thw": lambda: torch.tensor([[1, 4, 4]] * ROWS),
            "input_features": lambda: self._sound("input_features"),
            "input_values": lambda: self._sound("input_values"),
            "pixel_mask": lambda: None,
            "return_loss": lambda: True if self.task == "CLIP-like" else None,
            "bool_masked_pos": self._masked,
            "mask_labels": lambda: [self._masks() for _ in range(ROWS)],
            "class_labels": lambda: [torch.tensor([1, 2]) for _ in range(ROWS)],
            "decoder_input_ids": lambda: None if "labels" in self.names else self._words(LENGTH),
            "mm_token_type_ids": self._kinds,
            "token_type_ids": self._kinds if self.task == "vision-language" else lambda: None,
            "image_sizes": lambda: torch.tensor([[IMAGE, IMAGE]] * ROWS) if self.task == "vision-language" else None,
            "bbox": lambda: torch.zeros(ROWS, LENGTH, 4, dtype=torch.int64),
            "task_inputs": lambda: self._words(LENGTH),
            "spatial_shapes": lambda: torch.tensor([[4, 4]] * ROWS),
            "pixel_attention_mask": lambda: None,
        }

    def _text(self) -> bool:
        return "input_ids" in self.names and self.task not in ("speech seq2seq", "CTC", "audio classification")

    def _words(self, length: int) -> Tensor:
        return torch.randint(3, 70, (ROWS, length), generator=self.random)

    def _ids(self) -> Tensor | None:
        if not self._text():
            return None
        ids = self._words(LENGTH)
        if self.task == "vision-language":
            image = _find(self.config, "image_token_id", "image_token_index", otherwise=90)
            ids = torch.cat([ids[:, :4], torch.full((ROWS, self.num_image_tokens), int(image)), ids[:, 4:]], 1)
        eos = getattr(self.config, "eos_token_id", None)
        if self.task in ("CLIP-like", "seq2seq") and isinstance(eos, int):
            ids[:, -1] = eos
        return ids

    def _kinds(self) -> Tensor | None:
        ids = torch.zeros(ROWS, LENGTH + self.num_image_tokens, dtype=torch.int64)
        ids[:, 4 : 4 + self.num_image_tokens] = 1
        return ids if self.task == "vision-language" else None

    def _image(self) -> Tensor:
        channels = int(_find(self.config, "num_channels", "in_channels", "in_chans", otherwise=3))
        size = _find(self.config, "image_size", otherwise=IMAGE)
        high, wide = (size, size) if isinstance(size, int) else tuple(size)[-2:]
        if "image_grid_thw" in self.names or "spatial_shapes" in self.names:
            patch = int(_find(self.config, "patch_size", otherwise=8))
            times = int(_find(self.config, "temporal_patch_size", otherwise=1))
            if "spatial_shapes" in self.names:
                return torch.randn(ROWS, 16, channels * patch * patch, generator=self.random)
            return torch.randn(ROWS * 16, channels * times * patch * patch, generator=self.random)
        if self.task == "video classification":
            return torch.randn(
                ROWS,
                int(_find(self.config, "num_frames", "frames_per_clip", otherwise=4)),
                channels,
                high,
                wide,
                generator=self.random,
            )
        return torch.randn(ROWS, channels, high, wide, generator=self.random)

    def _sound(self, name: str) -> Tensor | None:
        if self.main != name and self._text():
            return None
        if name == "input_values" and "spectrogram" not in str(type(self.config)).lower():
            return torch.randn(ROWS, SAMPLES, generator=self.random)
        mels = int(
            _find(
                self.config,
                "num_mel_bins",
                "input_feat_per_channel",
                "feature_projection_input_dim",
                "num_mel_banks",
                otherwise=16,
            )
        )
        length = int(_find(self.config, "max_length", otherwise=64)) if name == "input_values" else 128
        shape = (
            (ROWS, mels, length)
            if self.task == "speech seq2seq" and "num_mel_bins" in vars(self.config)
            else (ROWS, length, mels)
        )
        return torch.randn(shape, generator=self.random)

    def _masked(self) -> Tensor:
        size, patch = (int(_find(self.config, n, otherwise=o)) for n, o in (("image_size", IMAGE), ("patch_size", 8)))
        return torch.arange((size // patch) ** 2).remainder(2).bool().expand(ROWS, -1).clone()

    def _masks(self) -> Tensor:
        return torch.randint(2, (2, IMAGE, IMAGE), generator=self.random).float()

    def _labels(self, made: Batch) -> Tensor | None:
        if self.task.endswith("classification"):
            return torch.randint(0, 5, (ROWS,), generator=self.random)
        if self.task == "segmentation":
            size = tuple(made["pixel_values"].shape[-2:])
            return torch.randint(0, 5, (ROWS, *size), generator=self.random)
        if self.task in ("depth", "backbone", "masked image", "CLIP-like"):
            return None
        if self.task == "seq2seq" and not getattr(self.config, "is_encoder_decoder", True):
            return made["input_ids"].clone() if "input_ids" in made else None
        if self.task in ("CTC", "seq2seq", "speech seq2seq"):
            return self._words(LENGTH if self.task == "seq2seq" else 6)
        return made["input_ids"].clone() if "input_ids" in made else None


def loss_of(output: Any) -> Tensor:
    """The loss that the model computed, or else the mean square of what it returned."""
    loss = getattr(output, "loss", None)
    if loss is not None:
        return loss.sum()  # type: ignore[no-any-return]
    tensors = [t for t in _tensors(output) if t.is_floating_point() and t.requires_grad]
    if not tensors:
        raise ValueError("the model returned nothing to train on")
    return torch.stack([t.float().square().mean() for t in tensors]).sum()


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, dict):
        for value in output.values():
            yield from _tensors(value)
    elif isinstance(output, list | tuple):
        for value in output:
            yield from _tensors(value)


WANTED_TOKENS = re.compile(r"tokens[:=]?\s*(\d+)[^\d]*features[:=]?\s*(?:torch\.Size\(\[)?(\d+)", re.IGNORECASE)


def runnable(architecture: Architecture) -> tuple[nn.Module, Inputs]:
    """A model and what makes its batches, with as many image tokens as the model says that it wants."""
    model = build(architecture)
    inputs = Inputs(model, architecture.task)
    try:
        torch.manual_seed(SEED)
        loss_of(model(**inputs.batch(0)))
    except (ValueError, RuntimeError) as error:
        if architecture.task != "vision-language" or not (found := WANTED_TOKENS.search(str(error))):
            raise
        inputs = Inputs(model, architecture.task, int(found[2]) // ROWS)
    return build(architecture), inputs
