"""A dtype is taken as torch's own or as a word for it, wherever one is."""

from __future__ import annotations

import pytest
import torch

import zgraph
from zgraph.bridge.dtypes import WORDS, as_dtype
from zgraph.engine.config.read import read_config
from zgraph.errors import ConfigError, DtypeError, UsageError

from .nets import Mlp, built, rows

SPELLINGS = [torch.bfloat16, "bf16", "bfloat16", "torch.bfloat16", "BF16", " bfloat16 "]


@pytest.mark.parametrize("given", SPELLINGS, ids=repr)
def test_every_spelling_is_one_dtype(given: torch.dtype | str) -> None:
    assert as_dtype(given, "param_dtype") is torch.bfloat16
    model = zgraph.compile(built(Mlp), param_dtype=given, reduce_dtype=given)
    assert model(*rows(0)).dtype is torch.bfloat16
    plan = zgraph.plan(Mlp(), *rows(0), hardware="1x2-h100", stage=3, param_dtype=given)
    assert plan == zgraph.plan(Mlp(), *rows(0), hardware="1x2-h100", stage=3, param_dtype=torch.bfloat16)
    assert zgraph.trace(Mlp(), *rows(0), param_dtype=given).params[0].value.tensor.dtype.value == "bf16"


def test_words_are_what_they_say() -> None:
    for word, dtype in WORDS.items():
        assert as_dtype(f"torch.{word}", "x") is dtype
        if hasattr(torch, word):
            assert getattr(torch, word) is dtype


@pytest.mark.parametrize("given", ["b16", "int8", "", torch.int32, torch.bool, 16, None], ids=repr)
def test_what_is_none_is_one_error(given: object) -> None:
    assert issubclass(DtypeError, UsageError)
    with pytest.raises(DtypeError, match=r"param_dtype is one of bf16, f16, f32, f64 \(or .*not "):
        as_dtype(given, "param_dtype")  # type: ignore[arg-type]


def test_options_name_themselves() -> None:
    for call in (
        zgraph.compile,
        lambda model, **o: zgraph.trace(model, *rows(0), **o),
        lambda model, **o: zgraph.plan(model, *rows(0), **o),
    ):
        with pytest.raises(DtypeError, match="param_dtype is one of"):
            call(Mlp(), param_dtype="brain16")
    with pytest.raises(DtypeError, match="reduce_dtype is one of"):
        zgraph.compile(Mlp(), reduce_dtype="int8")


@pytest.mark.parametrize("word", ["bf16", "bfloat16", "torch.bfloat16", "fp32", "half"])
def test_the_engines_configuration_takes_the_same_words(word: str) -> None:
    source = {"train_micro_batch_size_per_gpu": 1, "communication_data_type": word}
    assert as_dtype(read_config(source, world_size=1).keys.communication_data_type, "x") is as_dtype(word, "x")


def test_the_engines_configuration_says_what_is_wrong() -> None:
    with pytest.raises(ConfigError, match=r"communication_data_type: a dtype is one of bf16.*'int4'"):
        read_config({"train_micro_batch_size_per_gpu": 1, "communication_data_type": "int4"}, world_size=1)
