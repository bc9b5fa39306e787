"""Small models of transformers, for all tests."""

from typing import Any

import transformers as hf
from torch import nn


def llama(
    width: int = 64,
    num_layers: int = 3,
    num_words: int = 300,
    *,
    num_heads: int = 4,
    num_kv_heads: int = 2,
    inner: int | None = None,
    **options: Any,
) -> nn.Module:
    config = hf.LlamaConfig(
        hidden_size=width,
        intermediate_size=int(2.75 * width) if inner is None else inner,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=num_kv_heads,
        vocab_size=num_words,
        use_cache=False,
        **options,
    )
    return hf.LlamaForCausalLM(config)


def vit(width: int = 64, num_layers: int = 3, *, inner: int = 128, image_size: int = 32) -> nn.Module:
    config = hf.ViTConfig(
        hidden_size=width,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        intermediate_size=inner,
        image_size=image_size,
        patch_size=8,
        num_labels=5,
        problem_type="single_label_classification",  # transformers would set it in the first call: a recompilation
    )
    return hf.ViTForImageClassification(config)


def gpt2(width: int = 64, num_layers: int = 2, num_words: int = 300, *, dropout: float = 0.1) -> nn.Module:
    config = hf.GPT2Config(
        n_embd=width,
        n_layer=num_layers,
        n_head=4,
        n_positions=2048,
        vocab_size=num_words,
        use_cache=False,
        resid_pdrop=dropout,
        embd_pdrop=dropout,
        attn_pdrop=dropout,
        bos_token_id=0,
        eos_token_id=0,
    )
    return hf.GPT2LMHeadModel(config)


def t5(width: int = 64, num_layers: int = 2, num_words: int = 300) -> nn.Module:
    """An encoder and a decoder, with dropout."""
    config = hf.T5Config(
        d_model=width,
        d_kv=width // 4,
        d_ff=2 * width,
        num_layers=num_layers,
        num_heads=4,
        vocab_size=num_words,
        use_cache=False,
        decoder_start_token_id=0,
        pad_token_id=0,
    )
    return hf.T5ForConditionalGeneration(config)
