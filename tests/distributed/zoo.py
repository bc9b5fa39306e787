"""Small models of many kinds, each with its batches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as hf
from torch import nn

import small

from .nets import built

Batch = dict[str, torch.Tensor]
VOCABULARY = 61


def llama(num_layers: int = 2) -> nn.Module:
    return small.llama(32, num_layers, VOCABULARY, inner=56)


def gpt2() -> nn.Module:
    return hf.GPT2LMHeadModel(
        hf.GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=32, vocab_size=VOCABULARY, use_cache=False)
    )


def bert() -> nn.Module:
    return hf.BertForMaskedLM(
        hf.BertConfig(
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=56,
            vocab_size=VOCABULARY,
            max_position_embeddings=32,
        )
    )


def mixtral() -> nn.Module:
    return hf.MixtralForCausalLM(
        hf.MixtralConfig(
            hidden_size=32,
            intermediate_size=40,
            num_hidden_layers=1,
            num_attention_heads=4,
            num_key_value_heads=2,
            num_local_experts=3,
            num_experts_per_tok=2,
            vocab_size=VOCABULARY,
            use_cache=False,
        )
    )


def vit() -> nn.Module:
    return small.vit(32, 2, inner=56, image_size=16)


def resnet() -> nn.Module:
    return hf.ResNetForImageClassification(
        hf.ResNetConfig(
            embedding_size=8,
            hidden_sizes=[8, 16],
            depths=[1, 1],
            layer_type="basic",
            num_labels=5,
            problem_type="single_label_classification",
        )
    )


MODELS: dict[str, Callable[[], nn.Module]] = {
    "llama": llama,
    "gpt2": gpt2,
    "bert": bert,
    "mixtral": mixtral,
    "vit": vit,
    "resnet": resnet,
}


def builder(name: str) -> Callable[[], nn.Module]:
    """Builds the model, with the same first values every time."""
    return built(MODELS[name])


def batch(name: str, seed: int) -> Batch:
    """What the model is called with; another seed gives other data of the same shape."""
    dice = torch.Generator().manual_seed(seed)
    if name in ("vit", "resnet"):
        return {
            "pixel_values": torch.randn(3, 3, 16, 16, generator=dice),
            "labels": torch.randint(5, (3,), generator=dice),
        }
    ids = torch.randint(VOCABULARY, (2, 12), generator=dice)
    given: dict[str, Any] = {"input_ids": ids, "labels": ids}
    if name == "bert":
        given["attention_mask"] = (torch.arange(12) < torch.tensor([[12], [7]])).long()
    return given
