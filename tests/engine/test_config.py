"""The configuration: DeepSpeed's keys act, or say what decides instead; all that is wrong is told at once."""

import base64
import json
import math
import pickle
import random

import pytest
import torch
from torch import nn

import zgraph
from zgraph.engine.config.keys import EngineConfig
from zgraph.engine.config.lr_schedules import SCHEDULES, Scheduler
from zgraph.engine.config.optimizers import OPTIMIZERS, AdamWParams
from zgraph.engine.config.read import read_config
from zgraph.engine.config.sections import Section
from zgraph.engine.initialize import quantised
from zgraph.errors import ConfigError, UsageError

LEAST = {"train_batch_size": 8}


def problems(config, world_size=1):
    with pytest.raises(ConfigError) as caught:
        read_config(config, world_size=world_size)
    return caught.value.problems


@pytest.mark.parametrize(
    ("keys", "ranks", "micro", "steps", "train"),
    [
        ({"train_batch_size": 256}, 4, 64, 1, 256),
        ({"train_micro_batch_size_per_gpu": 4}, 2, 4, 1, 8),
        ({"train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 3}, 2, 4, 3, 24),
        ({"train_batch_size": 32, "gradient_accumulation_steps": 4}, 2, 4, 4, 32),
        ({"train_batch_size": 32, "train_micro_batch_size_per_gpu": 2}, 4, 2, 4, 32),
        ({"train_batch_size": 32, "train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 4}, 4, 2, 4, 32),
    ],
)
def test_batch_sizes_follow_from_each_other(keys, ranks, micro, steps, train):
    config = read_config(keys, world_size=ranks)
    assert (config.micro_batch, config.accumulation, config.train_batch) == (micro, steps, train)


@pytest.mark.parametrize(
    ("keys", "ranks"),
    [
        ({"train_batch_size": 10}, 4),
        ({"train_batch_size": 2}, 4),
        ({"train_batch_size": 32, "train_micro_batch_size_per_gpu": 3}, 2),
        ({"train_batch_size": 32, "train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 4}, 2),
        ({"gradient_accumulation_steps": 4}, 2),
        ({}, 1),
    ],
)
def test_batch_sizes_that_do_not_fit(keys, ranks):
    (problem,) = problems(keys, ranks)
    assert "train_batch_size" in problem


def test_all_problems_are_told_at_once_with_the_nearest_keys():
    found = problems(
        {
            "train_batch_sze": 8,
            "train_batch_size": 8,
            "zero_optimization": {"stage": 4, "overlap_com": True, "zero_quantized_nontrainable_weights": True},
            "optimizer": {"type": "AdamX"},
            "scheduler": {"type": "WarmupLR", "params": {"warmup_steps": 1, "warmup_num_steps": -1}},
            "fp16": {"enabled": "maybe"},
        }
    )
    assert [problem.partition(":")[0] for problem in found] == [
        "train_batch_sze",
        "zero_optimization.overlap_com",
        "zero_optimization.zero_quantized_nontrainable_weights",
        "fp16.enabled",
        "zero_optimization.stage",
        "optimizer.type",
        "scheduler.params.warmup_steps",
        "scheduler.params.warmup_num_steps",
    ]
    assert "did you mean train_batch_size?" in found[0]
    assert "did you mean overlap_comm?" in found[1]


def test_an_error_goes_between_processes():
    with pytest.raises(ConfigError) as caught:
        read_config({"seed": -1}, world_size=1)
    again = pickle.loads(pickle.dumps(caught.value))
    assert (again.problems, str(again)) == (caught.value.problems, str(caught.value))


@pytest.mark.parametrize(
    ("stage", "keys", "place"),
    [
        (2, {"offload_param": {"device": "cpu"}}, "zero_optimization.offload_param"),
        (0, {"cpu_offload": True}, "zero_optimization.offload_optimizer"),
    ],
)
def test_what_a_stage_cannot_offload_is_told(stage, keys, place):
    (note,) = read_config({**LEAST, "zero_optimization": {"stage": stage, **keys}}, world_size=1).notes
    assert note.startswith(f"{place} has no effect")


def test_what_zgraph_decides_is_accepted_with_a_line_that_says_so(caplog):
    keys = {**LEAST, "zero_optimization": {"stage": 2, "reduce_bucket_size": 5e8, "overlap_comm": True}}
    zgraph.initialize(model=nn.Linear(2, 2), config=keys)
    assert [record.message.partition(" has no effect: ")[0] for record in caplog.records] == [
        "zero_optimization.reduce_bucket_size",
        "zero_optimization.overlap_comm",
    ]
    assert "the pass `bucket`" in caplog.text


@pytest.mark.parametrize(
    ("keys", "place"),
    [
        ({"fp16": {"enabled": True}, "bf16": {"enabled": True}}, "fp16.enabled"),
        (
            {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme"}}},
            "zero_optimization.offload_optimizer.nvme_path",
        ),
        ({"tensor_parallel": {"autotp_size": 2}}, "tensor_parallel.autotp_size: 1 ranks are no multiple of 2"),
        ({"sequence_parallel_size": 2}, "sequence_parallel_size: 1 ranks are no multiple of 2"),
        ({"expert_parallel": {"enabled": True, "autoep_size": 2}}, "expert_parallel.autoep_size: 1 ranks are no"),
        ({"moe": {"enabled": True}}, 'moe: zgraph does not have this; say "expert_parallel"'),
        ({"tensor_parallel": {"tp": {"tp_size": 2}}}, "tensor_parallel.tp"),
        ({"zgraph": {"sequence_parallel": True}}, "zgraph.sequence_parallel"),
        ({"gradient_clipping": "auto"}, "gradient_clipping"),
        ({"gradient_allreduce_op": "sum"}, "gradient_allreduce_op"),
        ({"managed_gradient_accumulation": False}, "managed_gradient_accumulation"),
        ({"data_types": {"buffer_dtype": "bf16"}}, "data_types.buffer_dtype"),
        ({"zero_optimization": {"mics_shard_size": 2}}, "zero_optimization.mics_shard_size"),
        ({"checkpoint": {"tag_validation": "foo"}}, "checkpoint.tag_validation"),
        ({"checkpoint": {"memory_limit": "4 KiB"}}, "checkpoint.memory_limit: give at least 65536 bytes"),
        ({"zgraph": {"compress": "q9"}}, "zgraph.compress: there is no codec called q9"),
        ({"zgraph": {"compress": {"weights": "q4"}}}, "zgraph.compress: compress must be a codec"),
        ({"optimizer": {"type": "OneBitAdam"}}, 'optimizer.type: there is no OneBitAdam; take "AdamW" with zgraph.com'),
    ],
)
def test_what_does_not_go_together_or_is_not_there(keys, place):
    (problem,) = problems({**LEAST, **keys})
    assert problem.startswith(place)


def test_sequences_are_shared_in_one_way():
    keys = {**LEAST, "sequence_parallel_size": 2, "tensor_parallel": {"autotp_size": 2}}
    assert read_config(keys, world_size=8).world_size == 2
    with pytest.raises(ConfigError, match="sequence_parallel_size cuts the sequence already"):
        read_config({**keys, "zgraph": {"sequence_parallel": True}}, world_size=8)


def test_ranks_that_share_experts_have_batches_of_their_own():
    keys = {**LEAST, "expert_parallel": {"enabled": True, "autoep_size": 2, "preset_model": "mixtral"}}
    read = read_config(keys, world_size=8)
    assert (read.world_size, read.together, read.alike) == (8, 2, 1)
    assert read.train_batch == read.micro_batch * read.accumulation * 8
    assert [note.partition(" ")[0] for note in read.notes] == ["expert_parallel.preset_model"]
    assert read_config({**keys, "expert_parallel": {"autoep_size": 2}}, world_size=8).together == 1
    beside = read_config({**keys, "tensor_parallel": {"autotp_size": 2}}, world_size=8)
    assert (beside.world_size, beside.together, beside.alike) == (4, 4, 2)
    beside = read_config({**keys, "sequence_parallel_size": 2}, world_size=8)
    assert (beside.world_size, beside.together, beside.alike) == (4, 4, 2)


def test_what_a_configuration_may_say_as_it_is_so_anyhow():
    keys = {"gradient_allreduce_op": "mean", "data_types": {"buffer_dtype": None}}
    read = read_config({**LEAST, **keys, "checkpoint": {"tag_validation": "FAIL"}}, world_size=1)
    assert (read.keys.checkpoint.tag_validation, read.notes) == ("fail", ())


@pytest.mark.parametrize(
    ("keys", "is_asynchronous"),
    [
        ({}, True),
        ({"asynchronous": False}, False),
        ({"writer": {"type": "FAST", "decoupled": False}}, False),
        ({"asynchronous": True, "writer": {"decoupled": False}}, True),
    ],
)
def test_checkpoints_are_written_meanwhile_unless_it_is_said(keys, is_asynchronous):
    read = read_config({**LEAST, "checkpoint": {**keys, "memory_limit": "1MiB"}}, world_size=1).keys.checkpoint
    assert (read.is_asynchronous, read.memory_limit) == (is_asynchronous, 1 << 20)


def test_keys_of_old():
    zero = {"cpu_offload": True, "stage": 2, "cpu_offload_param": False}
    keys = read_config({**LEAST, "zero_optimization": zero, "bfloat16": {"enabled": True}}, world_size=1).keys
    assert keys.zero_optimization.offload_optimizer.device == "cpu"
    assert keys.bf16.enabled
    assert read_config({**LEAST, "zero_optimization": True}, world_size=1).keys.zero_optimization.stage == 1


def test_auto_for_what_zgraph_decides_anyhow():
    zero = {"stage": 3, "reduce_bucket_size": "auto", "stage3_prefetch_bucket_size": "auto"}
    assert read_config({**LEAST, "zero_optimization": zero}, world_size=1).keys.zero_optimization.stage == 3


def test_a_path_and_base64(tmp_path):
    text = json.dumps({**LEAST, "optimizer": {"type": "adamw", "params": {"lr": 0.1}}})
    (tmp_path / "ds.json").write_text(text)
    for source in (tmp_path / "ds.json", str(tmp_path / "ds.json"), base64.urlsafe_b64encode(text.encode()).decode()):
        assert read_config(source, world_size=1).optimizer == AdamWParams(lr=0.1)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "is no JSON"),
        ("[]", "holds no JSON object"),
        ('{"seed": 1, "seed": 2}', "seed: the key is there twice"),
        ("[" * 100_000, "is no JSON"),
    ],
)
def test_files_that_are_no_configuration(tmp_path, text, says):
    (tmp_path / "ds.json").write_text(text)
    (problem,) = problems(tmp_path / "ds.json")
    assert says in problem


def test_neither_a_file_nor_base64():
    assert "there is no file nowhere.json" in problems("nowhere.json")[0]
    assert "must be a dict" in problems(3)[0]


# --- fuzzed ------------------------------------------------------------------------------------------------------

SCALARS = (
    None,
    True,
    False,
    -1,
    0,
    1,
    2,
    3,
    8,
    10**10,
    0.5,
    1e-3,
    -0.1,
    math.inf,
    math.nan,
    "",
    "x",
    "auto",
    "cpu",
    "nvme",
    "none",
    "fp16",
    "bf16",
    "fp32",
    "linear",
    [],
    {},
    [0.9, 0.95],
    [1, 2, 3],
    {"enabled": True},
)


def section(draw: random.Random, kind: type[Section]) -> dict[str, object]:
    """Some of its keys, some misspelt, with values that may fit."""
    known, inner = [*kind.keys(), *kind.ignored, *kind.unsupported], kind.keys()
    found: dict[str, object] = {}
    for key in draw.sample(known, min(len(known), draw.randrange(6))):
        within = inner.get(key)
        value = section(draw, within) if within is not None and draw.random() < 0.8 else draw.choice(SCALARS)
        found[key if draw.random() < 0.97 else key[:-1]] = value
    return found


def config(draw: random.Random) -> dict[str, object]:
    found = section(draw, EngineConfig)
    for name, kinds in (("optimizer", OPTIMIZERS), ("scheduler", SCHEDULES)):
        if draw.random() < 0.5:
            kind = draw.choice(list(kinds))
            found[name] = {"type": kind, "params": section(draw, kinds[kind])}
    if draw.random() < 0.7:
        found["train_batch_size"] = draw.choice((8, 64, 7))
    return found


def test_any_configuration_works_or_is_refused_with_its_problems():
    draw, works, refused = random.Random(0), 0, 0
    for _ in range(6000):
        world_size = draw.choice((1, 2, 8))
        try:
            found = read_config(config(draw), world_size=world_size)
            assert found.train_batch * found.alike == found.micro_batch * found.accumulation * world_size
            made = (found.optimizer or AdamWParams()).make([nn.Parameter(torch.ones(2, 2))])
            if found.schedule is not None:
                Scheduler(made, found.schedule).step()
            works += 1
        except UsageError:
            refused += 1
    assert min(works, refused) > 300


@pytest.mark.parametrize(
    ("section", "codecs"),
    [
        ({"stage": 2, "zero_quantized_gradients": True}, {"gradients": "q4(block=128)"}),
        ({"stage": 3, "zero_quantized_weights": True}, {"parameters": "q8(block=256)"}),
        ({"stage": 0, "zero_quantized_weights": True}, {}),
    ],
)
def test_what_is_quantised_on_the_wire(section, codecs):
    config = read_config({**LEAST, "zero_optimization": section}, world_size=1)
    assert quantised(config.keys.zero_optimization) == codecs
    assert any("zero_quantized_weights" in note for note in config.notes) == (not codecs)
