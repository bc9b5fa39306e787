"""Sizes of small models: what every field of a configuration of transformers is made, by its name."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

WORDS = 100
IMAGE = 32

EXACT: dict[str, Any] = {
    "use_cache": False,
    "vocab_size": WORDS,
    "src_vocab_size": WORDS,
    "tgt_vocab_size": WORDS,
    "type_vocab_size": 2,
    "vocab_size_per_layer_input": WORDS,
    "decoder_vocab_size": WORDS,
    "entity_vocab_size": WORDS,
    "max_position_embeddings": 64,
    "n_positions": 64,
    "n_ctx": 64,
    "max_source_positions": 64,
    "max_target_positions": 64,
    "max_seq_len": 64,
    "max_sequence_length": 64,
    "seq_length": 64,
    "hidden_size": 64,
    "d_model": 64,
    "n_embd": 64,
    "dim": 64,
    "emb_dim": 64,
    "embed_dim": 64,
    "d_embed": 64,
    "embedding_size": 64,
    "word_embed_proj_dim": 64,
    "projection_dim": 64,
    "encoder_hidden_size": 64,
    "decoder_hidden_size": 64,
    "output_hidden_size": 64,
    "lru_width": 64,
    "projector_hidden_size": 64,
    "out_hidden_size": 64,
    "hidden_dim": 96,
    "mamba_d_state": 8,
    "mamba_d_head": 16,
    "mamba_n_heads": 8,
    "mamba_n_groups": 1,
    "mamba_head_dim": 16,
    "mamba_num_heads": 8,
    "mamba_expand": 2,
    "mamba_chunk_size": 8,
    "state_size": 8,
    "ssm_state_size": 8,
    "chunk_size": 8,
    "num_heads": 4,
    "n_head": 4,
    "n_heads": 4,
    "head_dim": 16,
    "d_kv": 16,
    "attention_head_dim": 16,
    "global_head_dim": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "qk_head_dim": 24,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "o_lora_rank": 16,
    "index_topk": 4,
    "index_n_heads": 2,
    "index_head_dim": 16,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "n_group": 1,
    "topk_group": 1,
    "num_experts": 4,
    "n_routed_experts": 4,
    "num_local_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "num_experts_per_token": 2,
    "moe_k": 2,
    "moe_topk": 2,
    "moe_top_k": 2,
    "n_shared_experts": 1,
    "num_shared_experts": 1,
    "first_k_dense_replace": 1,
    "num_dense_layers": 1,
    "sliding_window": 8,
    "attention_window": 8,
    "local_attention": 8,
    "attention_chunk_size": 8,
    "image_size": IMAGE,
    "patch_size": 8,
    "image_height": IMAGE,
    "image_width": IMAGE,
    "window_size": 2,
    "spatial_merge_size": 2,
    "num_labels": 5,
    "num_mel_bins": 16,
    "num_mel_banks": 16,
    "max_length": 64,
    "num_feat_extract_layers": 2,
    "conv_dim": [32, 32],
    "conv_stride": [5, 4],
    "conv_kernel": [10, 4],
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 4,
    "apply_spec_augment": False,
    "problem_type": "single_label_classification",
    "query_length": 4,
    "num_queries": 4,
    "num_latents": 4,
    "codevector_dim": 32,
    "proj_codevector_dim": 32,
    "encoder_stride": 8,
    "mlp_ratio": 2,
    "vision_feature_layer": -1,
    "num_frames": 4,
    "tubelet_size": [2, 8, 8],
    "use_pretrained_backbone": False,
    "adapter_kernel_size": 3,
    "mrope_section": [2, 3, 3],
    "max_window_layers": 1,
    "num_nextn_predict_layers": 0,
    "use_mamba_kernels": False,
    "use_timm_backbone": False,
    "router_jitter_noise": 0.0,
    "layer_norm_eps": 1e-5,
    "num_hash_functions": 2,
    "num_hash_buckets": 16,
    "downsampling_rates": [1, 2],
    "axial_pos_embds": False,
    "sampling_ratio": 1,
    "max_2d_position_embeddings": 64,
    "coordinate_size": 12,
    "shape_size": 8,
    "num_mem_blocks": 2,
    "num_codebooks": 2,
    "altup_num_inputs": 2,
    "num_global_layers": 1,
    "pad_token_id": 0,
    "decoder_start_token_id": 1,
    "cross_attention_hidden_size": None,
    "backbone_config": ...,
    "mm_tokens_per_image": 4,
    "num_groups": 4,
    "rotary_dim": 8,
    "laurel_rank": 8,
    "hidden_size_per_layer_input": 8,
    "attention_out_dim": 64,
    "num_classes": 5,
    "index_kpool": 2,
    "num_kv_shared_layers": 0,
    "num_windows": 4,
}
"""Values of fields of that name, where they have another value by default than None."""

PATTERNS: tuple[tuple[str, Any], ...] = (
    (r"drop|mask_(time|feature)_prob|jitter|noise", 0.0),
    (r"vocab_size$|group_vocab$", WORDS),
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
)
KEPT = re.compile(
    r"num_channels|in_channels|in_chans|kernel_size|_stride|patch_size|group_size|reduction|block_size|codebook_size"
    r"|temporal_patch_size|chunk_size_feed_forward"
)


@dataclass(frozen=True)
class Variant:
    """Exceptions for models that do not run when everything is shrunk.

    sizes: what fields of these names are made.
    kept: pattern of names of fields that keep their default.
    images: what is done to a batch's images: "" nothing, "in a list" a further dimension for the images of a row,
        "no sizes" their sizes are not given.
    sections: whether rotary embeddings get sections that their defaults do not name.
    """

    name: str
    sizes: Mapping[str, Any] = field(default_factory=dict)
    kept: str = "(?!)"
    images: str = ""
    sections: bool = False


VARIANTS = (
    Variant("usual"),
    Variant("sizes of images not given", images="no sizes"),
    Variant("several images a row", images="in a list"),
    Variant("sections of rotary embeddings", sections=True),
    Variant("lists kept", kept=r"depth|dims?$|hidden_sizes|channels|embed|indices|num_heads$|^window"),
    Variant("larger images", {"image_size": 64}),
    Variant("more heads", {"num_attention_heads": 8, "encoder_attention_heads": 8, "num_key_value_heads": 8}),
)
"""In the order in which they are tried; the first that runs eagerly is the one."""


KINDS_OF_ATTENTION = ("full_attention", "sliding_attention")
EXCEPTIONS: dict[str, dict[str, Any]] = {
    "Mamba2Config": {"num_heads": 8},
    "GPTNeoConfig": {"attention_types": [[["global", "local"], 1]]},
    "FunAsrNanoAdaptorConfig": {"intermediate_size": 16},
    "DbrxAttentionConfig": {"clip_qkv": 8.0},
    "CohereCompassTextConfig": {
        "rope_parameters": {kind: {"rope_type": "default", "rope_theta": 1e4} for kind in KINDS_OF_ATTENTION}
    },
    "AriaConfig": {"projector_patch_to_query_dict": {1: 4, 4: 4}},
}
"""Fields of configurations that demand what no name tells."""


def small(config: type[Any], variant: Variant = VARIANTS[0]) -> Any:
    """An instance of a class of configurations with all sizes shrunk."""
    return config(**_shrunk(config, variant))


def _shrunk(config: type[Any], variant: Variant) -> dict[str, Any]:
    chosen: dict[str, Any] = {}
    subs: dict[str, Any] = dict(getattr(config, "sub_configs", {}) or {})
    default = _instance(config)
    layers = _num_layers(default)
    names = [f.name for f in dataclasses.fields(config) if f.init]
    for name in names:
        value = _default(config, name)
        if name in subs or re.search(variant.kept, name):
            continue
        if name in variant.sizes and type(value) is type(variant.sizes[name]):
            chosen[name] = variant.sizes[name]
        elif name == "window_size" and "spatial_merge_size" in names:
            continue  # in pixels
        elif variant.sections and name == "rope_parameters" and value_of(default, name):
            chosen[name] = _rope({"mrope_section": ..., **value_of(default, name)})
        elif (new := _size(name, value, value_of(default, name), layers)) is not ...:
            chosen[name] = new
    if "width_coefficient" in names:
        chosen.pop("hidden_dim", None)
    if "backbone_out_indices" in names:
        chosen |= {"num_hidden_layers": 4, "backbone_out_indices": [0, 1, 2, 3]}
    chosen |= EXCEPTIONS.get(config.__name__, {})
    if value_of(default, "kv_lora_rank") and "num_key_value_heads" in names:
        chosen["num_key_value_heads"] = chosen.get("num_attention_heads", 4)
    for name in subs:
        sub = getattr(default, name, None)
        if getattr(sub, "model_type", "") == "timm_backbone":
            chosen[name] = _backbone()
        elif name in names and sub is not None and not isinstance(sub, dict):
            chosen[name] = type(sub)(**_shrunk(type(sub), variant) | _features(sub))
    return chosen


def _features(config: Any) -> dict[str, Any]:
    """Fields of a part without stages, from several of whose layers the whole takes features."""
    wanted = value_of(config, "out_indices") or ()
    if len(wanted) < 2 or value_of(config, "depths") or not value_of(config, "num_hidden_layers"):
        return {}
    return {"num_hidden_layers": len(wanted), "out_indices": list(range(1, len(wanted) + 1)), "out_features": None}


def _instance(config: type[Any]) -> Any:
    """One with its defaults, or a blank one of a class whose own defaults it refuses."""
    try:
        return config()
    except ValueError:
        return object.__new__(config)


def value_of(default: Any, name: str) -> Any:
    """A field of an instance; one of layers that differ is none of the instance's, which raises for it."""
    try:
        return getattr(default, name, None)
    except RuntimeError:
        return vars(default).get(name)


def _backbone() -> Any:
    """A ResNet in the place of one that another library would make."""
    import transformers

    stages = [f"stage{i}" for i in (1, 2, 3, 4)]
    make: Any = transformers.ResNetConfig
    return make(
        embedding_size=16, hidden_sizes=[16, 32, 32, 32], depths=[1] * 4, layer_type="basic", out_features=stages
    )


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
    """Value to give a field with this default, of which an instance made the other; `...` to leave it."""
    if name in ("problem_type", "num_labels"):
        return EXACT[name]
    if name.endswith(("_token_id", "_token_index")):
        return _token(name, value)
    if value is None and name in ("vocab_size", "num_experts_per_tok"):
        return EXACT[name]
    if value is None and used is None and name in ("head_dim", "n_routed_experts", "n_shared_experts"):
        return EXACT[name]
    if value is None and used is None:
        return 0 if name == "pad_token_id" else ...
    if isinstance(used, dict) and (isinstance(value, dict) or "mrope_section" in str(used)):
        return _rope(used if value is None else value)
    if isinstance(used, list | tuple) and not isinstance(value, int | float):
        if value is None and not re.search(r"hidden_sizes|depths|dims", name):
            return ...
        return _list(name, list(used), layers)
    if value is None or isinstance(value, str) or KEPT.search(name):
        return ...
    if name in EXACT and not isinstance(EXACT[name], list):
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
    if value is None and stem not in ("pad", "image"):
        return ...
    return TOKENS.get(stem, 80 + sum(map(ord, stem)) % 10)


def _rope(value: dict[str, Any]) -> Any:
    """Parameters of rotary embeddings, with sections that add up to half of the rotated part of a head."""
    if not value:
        return ...
    rotated = int(EXACT["head_dim"] * (value.get("partial_rotary_factor") or 1.0))
    sections = [2, 3, 3] if rotated == 16 else [rotated // 2 - 2 * (rotated // 6), rotated // 6, rotated // 6]
    return {k: sections if k == "mrope_section" else v for k, v in value.items()}


def _list(name: str, used: list[Any], layers: int | None) -> Any:
    """A list as long, of small numbers; one with an entry a layer gets two entries, of two kinds if there are two."""
    if isinstance(EXACT.get(name), list):
        return EXACT[name]
    if KEPT.search(name) or "out_channels" in name:
        return ...
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
