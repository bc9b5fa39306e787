"""Hidden states and router logits, which transformers records by hooks that it installs within a forward."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers as hf
from torch import nn

import small
import zgraph

IDS = torch.arange(24).reshape(2, 12)


def hidden(model: nn.Module, **options: Any) -> Any:
    return model(input_ids=IDS, labels=IDS, **options)


def same(found: Any, wanted: Any) -> None:
    torch.testing.assert_close(found.loss, wanted.loss, rtol=0, atol=0)
    assert len(found.hidden_states) == len(wanted.hidden_states) > 2
    for ours, theirs in zip(found.hidden_states, wanted.hidden_states, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def num_hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) for module in model.modules())


@pytest.mark.parametrize("fullgraph", [True, False])
@pytest.mark.parametrize("build", [small.llama, small.gpt2], ids=["llama", "gpt2"])
def test_they_are_those_of_the_plain_model_whenever_they_are_asked_for(build: Any, fullgraph: bool) -> None:
    torch.manual_seed(0)
    plain = build().eval()
    model = zgraph.compile(copy.deepcopy(plain), stage=3, fullgraph=fullgraph)
    for options in ({"output_hidden_states": True}, {}, {"output_hidden_states": True}):
        found, wanted = hidden(model, **options), hidden(plain, **options)
        assert (found.hidden_states is None) == (not options)
        if options:
            same(found, wanted)
        found.loss.backward()


def test_a_call_that_records_nothing_has_no_hooks_and_one_that_does_is_captured_once() -> None:
    model = zgraph.compile(small.llama(), stage=3)
    hidden(model).loss.backward()
    assert num_hooks(model) == 0
    for _ in range(2):
        hidden(model, output_hidden_states=True).loss.backward()
    assert num_hooks(model) > 0
    hidden(model).loss.backward()
    assert len(zgraph.report(model).entries) == 2


def test_a_configuration_that_asks_for_them() -> None:
    torch.manual_seed(0)
    plain = small.llama(output_hidden_states=True)
    model = zgraph.compile(copy.deepcopy(plain), stage=3)
    same(hidden(model), hidden(plain))
    same(hidden(model), hidden(plain))
    assert len(zgraph.report(model).entries) == 1


def test_router_logits_of_experts() -> None:
    torch.manual_seed(0)
    config = hf.Qwen3MoeConfig(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=32,
        moe_intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
        num_experts=4,
        num_experts_per_tok=2,
        output_router_logits=True,
        use_cache=False,
    )
    plain = hf.Qwen3MoeForCausalLM(config)
    model = zgraph.compile(copy.deepcopy(plain), stage=3)
    found, wanted = hidden(model), hidden(plain)
    torch.testing.assert_close(found.aux_loss, wanted.aux_loss)
    torch.testing.assert_close(found.loss, wanted.loss)
