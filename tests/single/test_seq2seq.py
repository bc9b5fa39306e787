"""Answers of encoders with decoders are those of transformers' generate."""

import pytest
import torch
import transformers as hf
from transformers.generation import GenerationMixin

import zgraph
from tests.deep import deep
from zgraph.errors import ContextLengthError, UsageError


def t5(**more: object) -> torch.nn.Module:
    config = hf.T5Config(vocab_size=96, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, **more)
    return hf.T5ForConditionalGeneration(config)


def whisper() -> torch.nn.Module:
    config = hf.WhisperConfig(
        vocab_size=96,
        num_mel_bins=8,
        d_model=32,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        max_source_positions=20,
        max_target_positions=32,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
    )
    return hf.WhisperForConditionalGeneration(config)


def bart() -> torch.nn.Module:
    config = hf.BartConfig(
        vocab_size=96,
        d_model=32,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        max_position_embeddings=64,
    )
    return hf.BartForConditionalGeneration(config)


def made(make, scale: float = 3.0) -> torch.nn.Module:
    """A small model whose likeliest tokens vary."""
    torch.manual_seed(0)
    model = make().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(scale)
    model.generation_config = hf.GenerationConfig(
        pad_token_id=0, eos_token_id=2, decoder_start_token_id=1, bos_token_id=1
    )
    return model


def sources() -> dict[str, torch.Tensor]:
    """Sources of 4, of 11 and of 9 tokens, padded on either side."""
    ids = torch.randint(3, 96, (3, 11), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, 4:], mask[2, :2] = 0, 0
    return {"attention_mask": mask, "inputs": ids * mask}


@pytest.mark.parametrize("make", [t5, deep(lambda: t5(feed_forward_proj="gated-gelu")), deep(bart)])
def test_answers_are_transformers(make):
    model, given = made(make), sources()
    found = zgraph.infer(model, max_batch=4, max_len=32, max_source=16)
    begin = torch.tensor([[1, 5, 7]] * 3)
    for more in ({}, {"decoder_input_ids": begin}):
        wanted = GenerationMixin.generate(model, **given, **more, max_new_tokens=14, do_sample=False)
        assert torch.equal(found.generate(**given, **more, max_new_tokens=14), wanted)
        assert wanted[:, -5:].unique().numel() > 2
    alone = found.generate(given["inputs"][:1, :4], max_new_tokens=14)
    assert torch.equal(alone, found.generate(**given, max_new_tokens=14)[:1, : alone.shape[1]])
    torch.manual_seed(3)
    drawn = GenerationMixin.generate(model, **given, max_new_tokens=6, do_sample=True, top_k=20)
    torch.manual_seed(3)
    assert torch.equal(found.generate(**given, max_new_tokens=6, do_sample=True, top_k=20), drawn)
    for wrong, kind, words in (
        ({"max_new_tokens": 33}, ContextLengthError, "max_len=33"),
        ({"inputs": torch.ones(1, 17, dtype=torch.int64), "attention_mask": None}, ContextLengthError, "max_source=17"),
        ({"inputs": torch.ones(5, 2, dtype=torch.int64), "attention_mask": None}, UsageError, "max_batch=5"),
        ({"inputs": torch.full((1, 2), 96), "attention_mask": None}, UsageError, "outside of 0 to 95"),
        ({"attention_mask": torch.zeros(3, 11)}, UsageError, "no token"),
        ({"decoder_input_ids": torch.ones(2, 1, dtype=torch.int64)}, UsageError, "a row for each source"),
    ):
        with pytest.raises(kind, match=words):
            found.generate(**{"max_new_tokens": 2, **given, **wrong})


def test_what_is_heard_is_written_as_by_transformers():
    model = made(whisper)
    found = zgraph.infer(model, max_batch=2, max_len=24)
    features = torch.randn(2, 8, 40, generator=torch.Generator().manual_seed(0))
    begin = torch.tensor([[1, 9, 11, 4]] * 2)
    wanted = GenerationMixin.generate(model, features, decoder_input_ids=begin, max_new_tokens=16, do_sample=False)
    assert torch.equal(found.generate(features, decoder_input_ids=begin, max_new_tokens=16), wanted)
    with torch.no_grad():
        model.proj_out.weight.mul_(-1)
    other = GenerationMixin.generate(model, features, decoder_input_ids=begin, max_new_tokens=4, do_sample=False)
    assert torch.equal(found.generate(features, decoder_input_ids=begin, max_new_tokens=4), other)
    assert not torch.equal(wanted[:, :8], other)
    with pytest.raises(UsageError, match="numbers a row"):
        found.generate(features[:, :, :20], max_new_tokens=2)
    with pytest.raises(UsageError, match="no attention_mask"):
        found.generate(features, torch.ones(2, 40), max_new_tokens=2)
    with pytest.raises(UsageError, match="one size"):
        zgraph.infer(model, max_source=5)
