"""DeepSpeed's names on one rank: what is there does what it says, what is not says what to do instead."""

import argparse
import logging

import pytest
import torch
from torch import nn

import zgraph.deepspeed as deepspeed
from zgraph.deepspeed import zero
from zgraph.deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam
from zgraph.deepspeed.ops.lion import DeepSpeedCPULion, FusedLion
from zgraph.deepspeed.utils import RepeatingLoader, log_dist, safe_get_full_fp32_param
from zgraph.engine.absent import ABSENT
from zgraph.engine.engine import Engine
from zgraph.errors import AbsentError, AbsentImportError, UsageError

CONFIG = {
    "train_batch_size": 8,
    "train_micro_batch_size_per_gpu": 4,
    "zero_optimization": {"stage": 3},
    "optimizer": {"type": "AdamW", "params": {"betas": [0.9, 0.95]}},
    "fp16": {"enabled": True, "initial_scale_power": 8},
    "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 3}},
}

PUBLIC = [
    "allreduce_gradients",
    "backward",
    "bfloat16_enabled",
    "clip_fp32_gradients",
    "coalesce_grad_reduction",
    "compile",
    "cur_scale",
    "deepspeed_io",
    "destroy",
    "dump_state",
    "dynamic_loss_scale",
    "empty_partition_cache",
    "eval",
    "forward",
    "fp16_enabled",
    "get_batch_info",
    "get_data_parallel_rank",
    "get_global_grad_norm",
    "get_lr",
    "get_mom",
    "get_sequence_parallel_group",
    "get_type",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "is_compiled",
    "is_gradient_accumulation_boundary",
    "load_checkpoint",
    "load_module_state_dict",
    "loss_scale",
    "module_state_dict",
    "no_sync",
    "offload_states",
    "optimizer_name",
    "optimizer_params",
    "register_compile_pass",
    "reload_states",
    "save_16bit_model",
    "save_checkpoint",
    "save_fp16_model",
    "scale",
    "scheduler_name",
    "scheduler_params",
    "set_data_post_process_func",
    "set_gradient_accumulation_boundary",
    "set_train_batch_size",
    "set_train_micro_batch_size",
    "step",
    "steps_per_print",
    "train",
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "wall_clock_breakdown",
    "was_step_applied",
    "zero_cpu_offload",
    "zero_grad",
    "zero_hpz_partition_size",
    "zero_offload_optimizer",
    "zero_offload_param",
    "zero_optimization",
    "zero_optimization_partition_gradients",
    "zero_optimization_partition_weights",
    "zero_optimization_stage",
    "zero_overlap_comm",
    "zero_reduce_bucket_size",
    "zero_quantized_weights",
]
"""Methods of DeepSpeed 0.19.8's engine that scripts call."""


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))


@pytest.fixture(scope="module")
def engine():
    return deepspeed.initialize(model=net(), config=CONFIG)[0]


def test_the_engine_answers_what_deepspeeds_does(engine):
    assert engine.get_batch_info() == (8, 4, 2)
    assert (engine.loss_scale(), engine.dynamic_loss_scale(), engine.cur_scale) == (0, True, 256)
    assert engine.initial_dynamic_scale() == 256
    assert (engine.optimizer_name(), engine.optimizer_params()) == ("adamw", {"betas": [0.9, 0.95]})
    assert (engine.scheduler_name(), engine.scheduler_params()) == ("WarmupLR", {"warmup_num_steps": 3})
    assert engine.get_mom() == [(0.9, 0.95)]
    assert engine.zero_optimization_partition_gradients()
    assert engine.zero_optimization_partition_weights()
    assert (engine.zero_cpu_offload(), engine.zero_offload_param().device) == (False, "none")
    assert (engine.zero_offload_optimizer().device, engine.zero_hpz_partition_size()) == ("none", 1)
    assert not engine.zero_gather_16bit_weights_on_model_save()
    assert (engine.steps_per_print(), engine.wall_clock_breakdown(), engine.dataloader_drop_last()) == (
        None,
        False,
        False,
    )
    assert (engine.get_data_parallel_rank(), engine.dp_world_size, engine.communication_data_type) == (0, 1, None)
    assert engine.is_compiled


def test_a_state_dict_goes_out_and_in(engine):
    engine.module[0].requires_grad_(False)
    saved = {name: value.clone() for name, value in engine.module_state_dict().items()}
    assert [*engine.module_state_dict(exclude_frozen_parameters=True)] == ["2.weight", "2.bias"]
    engine.module[0].requires_grad_(True)
    engine.load_module_state_dict({name: value + 1 for name, value in saved.items()})
    assert torch.equal(engine.module[2].bias, saved["2.bias"] + 1)
    engine.load_module_state_dict(saved, custom_load_fn=lambda src, dst: dst.load_state_dict(src))
    assert torch.equal(engine.module[2].bias, saved["2.bias"])


def test_every_method_that_scripts_call_is_there_or_says_what_to_do(engine):
    for name in PUBLIC:
        if name in ABSENT:
            with pytest.raises(AbsentError, match=rf"the engine has no {name}: \w+"):
                getattr(engine, name)
        else:
            assert hasattr(Engine, name) or name == "cur_scale", name
    assert not [name for name in ABSENT if hasattr(Engine, name)]
    assert not hasattr(engine, "compile")  # nn.Module has one
    with pytest.raises(AttributeError, match="'Sequential' object has no attribute 'nothing'"):
        _ = engine.nothing


def test_a_models_own_attribute_goes_before_a_remedy():
    model = net()
    model.dump_state = "mine"
    assert deepspeed.initialize(model=model, config={"train_batch_size": 1})[0].dump_state == "mine"


def test_names_that_are_not_there_say_what_to_do():
    with pytest.raises(AbsentError, match=r"zgraph\.deepspeed has no init_inference: call engine\.eval\(\)"):
        _ = deepspeed.init_inference
    with pytest.raises(AbsentImportError, match="set_z3_leaf_modules: leave it out"):
        from zgraph.deepspeed.utils import set_z3_leaf_modules  # noqa: F401
    with pytest.raises(AbsentImportError, match=r"optimizer=torch\.optim\.Adagrad to initialize"):
        from zgraph.deepspeed.ops.adagrad import DeepSpeedCPUAdagrad  # noqa: F401
    with pytest.raises(AbsentImportError, match="has no PipelineModule: give the whole model"):
        from zgraph.deepspeed import PipelineModule  # noqa: F401
    with pytest.raises(ImportError, match="cannot import name 'nothing'"):
        from zgraph.deepspeed.comm import nothing  # noqa: F401
    for module in (deepspeed, deepspeed.utils, deepspeed.zero, deepspeed.comm, deepspeed.ops, deepspeed.checkpointing):
        assert not hasattr(module, "nothing")
    assert not hasattr(deepspeed.zero, "TiledLinear")


@pytest.mark.parametrize("is_first", [True, False])
def test_a_scripts_own_local_rank_stands_beside_the_configuration_arguments(is_first):
    parser = argparse.ArgumentParser()
    if is_first:
        parser.add_argument("--local_rank", type=int, default=-1)
    parser = deepspeed.add_config_arguments(parser)
    if not is_first:
        parser.add_argument("--local_rank", type=int, default=-1)
    args = parser.parse_args(["--local_rank=3", "--deepspeed", "--deepspeed_config", "ds.json"])
    assert (args.local_rank, args.deepspeed, args.deepspeed_config) == (3, True, "ds.json")


def test_one_rank_counts_and_reduces_without_a_group():
    comm, tensor = deepspeed.comm, torch.ones(2)
    comm.init_distributed()
    assert not comm.is_initialized()
    assert (comm.get_rank(), comm.get_world_size(), comm.get_local_rank()) == (0, 1, 0)
    assert (comm.get_all_ranks_from_group(), comm.get_global_rank(), comm.get_world_group()) == ([0], 0, None)
    comm.barrier()
    for collective in (comm.all_reduce, lambda t: comm.broadcast(t, 0), lambda t: comm.reduce(t, 0)):
        collective(tensor)
    assert tensor.tolist() == [1, 1]


def test_a_model_built_under_zero_init_is_the_one_built_without(caplog):
    zero._say_what_it_does.cache_clear()
    with caplog.at_level(logging.WARNING, "zgraph"), zero.Init(config_dict_or_path=CONFIG, dtype=torch.half):
        model = net()
    assert caplog.text.count("zero.Init has no effect") == 1
    assert all(map(torch.equal, model.parameters(), net().parameters()))
    with zero.Init(enabled=False, remote_device="nvme"):
        pass
    for options, said in (
        ({"remote_device": "nvme"}, "offload_param"),
        ({"mpu": object()}, "give mesh="),
        ({"zero_quantized_weights": True}, "does not have zero_quantized_weights"),
    ):
        with pytest.raises(UsageError, match=said):
            zero.Init(**options)


def trained(make):
    model = net()
    engine = deepspeed.initialize(model=model, optimizer=make(model.parameters()), config={"train_batch_size": 4})[0]
    for seed in range(2):
        rows = torch.randn(4, 4, generator=torch.Generator().manual_seed(seed))
        engine.backward(engine(rows).square().mean())
        engine.step()
    return [p.detach().clone() for p in engine.module.parameters()]


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        (lambda p: FusedAdam(p, lr=0.1, weight_decay=0.1), lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.1)),
        (lambda p: DeepSpeedCPUAdam(p, lr=0.1, adamw_mode=False), lambda p: torch.optim.Adam(p, lr=0.1)),
    ],
)
def test_optimizers_have_deepspeeds_defaults(theirs, ours):
    for one, other in zip(trained(theirs), trained(ours), strict=True):
        torch.testing.assert_close(one, other)


def test_optimizers_refuse_what_they_would_compute_differently():
    parameters = [nn.Parameter(torch.ones(2))]
    for kind in (FusedLion, DeepSpeedCPULion):
        assert kind(parameters).defaults == {"lr": 1e-3, "betas": (0.9, 0.999), "weight_decay": 0.0}
    for make, said in (
        (lambda: FusedAdam(parameters, bias_correction=False), "bias_correction"),
        (lambda: FusedAdam(parameters, amsgrad=True), r"torch\.optim\.AdamW\(amsgrad=True\)"),
        (lambda: FusedAdam(parameters, adam_w_mode=False, weight_decay=0.1), r"take torch\.optim\.Adam$"),
        (lambda: DeepSpeedCPUAdam(parameters, fp32_optimizer_states=False), "fp32_optimizer_states"),
    ):
        with pytest.raises(UsageError, match=said):
            make()


class Checkpointed(nn.Module):
    """Two layers, the first computed again in the backward."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(4, 8), nn.Linear(8, 1)

    def forward(self, x):
        return self.second(deepspeed.checkpointing.checkpoint(lambda t: self.first(t).tanh(), x))


def test_checkpointed_functions_train_as_the_others_do():
    deepspeed.checkpointing.configure(None, partition_activations=True)
    assert deepspeed.checkpointing.is_configured()
    with pytest.raises(UsageError, match="cpu_checkpointing"):
        deepspeed.checkpointing.configure(None, checkpoint_in_cpu=True)
    deepspeed.checkpointing.reset()
    losses = []
    for model in (Checkpointed(), net()):
        torch.manual_seed(1)
        engine = deepspeed.initialize(model=model, config={"train_batch_size": 4, "optimizer": {"type": "SGD"}})[0]
        for _ in range(2):
            loss = engine(torch.ones(4, 4)).square().mean()
            engine.backward(loss)
            engine.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_lines_are_logged_on_the_ranks_that_are_named(caplog):
    with caplog.at_level(logging.INFO, "zgraph"):
        log_dist("everywhere")
        log_dist("on the first", ranks=[0])
        log_dist("on the second", ranks=[1])
    assert [record.getMessage() for record in caplog.records] == ["[rank 0] everywhere", "[rank 0] on the first"]


def test_a_loader_repeats():
    batches = iter(RepeatingLoader([1, 2]))
    assert [next(batches) for _ in range(5)] == [1, 2, 1, 2, 1]


def test_a_parameter_of_no_engine_is_refused():
    with pytest.raises(UsageError, match=r"take one of engine\.module"):
        safe_get_full_fp32_param(nn.Parameter(torch.ones(2)))
    with pytest.raises(UsageError, match="takes a parameter or several"), zero.GatheredParameters([net()]):
        pass
