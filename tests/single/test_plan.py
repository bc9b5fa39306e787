"""Plans for hardware that is not here."""

import pytest
import torch
import transformers as hf
from torch import nn

import zgraph
from zgraph import plans
from zgraph.errors import HardwareError, UsageError

IDS = torch.zeros(2, 64, dtype=torch.int64)
BATCH = {"input_ids": IDS, "labels": IDS}


def llama(num_layers: int = 5) -> nn.Module:
    with torch.device("meta"):
        return hf.LlamaForCausalLM(
            hf.LlamaConfig(
                hidden_size=64,
                intermediate_size=176,
                num_hidden_layers=num_layers,
                num_attention_heads=4,
                num_key_value_heads=2,
                vocab_size=300,
                use_cache=False,
            )
        )


def t5() -> nn.Module:
    """Two stacks of layers, whose first layers differ from the others."""
    config = hf.T5Config(d_model=32, d_kv=8, d_ff=64, num_layers=4, num_heads=4, vocab_size=100, use_cache=False,
                         decoder_start_token_id=0, pad_token_id=0)  # fmt: skip
    with torch.device("meta"):
        return hf.T5ForConditionalGeneration(config)


@pytest.mark.parametrize("build", [llama, t5])
@pytest.mark.parametrize("num_ranks", [1, 8])
def test_a_model_grown_from_few_layers_is_the_whole_model(build, num_ranks, monkeypatch):
    model = build()
    names = list(model.state_dict())
    grown = zgraph.plan(model, **BATCH, hardware="8x8-a100-80", num_ranks=num_ranks)
    monkeypatch.setattr(plans, "_are_alike", lambda stack: False)
    whole = zgraph.plan(model, **BATCH, hardware="8x8-a100-80", num_ranks=num_ranks)
    assert list(model.state_dict()) == names
    for a, b in zip(grown.stages, whole.stages, strict=True):
        assert a.rest_bytes == b.rest_bytes
        assert a.sent_bytes == b.sent_bytes
        assert a.total_bytes == pytest.approx(b.total_bytes, rel=0.01)
        assert a.step_us == pytest.approx(b.step_us, rel=0.05)


@pytest.mark.parametrize("num_ranks", [1, 4])
def test_bytes_at_rest_are_those_of_adamw(num_ranks):
    """Twelve bytes a parameter, over the ranks from stage 1 on; here all sizes divide."""
    found = zgraph.plan(llama(), **BATCH, hardware="1x4-h100", num_ranks=num_ranks)
    for plan in found.stages:
        share = num_ranks if plan.stage else 1
        assert plan.rest_bytes["parameters"] + plan.rest_bytes["optimizer"] == 12 * found.num_parameters // share
    assert [p.stage for p in found.stages] == [0, 1, 2, 3]


def test_a_budget_is_met_by_computing_again_or_is_said_not_to_be():
    roomy = zgraph.plan(llama(), **BATCH, hardware="h100", num_ranks=1, stage=3)
    (plan,) = roomy.stages
    assert plan.fits
    assert plan.again_share == 0
    assert plan.needed_bytes < plan.total_bytes
    middle = (plan.needed_bytes + plan.total_bytes) // 2
    (tight,) = zgraph.plan(llama(), **BATCH, hardware="h100", num_ranks=1, stage=3, memory_budget=middle).stages
    assert tight.fits
    assert tight.total_bytes <= middle
    assert tight.step_us > plan.step_us
    none = zgraph.plan(llama(), **BATCH, hardware="h100", num_ranks=1, stage=3, memory_budget=plan.needed_bytes // 2)
    assert none.best is None
    assert "no stage fits" in none.reason
    assert "take more ranks" in str(none)


def test_the_stage_is_chosen_for_speed_among_those_that_fit():
    roomy = zgraph.plan(llama(), **BATCH, hardware="8x8-h100")
    assert roomy.num_ranks == 64
    assert roomy.best is not None
    assert all(roomy.best.step_us <= 1.01 * p.step_us for p in roomy.stages)
    least = min(p.total_bytes for p in roomy.stages)
    tight = zgraph.plan(llama(), **BATCH, hardware="8x8-h100", memory_budget=least)
    assert tight.best is not None
    assert tight.best.total_bytes <= least
    assert f"stage {tight.best.stage}: the fastest that fits" in str(tight)


def test_mistakes_are_named():
    with pytest.raises(HardwareError, match="did you mean h100"):
        zgraph.plan(llama(), **BATCH, hardware="h10")
    with pytest.raises(UsageError, match="stage must be"):
        zgraph.plan(llama(), **BATCH, stage=4)
    with pytest.raises(UsageError, match="num_ranks"):
        zgraph.plan(llama(), **BATCH, num_ranks=0)
    with pytest.raises(HardwareError, match="do not fill hosts"):
        zgraph.plan(llama(), **BATCH, hardware="8x8-h100", num_ranks=12)
