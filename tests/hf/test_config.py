"""A configuration beside TrainingArguments: filled in, compared, refused."""

import json
import logging

import pytest
import torch
import transformers
from torch import nn

from tests.hf.training import arguments, llama, trainer
from zgraph.engine.config.read import read_config
from zgraph.errors import ConfigError, UsageError
from zgraph.hf import Trainer, enable
from zgraph.hf.config import filled

AUTO = {
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "fp16": {"enabled": "auto"},
    "bf16": {"enabled": "auto"},
    "zero_optimization": {
        "stage": 2,
        "reduce_bucket_size": "auto",
        "stage3_param_persistence_threshold": "auto",
    },
    "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"}},
    "scheduler": {
        "type": "WarmupDecayLR",
        "params": {
            "warmup_min_lr": "auto",
            "warmup_max_lr": "auto",
            "warmup_num_steps": "auto",
            "total_num_steps": "auto",
        },
    },
}


def test_auto_is_filled_in_from_training_arguments(tmp_path):
    args = arguments(tmp_path, bf16=True, adam_beta2=0.95, adam_epsilon=1e-6, warmup_steps=3)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(AUTO))
    for source in (AUTO, path):
        read = read_config(filled(source, args, num_steps=20), world_size=args.world_size)
        assert (read.micro_batch, read.accumulation, read.train_batch) == (2, 2, 4)
        assert read.keys.bf16.enabled
        assert not read.keys.fp16.enabled
        assert read.keys.gradient_clipping == 0.5
        assert read.keys.zero_optimization.stage == 2
        assert read.optimizer.model_dump(include={"lr", "betas", "eps", "weight_decay"}) == {
            "lr": 1e-2,
            "betas": (0.9, 0.95),
            "eps": 1e-6,
            "weight_decay": 0.1,
        }
        assert read.schedule.rates(2, [1.0]) == [pytest.approx(1e-2)]  # three steps of warming up
        assert read.schedule.rates(20, [1.0]) == [0]
    assert AUTO["train_batch_size"] == "auto"


def test_what_is_left_out_is_filled_in_too(tmp_path):
    found = filled({"optimizer": {"type": "SGD"}}, arguments(tmp_path))
    assert found["optimizer"]["params"] == {"lr": 1e-2, "weight_decay": 0.1}
    assert read_config(found, world_size=1).train_batch == 4


def test_all_contradictions_are_told_at_once(tmp_path):
    config = {
        "train_batch_size": 5,
        "gradient_clipping": 1.0,
        "fp16": {"enabled": True, "loss_scale": "auto"},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "betas": [0.9, 0.9]}},
        "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 7}},
    }
    with pytest.raises(ConfigError) as caught:
        filled(config, arguments(tmp_path), num_steps=6)
    places = [problem.split(":")[0] for problem in caught.value.problems]
    assert places == [
        "train_batch_size",
        "gradient_clipping",
        "fp16.enabled",
        "optimizer.params.lr",
        "optimizer.params.betas",
        "scheduler.params.warmup_num_steps",
        "fp16.loss_scale",
    ]
    assert "it is 5 here, and 4 by per_device_train_batch_size x" in caught.value.problems[0]


def test_keys_of_the_engine_alone_say_what_decides(tmp_path, caplog):
    with caplog.at_level(logging.INFO, "zgraph"):
        filled({"tensorboard": {"enabled": True}}, arguments(tmp_path))
    assert "tensorboard has no effect under a Trainer: report_to decides" in caplog.text


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"torch_compile": True}, "torch_compile: zgraph compiles"),
        ({"bf16_full_eval": True}, "give fp16 or bf16 instead"),
        ({"auto_find_batch_size": True}, "give per_device_train_batch_size"),
    ],
)
def test_what_zgraph_takes_the_place_of_is_refused(tmp_path, options, said):
    with pytest.raises(ConfigError, match=said):
        trainer(Trainer, tmp_path, **options)


def test_deepspeed_is_refused_with_where_its_file_goes(tmp_path, monkeypatch):
    args = arguments(tmp_path)
    args.deepspeed = "ds.json"  # TrainingArguments that are made with it need the package
    args.fsdp = True
    with pytest.raises(ConfigError, match=r"leave it out, Trainer\(zgraph=...\) or ZGRAPH_CONFIG takes") as caught:
        Trainer(model=llama(), args=args)
    assert len(caught.value.problems) == 2
    args = arguments(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(ConfigError, match="deepspeed"):
        Trainer(model=llama(), args=args)


def test_the_configuration_may_come_from_the_environment(tmp_path, monkeypatch):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 1}}))
    assert trainer(Trainer, tmp_path).zgraph_config.keys.zero_optimization.stage == 3
    monkeypatch.setenv("ZGRAPH_CONFIG", str(path))
    assert trainer(Trainer, tmp_path).zgraph_config.keys.zero_optimization.stage == 1
    given = {"zgraph": {"zero_optimization": {"stage": 2}}}
    assert trainer(Trainer, tmp_path, given).zgraph_config.keys.zero_optimization.stage == 2


def test_any_class_of_trainer_can_be_enabled():
    class Mine(transformers.Trainer):
        pass

    made = enable(Mine)
    assert issubclass(made, Mine)
    assert made.__name__ == "Mine"
    assert enable(made) is made
    assert enable(Mine) is made
    with pytest.raises(UsageError, match="derived from"):
        enable(nn.Module)


def test_a_foreign_optimizer_is_refused(tmp_path):
    stranger = torch.optim.SGD(nn.Linear(2, 2).parameters(), 0.1)
    with pytest.raises(UsageError, match="not the model's"):
        trainer(Trainer, tmp_path, {"optimizers": (stranger, None)}).train()
