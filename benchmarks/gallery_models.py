"""The models of the gallery, by their published configurations.

zgraph trace benchmarks/gallery_models.py:llama3_8b --hardware 1x8-h100
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    ViTConfig,
    ViTForImageClassification,
)

BATCH_SIZE = 32


def llama3_8b() -> nn.Module:
    """Llama-3 8B."""
    return _llama3(width=4096, inner=14336, num_layers=32, num_heads=32)


def llama3_70b() -> nn.Module:
    """Llama-3 70B."""
    return _llama3(width=8192, inner=28672, num_layers=80, num_heads=64)


def gpt2() -> nn.Module:
    """GPT-2, the smallest of the four."""
    return GPT2LMHeadModel(GPT2Config(use_cache=False))


def vit() -> tuple[nn.Module, dict[str, Tensor]]:
    """ViT-B/16, for pictures of 224 x 224 pixels and a thousand classes."""
    model = ViTForImageClassification(ViTConfig(num_labels=1000))
    return model, {
        "pixel_values": torch.zeros(BATCH_SIZE, 3, 224, 224),
        "labels": torch.zeros(BATCH_SIZE, dtype=torch.int64),
    }


def mixtral() -> nn.Module:
    """Mixtral 8x7B."""
    config = MixtralConfig(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        num_local_experts=8,
        num_experts_per_tok=2,
        vocab_size=32000,
        use_cache=False,
    )
    return MixtralForCausalLM(config)


def _llama3(width: int, inner: int, num_layers: int, num_heads: int) -> nn.Module:
    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=8,
        vocab_size=128256,
        max_position_embeddings=8192,
        rope_theta=500000.0,
        rms_norm_eps=1e-5,
        use_cache=False,
    )
    return LlamaForCausalLM(config)
