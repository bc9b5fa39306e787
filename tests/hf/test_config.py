"""A configuration beside TrainingArguments: filled in, compared, refused."""

import dataclasses
import json
import logging
import pickle

import pytest
import torch
import transformers
from torch import nn

from tests.hf.training import Rows, arguments, llama, trainer
from zgraph.engine.config.read import read_config
from zgraph.errors import ConfigError, UsageError
from zgraph.hf import Trainer, TrainingArguments, enable
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


def test_keys_without_effect_are_told_in_one_line(tmp_path, caplog):
    zero = {"stage": 2, "overlap_comm": True, "contiguous_gradients": True, "reduce_bucket_size": 5}
    with caplog.at_level(logging.INFO, "zgraph"):
        trainer(Trainer, tmp_path, {"zgraph": {"steps_per_print": 1, "zero_optimization": zero}})
        trainer(Trainer, tmp_path, {"zgraph": {"zero_optimization": {"stage": 2}}})
    (said,) = (record.getMessage() for record in caplog.records)
    assert said.startswith("without effect under a Trainer: zero_optimization.overlap_comm, ")
    assert "zero_optimization.contiguous_gradients (the pass `schedule` moves" in said
    assert "; zero_optimization.reduce_bucket_size (the pass `bucket`" in said
    assert said.endswith("; steps_per_print (logging_steps decides)")


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
    with pytest.raises(ConfigError, match=r"zgraph\.hf\.TrainingArguments or Trainer\(zgraph=...\) takes") as caught:
        Trainer(model=llama(), args=args)
    assert len(caught.value.problems) == 2
    args = arguments(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(ConfigError, match="deepspeed"):
        Trainer(model=llama(), args=args)


def deepspeeds(folder, source, kind=TrainingArguments, **options):
    """Arguments that name a file of DeepSpeed's, which is not installed."""
    return kind(**{**arguments(folder, **options).to_dict(), "fsdp_config": None, "deepspeed": source})


@pytest.mark.parametrize("as_text", [str, lambda path: path.read_text()], ids=["path", "JSON"])
def test_deepspeed_of_the_arguments_is_read_by_zgraph(tmp_path, as_text):
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({**AUTO, "zero_optimization": {"stage": 1}}))
    args = deepspeeds(tmp_path, as_text(path), learning_rate=3e-3, max_steps=2)
    copied = dataclasses.replace(pickle.loads(pickle.dumps(args)), max_steps=1)
    for given in (args, copied):
        made = Trainer(model=llama(), args=given, train_dataset=Rows())
        assert made.zgraph_config.keys.zero_optimization.stage == 1
        assert made.zgraph_config.optimizer.lr == 3e-3
    made.train()
    assert made.state.global_step == 1
    with pytest.raises(ConfigError, match="give one of them"):
        Trainer(model=llama(), args=args, zgraph={"zero_optimization": {"stage": 3}})


def test_another_trainer_does_not_pass_over_the_file(tmp_path):
    with pytest.raises(UsageError, match=r"zgraph\.hf\.enable\(MyTrainer\)"):
        transformers.Trainer(model=llama(), args=deepspeeds(tmp_path, "ds.json"))
    plain = transformers.Trainer(model=llama(), args=deepspeeds(tmp_path, None))
    assert plain.args.deepspeed_plugin is None


def test_any_class_of_arguments_can_be_enabled(tmp_path):
    kind = enable(transformers.Seq2SeqTrainingArguments)
    args = kind(str(tmp_path), use_cpu=True, report_to="none", deepspeed={"zero_optimization": {"stage": 2}})
    again = pickle.loads(pickle.dumps(args))
    assert type(again) is type(args) is enable(kind)
    assert Trainer(model=llama(), args=again).zgraph_config.keys.zero_optimization.stage == 2
    assert dataclasses.replace(args, seed=1).deepspeed == args.deepspeed
    parsed = transformers.HfArgumentParser(kind).parse_args_into_dataclasses(
        ["--output_dir", str(tmp_path), "--deepspeed", "ds.json", "--use_cpu"]
    )
    assert parsed[0].deepspeed == "ds.json"


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
