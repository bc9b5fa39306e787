"""An Accelerator that compiles what it prepares: what a file of `accelerate config` asks of it, and what is refused."""

import json
import logging
import subprocess
import sys

import pytest
import torch
from torch import nn

import zgraph
from tests.house.rooms import ROOT
from zgraph.errors import ConfigError, UsageError
from zgraph.hf import Accelerator
from zgraph.hf.fsdp_keys import from_file

USUAL = {
    "ACCELERATE_USE_FSDP": "true",
    "ACCELERATE_DYNAMO_BACKEND": "no",
    "FSDP_VERSION": "1",
    "FSDP_SHARDING_STRATEGY": "FULL_SHARD",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_OFFLOAD_PARAMS": "false",
    "FSDP_MIN_NUM_PARAMS": "100000000",
    "FSDP_FORWARD_PREFETCH": "false",
    "FSDP_USE_ORIG_PARAMS": "true",
    "FSDP_ACTIVATION_CHECKPOINTING": "false",
    "FSDP_ACTIVATION_CHECKPOINTING_OFFLOAD": "false",
}
"""Variables that `accelerate launch` sets for a file whose `fsdp_config` says nothing."""


@pytest.mark.parametrize(
    ("variables", "options"),
    [
        ({}, {"stage": 3}),
        ({"FSDP_SHARDING_STRATEGY": "SHARD_GRAD_OP"}, {"stage": 2}),
        ({"FSDP_SHARDING_STRATEGY": "3"}, {"stage": 0}),
        ({"FSDP_RESHARD_AFTER_FORWARD": "no_shard"}, {"stage": 0}),
        ({"FSDP_VERSION": "2"}, {"stage": 3}),
        ({"FSDP_VERSION": "2", "FSDP_RESHARD_AFTER_FORWARD": "false"}, {"stage": 2}),
        ({"FSDP_OFFLOAD_PARAMS": "true"}, {"stage": 3, "offload": ("parameters",)}),
        (
            {"FSDP_ACTIVATION_CHECKPOINTING": "true", "FSDP_ACTIVATION_CHECKPOINTING_OFFLOAD": "true"},
            {"stage": 3, "offload": ("activations",), "recompute": True},
        ),
    ],
)
def test_keys_of_fsdp_become_options(variables, options):
    found = from_file({**USUAL, **variables})
    assert found.options == options
    assert not found.notes
    assert not found.is_hybrid


def test_hybrid_strategies_shard_within_a_host():
    found = from_file({**USUAL, "FSDP_SHARDING_STRATEGY": "HYBRID_SHARD_ZERO2"})
    assert (found.options["stage"], found.is_hybrid) == (2, True)


def test_without_fsdp_nothing_is_asked():
    assert from_file({"ACCELERATE_DYNAMO_BACKEND": "no"}).options == {}


def test_all_that_cannot_be_is_told_at_once():
    with pytest.raises(ConfigError) as caught:
        from_file(
            {
                **USUAL,
                "FSDP_SHARDING_STRATEGY": "FULL_SHART",
                "FSDP_IGNORED_MODULES": "head.*",
                "ACCELERATE_DYNAMO_BACKEND": "INDUCTOR",
                "ACCELERATE_USE_DEEPSPEED": "true",
            }
        )
    places = [problem.split(":")[0] for problem in caught.value.problems]
    assert places == ["distributed_type", "dynamo_backend", "fsdp_ignored_modules", "fsdp_sharding_strategy"]
    assert "did you mean FULL_SHARD?" in caught.value.problems[-1]
    with pytest.raises(ConfigError, match="MEGATRON_LM"):
        from_file({"ACCELERATE_USE_MEGATRON_LM": "true"})
    with pytest.raises(ConfigError, match="must be true or false, not full_shard"):
        from_file({**USUAL, "FSDP_VERSION": "2", "FSDP_RESHARD_AFTER_FORWARD": "FULL_SHARD"})


def test_options_of_the_script_go_before_the_file_and_keys_without_effect_are_told_in_one_line(monkeypatch, caplog):
    for key, value in {**USUAL, "FSDP_BACKWARD_PREFETCH": "BACKWARD_PRE", "FSDP_FORWARD_PREFETCH": "true"}.items():
        monkeypatch.setenv(key, value)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    with caplog.at_level(logging.WARNING, "zgraph"):
        accelerator = Accelerator(cpu=True, zgraph={"stage": 1, "recompute": True})
    assert [record.getMessage() for record in caplog.records] == [
        "without effect under zgraph: fsdp_backward_prefetch, fsdp_forward_prefetch (the pass `schedule` moves "
        "communication behind computing)"
    ]
    model = nn.Linear(4, 2)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    model, optimizer = accelerator.prepare(model, optimizer)
    loss = model(torch.ones(2, 4))
    assert loss.dtype == torch.bfloat16
    assert model.weight.dtype == torch.float32
    before = model.weight.detach().clone()
    accelerator.backward(loss.sum())
    optimizer.step()
    assert not torch.equal(before, model.weight)
    assert accelerator.prepare(model) is model
    assert [*accelerator.get_state_dict(model)] == ["weight", "bias"]
    assert [*accelerator.get_state_dict(nn.Linear(1, 1, bias=False))] == ["weight"]
    assert zgraph.report(model).recipe


def test_what_zgraph_takes_the_place_of_is_refused():
    with pytest.raises(UsageError, match="dynamo_backend: zgraph shards and compiles"):
        Accelerator(cpu=True, dynamo_backend="inductor")
    with pytest.raises(UsageError, match='takes "bf16" or "no"'):
        Accelerator(cpu=True, mixed_precision="fp16")


def test_copies_of_shards_are_refused_where_ranks_compute_together(monkeypatch):
    for name, value in {**USUAL, "FSDP_SHARDING_STRATEGY": "HYBRID_SHARD"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match="all others shard; choose FULL_SHARD"):
        Accelerator(cpu=True, zgraph={"tensor_parallel": 2})


SCRIPT = """
import torch, zgraph
from torch import nn
from torch.distributed.tensor import DTensor
from zgraph.hf import Accelerator

accelerator = Accelerator(cpu=not torch.cuda.is_available())
model = nn.Linear(4, 2)
optimizer = torch.optim.SGD(model.parameters(), 0.1)
model, optimizer = accelerator.prepare(model, optimizer)
accelerator.backward(model(torch.ones(2, 4)).sum())
optimizer.step()
assert isinstance(model.weight, DTensor) and accelerator.num_processes == 2
accelerator.print("asked:", accelerator.from_file.options)
"""


def test_accelerate_launch_hands_over_the_file(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    config = {
        "compute_environment": "LOCAL_MACHINE",
        "distributed_type": "FSDP",
        "num_machines": 1,
        "num_processes": 2,
        "machine_rank": 0,
        "mixed_precision": "no",
        "use_cpu": False,
        "main_process_port": 0,
        "fsdp_config": {
            "fsdp_version": 2,
            "fsdp_reshard_after_forward": False,
            "fsdp_activation_checkpointing": True,
            "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        },
    }
    (tmp_path / "fsdp.yaml").write_text(json.dumps(config))  # JSON is YAML
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", "fsdp.yaml", "script.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env={"PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    assert done.stdout == "asked: {'stage': 2, 'recompute': True}\n"
    assert done.stderr.count("fsdp_auto_wrap_policy (the graph needs no wrapped modules") == 1
