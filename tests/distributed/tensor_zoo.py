"""Small models of the kinds that are trained with tensor parallelism; their vocabularies divide."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as hf
from torch import nn

import small

from .nets import built

WORDS = 64
SMALL: dict[str, Any] = {"hidden_size": 32, "num_attention_heads": 4, "vocab_size": WORDS}
EXPERTS: dict[str, Any] = {
    **SMALL,
    "intermediate_size": 40,
    "num_hidden_layers": 1,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "use_cache": False,
}


def llama(**options: Any) -> nn.Module:
    return small.llama(32, 2, WORDS, inner=56, **options)


def tied() -> nn.Module:
    return llama(tie_word_embeddings=True)


def gpt2() -> nn.Module:
    return small.gpt2(32, 2, WORDS)


def bert() -> nn.Module:
    return hf.BertForMaskedLM(
        hf.BertConfig(**SMALL, num_hidden_layers=2, intermediate_size=56, max_position_embeddings=32)
    )


def t5() -> nn.Module:
    return hf.T5ForConditionalGeneration(
        hf.T5Config(
            d_model=32,
            d_kv=8,
            d_ff=56,
            num_layers=1,
            num_heads=4,
            vocab_size=WORDS,
            decoder_start_token_id=0,
            pad_token_id=0,
            use_cache=False,
        )
    )


def vit() -> nn.Module:
    return small.vit(32, 2, inner=56, image_size=16)


def qwen3_moe() -> nn.Module:
    return hf.Qwen3MoeForCausalLM(
        hf.Qwen3MoeConfig(**EXPERTS, moe_intermediate_size=24, head_dim=8, num_experts=4, decoder_sparse_step=1)
    )


def mixtral() -> nn.Module:
    return hf.MixtralForCausalLM(hf.MixtralConfig(**EXPERTS, num_local_experts=3))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "llama": llama,
    "tied": tied,
    "gpt2": gpt2,
    "bert": bert,
    "t5": t5,
    "vit": vit,
    "qwen3_moe": qwen3_moe,
    "mixtral": mixtral,
}

DROPS = frozenset({"gpt2", "bert", "t5"})
"""Those with dropout."""


def builder(name: str) -> Callable[[], nn.Module]:
    """Builds the model, with the same first values every time."""
    return built(MODELS[name])


def batch(name: str, seed: int) -> dict[str, torch.Tensor]:
    """What the model is called with; another seed gives other data of the same shape."""
    dice = torch.Generator().manual_seed(seed)
    if name == "vit":
        return {
            "pixel_values": torch.randn(3, 3, 16, 16, generator=dice),
            "labels": torch.randint(5, (3,), generator=dice),
        }
    ids = torch.randint(1, WORDS, (2, 12), generator=dice)
    given = {"input_ids": ids, "labels": ids.masked_fill(torch.rand(2, 12, generator=dice) < 0.2, -100)}
    if name == "bert":
        given["attention_mask"] = (torch.arange(12) < torch.tensor([[12], [7]])).long()
    return given
