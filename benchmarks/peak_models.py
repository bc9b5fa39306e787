"""Twelve models of different kinds for benchmarks/peaks.py, each small, with a batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn

from benchmarks.zoo_torch import UNet

Batch = dict[str, Tensor]

WORDS = 2000
LENGTH = 96
ROWS = 2
CLASSES = 10

_TEXT: dict[str, Any] = {"vocab_size": WORDS, "use_cache": False}
_LLAMA: dict[str, Any] = {
    **_TEXT,
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 32,
}
_LABELS: dict[str, Any] = {"num_labels": CLASSES, "problem_type": "single_label_classification"}


class Reconstruction(nn.Module):
    """A U-Net and its loss."""

    def __init__(self) -> None:
        super().__init__()
        self.net = UNet()

    def forward(self, pixel_values: Tensor) -> dict[str, Tensor]:
        return {"loss": self.net(pixel_values)}


def _images(size: int) -> Batch:
    return {"pixel_values": torch.randn(ROWS, 3, size, size), "labels": torch.randint(CLASSES, (ROWS,))}


def _words() -> Batch:
    ids = torch.randint(WORDS, (ROWS, LENGTH))
    return {"input_ids": ids, "labels": ids}


def _spoken() -> Batch:
    return {"input_features": torch.randn(ROWS, 40, 2 * LENGTH), "labels": torch.randint(WORDS, (ROWS, LENGTH // 2))}


def convnext() -> nn.Module:
    return hf.ConvNextForImageClassification(
        hf.ConvNextConfig(hidden_sizes=[48, 96, 192, 384], depths=[1, 1, 2, 1], **_LABELS)
    )


def resnet() -> nn.Module:
    return hf.ResNetForImageClassification(
        hf.ResNetConfig(embedding_size=32, hidden_sizes=[64, 128, 256, 512], depths=[1, 2, 1, 1], **_LABELS)
    )


def swin() -> nn.Module:
    return hf.SwinForImageClassification(
        hf.SwinConfig(image_size=64, embed_dim=48, depths=[2, 2, 2], num_heads=[2, 4, 8], window_size=4, **_LABELS)
    )


def whisper() -> nn.Module:
    return hf.WhisperForConditionalGeneration(
        hf.WhisperConfig(
            **_TEXT,
            num_mel_bins=40,
            d_model=192,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=6,
            decoder_attention_heads=6,
            encoder_ffn_dim=512,
            decoder_ffn_dim=512,
            max_source_positions=LENGTH,
            max_target_positions=LENGTH,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            decoder_start_token_id=1,
        )
    )


def qwen3() -> nn.Module:
    return hf.Qwen3ForCausalLM(hf.Qwen3Config(**_LLAMA))


def gemma2() -> nn.Module:
    return hf.Gemma2ForCausalLM(hf.Gemma2Config(**_LLAMA, query_pre_attn_scalar=32, sliding_window=32))


def gpt_neox() -> nn.Module:
    return hf.GPTNeoXForCausalLM(
        hf.GPTNeoXConfig(**_TEXT, hidden_size=192, intermediate_size=512, num_hidden_layers=3, num_attention_heads=6)
    )


def t5() -> nn.Module:
    return hf.T5ForConditionalGeneration(
        hf.T5Config(
            **_TEXT, d_model=192, d_kv=32, d_ff=512, num_layers=2, num_heads=6, decoder_start_token_id=0, pad_token_id=0
        )
    )


def vit() -> nn.Module:
    return hf.ViTForImageClassification(
        hf.ViTConfig(
            hidden_size=192,
            num_hidden_layers=4,
            num_attention_heads=6,
            intermediate_size=512,
            image_size=64,
            patch_size=8,
            **_LABELS,
        )
    )


def mixtral() -> nn.Module:
    return hf.MixtralForCausalLM(
        hf.MixtralConfig(**{**_LLAMA, "num_hidden_layers": 2}, num_local_experts=4, num_experts_per_tok=2)
    )


def bloom() -> nn.Module:
    return hf.BloomForCausalLM(hf.BloomConfig(**_TEXT, hidden_size=192, n_layer=3, n_head=6))


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Batch]]] = {
    "ConvNeXt": (convnext, lambda: _images(64)),
    "ResNet": (resnet, lambda: _images(64)),
    "Swin": (swin, lambda: _images(64)),
    "Whisper": (whisper, _spoken),
    "Qwen3": (qwen3, _words),
    "Gemma 2": (gemma2, _words),
    "GPT-NeoX": (gpt_neox, _words),
    "T5": (t5, _words),
    "ViT": (vit, lambda: _images(64)),
    "Mixtral": (mixtral, _words),
    "BLOOM": (bloom, _words),
    "U-Net": (Reconstruction, lambda: {"pixel_values": torch.randn(ROWS, 3, 64, 64)}),
}
"""By name: what builds the model, and what makes a batch of it."""
