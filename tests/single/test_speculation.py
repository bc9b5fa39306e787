"""Tokens with a draft are those without, whatever the draft proposes, and what it proposed is counted."""

import pytest
import torch
import transformers as hf

import zgraph
from tests.deep import deep
from zgraph.errors import ContextLengthError, UsageError


def made(seed: int, vocab_size: int = 96) -> torch.nn.Module:
    torch.manual_seed(seed)
    config = hf.LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model = hf.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    return model


@pytest.fixture(scope="module")
def both():
    """A model, and two drafts: one that is as good, and one that knows nothing."""
    model, other = made(0), made(1)
    found = [zgraph.infer(m, max_batch=rows, max_len=48) for m, rows in ((model, 3), (model, 4), (other, 3))]
    return found, (model, other)


def prompts() -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 96, (3, 12), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :-4] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


@pytest.mark.parametrize("num_drafted", [4, deep(1)])
def test_tokens_are_those_without_a_draft(both, num_drafted):
    (inference, good, bad), _ = both
    given = {**prompts(), "max_new_tokens": 36, "pad_token_id": 1}
    free = inference.generate(**given)
    stop = int(free[1, 20])
    for more in ({}, {"eos_token_id": stop}, {"max_new_tokens": 1}):
        wanted = inference.generate(**{**given, **more})
        for draft in (good, bad):
            found = inference.generate(**{**given, **more}, draft=draft, num_drafted=num_drafted)
            assert torch.equal(found, wanted)
    inference.generate(**given, draft=good, num_drafted=num_drafted)
    assert inference.drafted.num_proposed > 0
    assert inference.drafted.num_proposed % num_drafted == 0
    assert inference.drafted.acceptance > 0.8
    inference.generate(**given, draft=bad, num_drafted=num_drafted)
    assert inference.drafted.acceptance < 0.5


def test_drafts_that_cannot_be_are_refused(both):
    (inference, good, _), _ = both
    given = {**prompts(), "max_new_tokens": 4}
    for wrong, words in (
        ({"draft": inference}, "a cache of its own"),
        ({"draft": "small"}, "another model"),
        ({"draft": good, "num_drafted": 0}, "above 0"),
        ({"draft": good, "do_sample": True}, "do_sample=True out"),
    ):
        with pytest.raises(UsageError, match=words):
            inference.generate(**given, **wrong)
    other = made(2, 64)
    with pytest.raises(UsageError, match="same vocabulary"):
        inference.generate(**given, draft=zgraph.infer(other, max_batch=3, max_len=48))
    with pytest.raises(ContextLengthError, match="max_len=50"):
        good.generate(prompts()["input_ids"][1:], max_new_tokens=38, draft=inference)
