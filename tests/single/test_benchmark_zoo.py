"""The benchmark of many architectures: its small configurations, its comparison, what it tries, and its page."""

from __future__ import annotations

from dataclasses import asdict, replace

import pytest
import torch
from torch import nn

transformers = pytest.importorskip("transformers")

from benchmarks.zoo import Outcome, Step, a_third, eager, largest_difference  # noqa: E402
from benchmarks.zoo_inputs import Inputs, loss_of, runnable  # noqa: E402
from benchmarks.zoo_models import Architecture, architectures, kind_of  # noqa: E402
from benchmarks.zoo_page import page  # noqa: E402
from benchmarks.zoo_sizes import VARIANTS, Variant, small  # noqa: E402
from benchmarks.zoo_torch import MODELS  # noqa: E402

ENVIRONMENT = {"transformers": "5", "torch": "2", "machine": "x86_64"}


def outcome(name: str, task: str = "masked LM", **fields: object) -> Outcome:
    return replace(Outcome(name, task, name, "whole graph"), **fields)


@pytest.mark.parametrize("name", MODELS)
def test_a_model_of_torch_runs_eagerly_and_all_of_it_learns(name):
    model, inputs = runnable(Architecture(name, "torch", name))
    first, second = eager(model, inputs, 1)
    assert first.loss > 0
    assert second.loss != first.loss
    assert all(float(gradient.abs().max()) > 0 for gradient in first.gradients.values())


def test_sizes_are_shrunk_in_all_parts_of_a_configuration():
    config = small(transformers.LlavaConfig)
    assert config.vision_config.image_size == 32
    assert config.vision_config.num_hidden_layers == 2
    assert config.text_config.hidden_size == 64
    assert config.text_config.vocab_size == 100


def test_a_field_of_layers_that_differ_is_shrunk_too():
    config = small(transformers.Gemma4TextConfig)
    assert config.num_hidden_layers == 2
    assert vars(config)["head_dim"] == 16


@pytest.mark.parametrize("kind", ["Qwen2_5_VLTextConfig", "Ernie4_5_VLMoeTextConfig"])
def test_sections_of_rotary_embeddings_fill_half_a_head(kind):
    config = small(getattr(transformers, kind), Variant("sections", sections=True))
    assert sum(config.rope_parameters["mrope_section"]) == 8


def test_a_variant_keeps_or_sets_the_fields_that_it_names():
    kept = small(transformers.ConvNextConfig, Variant("kept", kept="depths"))
    assert tuple(kept.depths) == (3, 3, 9, 3)
    assert max(kept.hidden_sizes) <= 64
    assert small(transformers.ViTConfig, Variant("larger", {"image_size": 64})).image_size == 64


def test_images_are_given_as_a_model_wants_them():
    model, _ = runnable(Architecture("vit", "image classification", "ViTForImageClassification"))
    shapes = [
        Inputs(model, "image classification", images=images).batch(0)["pixel_values"].shape
        for images in ("", "in a list")
    ]
    assert shapes == [(2, 3, 32, 32), (2, 1, 3, 32, 32)]


def test_a_model_is_of_one_task_and_what_reads_images_is_no_causal_lm():
    found = architectures()
    assert len({a.name for a in found}) == len(found) > 400
    assert {a.task for a in found if a.name in ("gemma3", "llama", "mamba")} == {"vision-language", "causal LM"}
    assert kind_of("mamba", "causal LM") == "state space or recurrent"
    assert kind_of("mixtral", "causal LM") == "mixture of experts"
    assert kind_of("llama", "causal LM") == "causal LM"


def test_a_wrong_gradient_is_found_and_rounding_is_not():
    right = Step(1.0, {"large": torch.ones(3), "tiny": torch.full((3,), 1e-8)})
    rounded = Step(1.0, {"large": torch.ones(3), "tiny": torch.zeros(3)})
    wrong = Step(1.0, {"large": torch.tensor([1.0, 1.0, 1.5]), "tiny": torch.zeros(3)})
    nothing = Step(1.0, {"large": torch.full((3,), torch.nan), "tiny": torch.zeros(3)})
    assert largest_difference([rounded], [right])[0] == 0
    assert largest_difference([wrong], [right]) == (0.5, "gradient large of step 1")
    assert largest_difference([nothing], [right])[0] == float("inf")


def test_a_third_has_the_quickest_of_each_task_and_verdict():
    found = [outcome(f"m{i}", seconds=float(9 - i)) for i in range(6)]
    found += [outcome("piecewise", verdict="pieces", seconds=50.0), outcome("bad", verdict="wrong")]
    found += [outcome("nn.A", "torch"), outcome("nn.B", "torch")]
    assert a_third(found) == {"m5", "m4", "piecewise", "nn.A", "nn.B"}


def test_the_page_counts_what_trains_and_names_what_does_not():
    found = [
        outcome("one"),
        outcome("two", verdict="pieces", graphs=3, message="GraphBreakError: x: Data-dependent branching"),
        outcome("three", verdict="refused", message="CaptureError: no"),
        outcome("four", verdict="not built", message="ImportError: natten"),
        outcome("nn.LSTM", "torch"),
        outcome("rounded", difference=0.02, double_difference=1e-12, where="gradient w"),
        outcome("one", num_ranks=2),
        outcome("two", num_ranks=2, verdict="refused", message="PlanMismatchError: rank 0 waits for w"),
    ]
    text = page([asdict(o) for o in found], ENVIRONMENT, 10)
    assert "Of 4 architectures of transformers 5 that run eagerly, 3 train at stage 3: 2 as one graph" in text
    assert "Of 1 models of torch's own layers (nn.LSTM), 1 train" in text
    assert "| two | 3 | an `if` on the value of a tensor |" in text
    assert "| three | refused | `CaptureError: no` |" in text
    assert "| four | `ImportError: natten` |" in text
    assert "| rounded | 2e-02 | 1e-12 | gradient w |" in text
    assert "2 of the architectures of transformers ran on two ranks" in text
    assert 'two (refused: each rank\'s data decides what runs, which wants `fullgraph="eager"`)' in text


def test_a_loss_is_made_of_what_a_model_without_one_returns():
    hidden = nn.Linear(2, 2)(torch.ones(1, 2))
    assert float(loss_of({"hidden": hidden, "ids": torch.ones(1, dtype=torch.int64)}).detach()) == pytest.approx(
        float(hidden.detach().square().mean())
    )
    with pytest.raises(ValueError, match="nothing to train"):
        loss_of({"ids": torch.ones(1)})


def test_variants_begin_with_the_usual_one():
    assert VARIANTS[0] == Variant("usual")
    assert len({variant.name for variant in VARIANTS}) == len(VARIANTS)
