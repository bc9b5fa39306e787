"""From a model and a configuration to an engine: what `zgraph.initialize_engine` wires together."""

from __future__ import annotations

import contextlib
import logging
import os
from argparse import ArgumentParser
from collections.abc import Callable, Iterable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.optim import Optimizer
from torch.utils.data import Dataset

from zgraph import api
from zgraph.engine.config.keys import Zero
from zgraph.engine.config.lr_schedules import Scheduler
from zgraph.engine.config.optimizers import handed_over, names_in
from zgraph.engine.config.read import Config, read_config
from zgraph.engine.data import EngineLoader
from zgraph.engine.engine import Engine
from zgraph.errors import UsageError
from zgraph.runtime.decisions import deciding
from zgraph.runtime.rendezvous import join_ranks

log = logging.getLogger("zgraph")

MakeScheduler = Callable[[Optimizer], Any]

MakeOptimizer = Callable[[Iterable[nn.Parameter]], Optimizer]


def initialize_engine(
    args: Any = None,
    model: nn.Module | None = None,
    optimizer: Optimizer | MakeOptimizer | None = None,
    model_parameters: Iterable[Any] | None = None,
    training_data: Dataset[Any] | None = None,
    lr_scheduler: Any | MakeScheduler | None = None,
    collate_fn: Callable[[list[Any]], Any] | None = None,
    config: Mapping[str, Any] | str | Path | None = None,
    mesh: DeviceMesh | None = None,
    dist_init_required: bool | None = None,
    config_params: Mapping[str, Any] | str | Path | None = None,
) -> tuple[Engine, Optimizer | None, EngineLoader | None, Any]:
    """Compile a model for training as a DeepSpeed configuration says.

    Without a process group, one is made where a launcher (torchrun) has said how many ranks there are.

    Args:
        args: as DeepSpeed takes them; only `deepspeed_config`, a path, is read, where `config` is not given.
        model: the model; it is compiled in place.
        optimizer: an optimizer over the model's parameters as they are, which then takes those that are sharded; or a
            function from parameters to one. It goes before the configuration's.
        model_parameters: parameters, or groups of them, for the configuration's optimizer; by default all.
        training_data: a dataset with a length.
        lr_scheduler: a scheduler of the optimizer, or a function from the optimizer to one.
        collate_fn: for the training data, as torch's DataLoader takes it.
        config: a mapping, the path of a JSON file, or JSON in base64.
        dist_init_required: False leaves it to the script to make a process group.
        config_params: another name for `config`.
        mesh: the ranks, as `zgraph.compile` takes them; by default all, in rows of `zero_hpz_partition_size`.

    Returns:
        The engine, its optimizer, a loader of the training data, and the scheduler; None for what there is not.

    Raises:
        ConfigError: the configuration is wrong; the error has all problems.
        UsageError: the model, or what else was given, does not fit.
        PeerError: another rank raised one of these.
    """
    if model is None:
        raise UsageError("initialize_engine needs model=")
    given = (config, config_params, getattr(args, "deepspeed_config", None))
    source = next((found for found in given if found is not None), None)
    if source is None:
        raise UsageError("initialize_engine needs config=: a dict, a path, or JSON in base64")
    init_distributed(dist_init_required=dist_init_required)
    everyone = dist.get_world_size() if dist.is_initialized() else 1
    if mesh is not None and {"tensor", "context", "expert"} & set(mesh.mesh_dim_names or ()):
        raise UsageError(
            "leave mesh= out, and give tensor_parallel.autotp_size, sequence_parallel_size or "
            "expert_parallel.autoep_size in the configuration"
        )
    with deciding(mesh):
        read = read_config(source, world_size=everyone if mesh is None else mesh.size())
        if _rank(mesh) == 0:
            for note in read.notes:
                log.warning(note)
        if optimizer is None and read.optimizer is None and (lr_scheduler is not None or read.schedule is not None):
            raise UsageError("a scheduler needs an optimizer: name one in the configuration, or give optimizer=")
        loader = None
        if training_data is not None:
            loader = EngineLoader(
                training_data,
                read.micro_batch,
                collate_fn,
                read.keys.dataloader_drop_last,
                read.keys.seed or 0,
                read.world_size,
                _rank(mesh) // read.alike,
            )
        groups = _named_groups(model, model_parameters)
    with handed_over(optimizer, model) if isinstance(optimizer, Optimizer) else contextlib.nullcontext():
        compiled = compile_for(model, read, mesh)
    made = _optimizer(compiled, read, optimizer, groups)
    scheduler = _scheduler(made, read, lr_scheduler)
    return Engine(compiled, read, made, scheduler, loader), made, loader, scheduler


initialize = initialize_engine


def _rank(mesh: DeviceMesh | None) -> int:
    """This rank's number among those that share a batch."""
    if mesh is not None:
        return int((mesh.mesh.flatten() == dist.get_rank()).nonzero().item())
    return dist.get_rank() if dist.is_initialized() else 0


def init_distributed(
    dist_backend: str | None = None,
    auto_mpi_discovery: bool = True,
    distributed_port: int = 29500,
    verbose: bool = True,
    timeout: timedelta | None = None,
    init_method: str | None = None,
    dist_init_required: bool | None = None,
    config: Any = None,
    rank: int = -1,
    world_size: int = -1,
) -> None:
    """Join the ranks that a launcher (torchrun) has started; nothing where there is one, or where that is done.

    Args:
        dist_backend: by default NCCL on GPUs and gloo on processors.
        timeout: of collectives, as torch takes it.
        init_method: where ranks meet, as torch takes it; by default where the launcher has said.
        dist_init_required: False leaves it to the script.
        rank, world_size: this rank's number, and how many there are; by default as the launcher has said.
        auto_mpi_discovery, distributed_port, verbose, config: taken as DeepSpeed does, without effect.

    Raises:
        UsageError: nothing says where the ranks meet.
        PeerError: a rank died while the others joined, or has not come within ZGRAPH_TIMEOUT seconds.
    """
    if world_size <= 0 and "WORLD_SIZE" not in os.environ and int(os.environ.get("OMPI_COMM_WORLD_SIZE", "1")) > 1:
        raise UsageError("mpirun has started several ranks, and says to none where they meet: start them with torchrun")
    num_ranks = world_size if world_size > 0 else int(os.environ.get("WORLD_SIZE", "1"))
    if dist.is_initialized() or dist_init_required is False or num_ranks == 1:
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    backend = dist_backend or ("nccl" if torch.cuda.is_available() else "gloo")
    join_ranks(backend, init_method or "env://", rank, world_size, timeout)


def add_config_arguments(parser: ArgumentParser) -> ArgumentParser:
    """Add what DeepSpeed's scripts take on their command line: `--deepspeed` and `--deepspeed_config`.

    A `--local_rank` is the script's own to add, as with DeepSpeed; the engine reads the environment.
    """
    group = parser.add_argument_group("zgraph", "configuration")
    group.add_argument("--deepspeed", action="store_true", help="taken, and without effect: zgraph is always on")
    group.add_argument("--deepspeed_config", help="path of the JSON configuration")
    return parser


QUANTISED = {"gradients": "q4(block=128)", "parameters": "q8(block=256)"}
"""The codecs of `zero_quantized_gradients` and `zero_quantized_weights`, whose codes have 4 and 8 bits a number in
ZeRO++ too (Wang et al., 2023)."""


def quantised(zero: Zero) -> dict[str, str]:
    """Codecs of what the section has quantised; of weights where some are gathered."""
    wanted = {"gradients": zero.zero_quantized_gradients, "parameters": zero.zero_quantized_weights and zero.stage > 0}
    return {name: QUANTISED[name] for name, is_wanted in wanted.items() if is_wanted}


def compile_for(model: nn.Module, config: Config, mesh: DeviceMesh | None = None) -> nn.Module:
    """Compile a model, in place, as a configuration says.

    Args:
        mesh: the ranks; by default all, in rows of `zero_hpz_partition_size`.
    """
    keys, own = config.keys, config.keys.zgraph
    if config.param_dtype is not None:
        model.float()  # masters
    return api.compile(
        model,
        stage=_stage(model, config),
        mesh=mesh if mesh is not None else _mesh(config),
        device="cuda" if torch.cuda.is_available() and (mesh is None or mesh.device_type == "cuda") else None,
        param_dtype=config.param_dtype,
        reduce_dtype=keys.communication_data_type,
        hardware=own.hardware,
        memory_budget=own.memory_budget,
        recompute=own.recompute,
        offload=_offload(config),
        kernels=own.kernels,
        compute=own.compute,
        compress=own.compress or quantised(keys.zero_optimization),
        save=own.save,
        fullgraph=own.fullgraph,
        dynamic=own.dynamic,
        passes=own.recipe,
        tensor_parallel=config.tensor_parallel,
        sequence_parallel=own.sequence_parallel,
        context_parallel=config.context_parallel,
        expert_parallel=config.expert_parallel,
        placements=own.placements,
        cuda_graphs=own.cuda_graphs,
        regions=own.regions,
    )


def _stage(model: nn.Module, config: Config) -> Any:
    """The stage; parameters below the threshold of stage 3 stay whole."""
    zero = config.keys.zero_optimization
    if zero.stage != 3 or not zero.stage3_param_persistence_threshold:
        return zero.stage
    small = {n for n, p in model.named_parameters() if p.numel() < zero.stage3_param_persistence_threshold}
    return lambda name: 0 if name in small else 3


def _offload(config: Config) -> Any:
    """The kinds of state to offload to the host, as `zgraph.compile` takes them."""
    zero, keys = config.keys.zero_optimization, config.keys
    asked = {
        "parameters": zero.offload_param.device != "none" and zero.stage == 3,
        "optimizer": zero.offload_optimizer.device == "cpu" and zero.stage > 0,
        "activations": keys.activation_checkpointing.cpu_checkpointing,
    }
    return tuple(name for name, is_asked in asked.items() if is_asked) or "auto"


def _mesh(config: Config) -> DeviceMesh | None:
    """Rows of `zero_hpz_partition_size` ranks that shard, and copies of them."""
    size = config.keys.zero_optimization.zero_hpz_partition_size
    if size in (1, config.world_size):
        return None
    if config.world_size % size:
        raise UsageError(f"zero_hpz_partition_size: {config.world_size} ranks are no multiple of {size}")
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    return init_device_mesh(kind, (config.world_size // size, size), mesh_dim_names=("replicate", "shard"))


def _named_groups(model: nn.Module, model_parameters: Iterable[Any] | None) -> list[dict[str, Any]]:
    """The groups of parameters that were given, with the parameters' names: compiling makes others of them."""
    groups = list(model_parameters or ())
    groups = groups if not groups or isinstance(groups[0], Mapping) else [{"params": groups}]
    return [{**group, "params": names_in(model, group)} for group in groups]


def _optimizer(model: nn.Module, config: Config, optimizer: Any, groups: list[dict[str, Any]]) -> Optimizer | None:
    if isinstance(optimizer, Optimizer):
        return optimizer
    parameters = dict(model.named_parameters())
    taken: list[Any] = [{**g, "params": [parameters[n] for n in g["params"]]} for g in groups]
    taken = taken or list(parameters.values())
    if callable(optimizer):
        made: Optimizer = optimizer(taken)
        return made
    return config.optimizer.make(taken, folder=config.state_folder) if config.optimizer is not None else None


def _scheduler(optimizer: Optimizer | None, config: Config, given: Any) -> Any:
    if optimizer is None:
        return None
    if given is None:
        return Scheduler(optimizer, config.schedule) if config.schedule is not None else None
    return given(optimizer) if callable(given) and not hasattr(given, "step") else given
