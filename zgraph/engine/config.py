"""The configuration of `zgraph.initialize_engine`: DeepSpeed's JSON, and a section of zgraph's own.

A key acts, or says in one line what decides in its place, or is refused with the remedy; all problems are told at once.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from zgraph.engine.optimizers import OPTIMIZERS, OptimizerParams
from zgraph.engine.schedules import SCHEDULES, Schedule
from zgraph.engine.sections import Reading, Section, flatten
from zgraph.engine.writers import PACKAGES, is_installed
from zgraph.errors import ConfigError

_SCHEDULE = "the pass `schedule` moves communication behind computing for the costs of the hardware"
_BUCKET = "the pass `bucket` chooses the sizes for which the predicted step is shortest"
_BUDGET = "`zgraph.memory_budget` decides what is kept, gathered again, or computed again"
_ALWAYS = "it is always so"
_HOST = "the runtime sizes, pins and streams its host memory itself"
_RESUMES = "every checkpoint can be resumed at another world size and stage"

DType = Literal["fp32", "fp16", "bf16", "fp64"]

_LONG_NAMES = {"float32": "fp32", "float16": "fp16", "half": "fp16", "bfloat16": "bf16", "float64": "fp64"}


def _short_name(name: Any) -> Any:
    return _LONG_NAMES.get(name, name) if isinstance(name, str) else name


Precision = Annotated[DType, BeforeValidator(_short_name)]


class Offload(Section):
    """`offload_optimizer` or `offload_param`."""

    superseded: ClassVar[Mapping[str, str]] = dict.fromkeys(
        ("pin_memory", "buffer_count", "buffer_size", "max_in_cpu", "pipeline_read", "pipeline_write", "pipeline",
         "fast_init", "cpuadam_cores_perc"), _HOST,
    )  # fmt: skip
    unsupported: ClassVar[Mapping[str, str]] = {
        "ratio": "all of the optimizer's state goes where `device` says: leave it out",
        "super_offload": "leave it out",
    }

    device: Literal["none", "cpu", "nvme"] = "none"
    nvme_path: Path | None = None


class Zero(Section):
    """`zero_optimization`."""

    superseded: ClassVar[Mapping[str, str]] = {
        **dict.fromkeys(("overlap_comm", "contiguous_gradients", "round_robin_gradients", "allgather_sequential",
                         "stage3_allgather_sequential", "prefetch_bucket_size", "stage3_prefetch_bucket_size"),
                        _SCHEDULE),
        **dict.fromkeys(("reduce_bucket_size", "allgather_bucket_size", "use_multi_rank_bucket_allreduce",
                         "parameter_alignment", "module_granularity_threshold", "stage3_module_granularity_threshold"),
                        _BUCKET),
        **dict.fromkeys(("max_live_parameters", "stage3_max_live_parameters", "max_reuse_distance",
                         "stage3_max_reuse_distance", "model_persistence_threshold",
                         "stage3_model_persistence_threshold", "memory_efficient_linear", "sub_group_size"), _BUDGET),
        **dict.fromkeys(("reduce_scatter", "allgather_partitions", "use_all_reduce_for_fetch_params",
                         "stage3_use_all_reduce_for_fetch_params"), "the passes choose the collective"),
        **dict.fromkeys(("load_from_fp32_weights", "compute_grad_norm", "ignore_unused_parameters",
                         "override_module_apply"), _ALWAYS),
        **dict.fromkeys(("elastic_checkpoint", "pipeline_loading_checkpoint"), _RESUMES),
        **dict.fromkeys(("log_trace_cache_warnings", "enable_sanity_checks"), "ZGRAPH_VERIFY checks every pass"),
        "legacy_stage1": "there is one stage 1",
        "leaf_module": "modules are not gathered as such: the graph has no hooks",
        "cpu_offload_use_pin_memory": _HOST,
    }  # fmt: skip
    unsupported: ClassVar[Mapping[str, str]] = {
        "zero_quantized_weights": "leave it out: weights are gathered in the dtype to compute in",
        "zero_quantized_nontrainable_weights": "leave it out",
        "zero_quantized_gradients": "leave it out, or choose `communication_data_type`",
        "zenflow": "leave it out",
        "save_muon_momentum_buffer_in_memory": "leave it out",
    }

    stage: Literal[0, 1, 2, 3] = 0
    offload_optimizer: Offload = Offload()
    offload_param: Offload = Offload()
    stage3_param_persistence_threshold: NonNegativeInt | None = None
    stage3_gather_16bit_weights_on_model_save: bool = False
    zero_hpz_partition_size: PositiveInt = 1


class FP16(Section):
    """`fp16`: computing in half precision, with a loss scale that follows overflows."""

    superseded: ClassVar[Mapping[str, str]] = {"auto_cast": "inputs are always cast to the dtype to compute in"}
    unsupported: ClassVar[Mapping[str, str]] = {
        "fp16_master_weights_and_grads": "masters are fp32: leave it out", "amp": "leave it out",
        "opt_level": "leave it out",
    }  # fmt: skip

    enabled: bool = False
    loss_scale: NonNegativeFloat = 0.0
    initial_scale_power: NonNegativeInt = 16
    loss_scale_window: PositiveInt = 1000
    hysteresis: PositiveInt = 2
    consecutive_hysteresis: bool = False
    min_loss_scale: PositiveFloat = 1.0


class BF16(Section):
    """`bf16`: computing in bfloat16, with masters in fp32."""

    superseded: ClassVar[Mapping[str, str]] = {
        "immediate_grad_update": "gradients are added where they are reduced",
        "check_grad_overflow": "the gradient norm is looked at where it is needed: with clipping",
    }
    unsupported: ClassVar[Mapping[str, str]] = {
        "bf16_master_weights_and_grads": "masters are fp32: leave it out", "bf16_optimizer_states": "leave it out",
    }  # fmt: skip

    enabled: bool = False


class Checkpointing(Section):
    """`activation_checkpointing`."""

    superseded: ClassVar[Mapping[str, str]] = dict.fromkeys(
        ("partition_activations", "contiguous_memory_optimization", "number_checkpoints",
         "synchronize_checkpoint_boundary", "profile"), _BUDGET,
    )  # fmt: skip

    cpu_checkpointing: bool = False


class Monitor(Section):
    """`tensorboard` or `csv_monitor`."""

    enabled: bool = False
    output_path: str = ""
    job_name: str = "DeepSpeedJobName"


class WandB(Section):
    """`wandb`."""

    enabled: bool = False
    group: str | None = None
    team: str | None = None
    project: str = "deepspeed"


class CommsLogger(Section):
    """`comms_logger`: a table of collectives every `steps_per_print` steps (10, if that is not there)."""

    superseded: ClassVar[Mapping[str, str]] = dict.fromkeys(
        ("prof_all", "prof_ops", "verbose", "debug"), "the table has every collective of the plan"
    )

    enabled: bool = False


class FlopsProfiler(Section):
    """`flops_profiler`: FLOP by module, from the graph."""

    superseded: ClassVar[Mapping[str, str]] = {
        "recompute_fwd_factor": "what is computed again is in the graph, and counted",
    }

    enabled: bool = False
    profile_step: PositiveInt = 1
    module_depth: int = -1
    top_modules: PositiveInt = 1
    detailed: bool = True
    output_file: Path | None = None


class CheckpointKeys(Section):
    """`checkpoint`."""

    superseded: ClassVar[Mapping[str, str]] = {
        "load_universal": _RESUMES,
        "parallel_write": "every rank writes its own shards",
        "writer": "torch.distributed.checkpoint writes",
    }
    unsupported: ClassVar[Mapping[str, str]] = {
        "use_node_local_storage": "give a folder that all hosts see",
    }

    tag_validation: Literal["Ignore", "Warn", "Fail", "ignore", "warn", "fail"] = "Warn"
    asynchronous: bool = False


class DataTypes(Section):
    """`data_types`."""

    superseded: ClassVar[Mapping[str, str]] = {"grad_accum_dtype": "gradients are added in the dtype of the masters"}


class OptimizerKeys(Section):
    """`optimizer`: its type, and what that takes."""

    superseded: ClassVar[Mapping[str, str]] = {"legacy_fusion": "the update is over flat shards"}

    type: str
    params: dict[str, Any] = Field(default_factory=dict)
    max_grad_norm: NonNegativeFloat | None = None


class SchedulerKeys(Section):
    """`scheduler`: its type, and what that takes."""

    type: str
    params: dict[str, Any] = Field(default_factory=dict)


class Own(Section):
    """`zgraph`: what DeepSpeed has no word for; each as `zgraph.compile` takes it."""

    memory_budget: int | str | None = None
    recipe: str | None = None
    hardware: str | None = None
    kernels: Literal["aten", "triton", "inductor", "auto"] = "aten"
    recompute: Literal["auto"] | bool = "auto"
    fullgraph: bool = True
    dynamic: bool | None = None
    save: Path | None = None


class EngineConfig(Section):
    """A configuration, read and checked. Its fields have DeepSpeed's names."""

    superseded: ClassVar[Mapping[str, str]] = {
        **dict.fromkeys(("zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer"), "any optimizer works"),
        "prescale_gradients": "gradients are averaged while they are summed",
        "gradient_predivide_factor": "gradients are averaged while they are summed",
        "disable_allgather": "the passes choose the collective",
        "sparse_gradients": "the gradient of an embedding is sharded as any other",
        "compile": "zgraph always compiles",
        "aio": _HOST,
        "nebula": "checkpoints are written by torch.distributed.checkpoint",
        "disable_python_gc": _ALWAYS,
        "log_level": "the logger `zgraph` of Python's logging",
        "graph_harvesting": "the whole step is one graph",
        "use_data_before_expert_parallelism": "there are no experts",
        "managed_gradient_accumulation": _ALWAYS,
        "hybrid_engine": "the model generates as it is: call engine.eval()",
        "autotuning": "zgraph.plan finds the stage; run `zgraph plan`",
        "memory_breakdown": "zgraph.report says what is alive at the peak, and zgraph view when",
        "seq_parallel_communication_data_type": "there is no sequence parallelism",
        "vocabulary_size": "kernels know their sizes",
    }  # fmt: skip
    unsupported: ClassVar[Mapping[str, str]] = {
        **dict.fromkeys(("amp", "torch_autocast"), "choose fp16 or bf16"),
        **dict.fromkeys(("elasticity", "data_efficiency", "curriculum_learning", "data_sampling", "eigenvalue",
                         "progressive_layer_drop", "quantize_training", "compression_training", "sparse_attention",
                         "pipeline", "tensor_parallel", "moe", "expert_parallel", "sequence_parallel_size",
                         "random_ltd", "weight_quantization", "comet", "dump_state", "check_overflow",
                         "gradient_allreduce_op", "autotp_size", "data_parallel_size"), "leave it out"),
    }  # fmt: skip

    train_batch_size: PositiveInt | None = None
    train_micro_batch_size_per_gpu: PositiveInt | None = None
    gradient_accumulation_steps: PositiveInt | None = None
    optimizer: OptimizerKeys | None = None
    scheduler: SchedulerKeys | None = None
    fp16: FP16 = FP16()
    bf16: BF16 = BF16()
    gradient_clipping: NonNegativeFloat = 1.0
    communication_data_type: Precision | None = None
    zero_optimization: Zero = Zero()
    activation_checkpointing: Checkpointing = Checkpointing()
    data_types: DataTypes = DataTypes()
    dataloader_drop_last: bool = False
    steps_per_print: NonNegativeInt | None = None
    wall_clock_breakdown: bool = False
    comms_logger: CommsLogger = CommsLogger()
    flops_profiler: FlopsProfiler = FlopsProfiler()
    tensorboard: Monitor = Monitor()
    csv_monitor: Monitor = Monitor()
    wandb: WandB = WandB()
    checkpoint: CheckpointKeys = CheckpointKeys()
    seed: NonNegativeInt | None = None
    zgraph: Own = Own()


@dataclass(frozen=True)
class Config:
    """What `read_config` returns.

    Args:
        keys: the configuration's keys.
        micro_batch: rows of one forward on one rank.
        accumulation: forwards before a step.
        world_size: ranks.
        optimizer: what the optimizer takes; None if the configuration names none.
        schedule: the learning rates; None if the configuration names none.
        notes: for each key that has no effect, what decides instead.
    """

    keys: EngineConfig
    micro_batch: int
    accumulation: int
    world_size: int
    optimizer: OptimizerParams | None
    schedule: Schedule | None
    notes: tuple[str, ...] = ()

    @property
    def train_batch(self) -> int:
        """Rows of all ranks and forwards before a step."""
        return self.micro_batch * self.accumulation * self.world_size

    @property
    def param_dtype(self) -> Literal["float16", "bfloat16"] | None:
        """What is computed in, as torch calls it; None for the dtype of the parameters."""
        return "float16" if self.keys.fp16.enabled else "bfloat16" if self.keys.bf16.enabled else None


def read_config(source: Mapping[str, Any] | str | Path, *, world_size: int) -> Config:
    """Read and check a configuration.

    Args:
        source: a mapping, the path of a JSON file, or JSON in base64.
        world_size: ranks that share a batch.

    Raises:
        ConfigError: anything is wrong; the error has all problems.
    """
    found = loaded(source)
    reading = Reading()
    reading.problems += [
        f'{place}: "auto" is filled in by zgraph.hf.Trainer; here it needs a value' for place in undecided(found)
    ]
    found = _without_auto(found)
    keys = reading.read(EngineConfig, found)
    optimizer = schedule = None
    if isinstance(named := found.get("optimizer"), Mapping):
        optimizer = _named(reading, "optimizer", named, OPTIMIZERS)
    if isinstance(named := found.get("scheduler"), Mapping):
        schedule = _named(reading, "scheduler", named, SCHEDULES)
    if keys is not None:
        _check_together(reading, keys)
        micro, steps = _batches(reading, keys, world_size)
    reading.finish()
    assert keys is not None
    return Config(keys, micro, steps, world_size, optimizer, schedule, tuple(reading.notes))


def loaded(source: Mapping[str, Any] | str | Path) -> dict[str, Any]:
    """A configuration as it is written, keys of old under the names that they have now.

    Raises:
        ConfigError: it is no JSON object.
    """
    return _upgraded(_loaded(source))


def undecided(found: Mapping[str, Any]) -> list[str]:
    """The places with "auto" whose value is needed: others may be left to zgraph."""
    automatic = [place for place, value in flatten(found) if value == "auto" and not place.startswith("zgraph.")]
    zero = {f"zero_optimization.{key}" for key in Zero.superseded}
    return [
        place for place in automatic if place not in zero and place.rpartition(".")[2] not in EngineConfig.superseded
    ]


def _loaded(source: Mapping[str, Any] | str | Path) -> dict[str, Any]:
    if isinstance(source, Mapping):
        return dict(source)
    if not isinstance(source, str | Path):
        raise ConfigError([f"it is a {type(source).__name__}, and must be a dict, a path, or JSON in base64"])
    text = _text(source)
    try:
        found = json.loads(text, object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError([f"{str(source)[:80]} is no JSON: {error}"]) from None
    if not isinstance(found, dict):
        raise ConfigError([f"{str(source)[:80]} holds no JSON object"])
    return found


def _text(source: str | Path) -> str:
    try:
        if Path(source).is_file():
            return Path(source).read_text()
    except (OSError, ValueError, UnicodeDecodeError) as error:
        if not isinstance(error, OSError) or len(str(source)) < 256:
            raise ConfigError([f"cannot read {str(source)[:80]}: {error}"]) from None
    try:
        return base64.urlsafe_b64decode(str(source).encode()).decode()
    except (binascii.Error, UnicodeError, ValueError):
        raise ConfigError([f"there is no file {str(source)[:80]}, and it is not JSON in base64 either"]) from None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    if twice := sorted({n for n in names if names.count(n) > 1}):
        raise ConfigError([f"{name}: the key is there twice" for name in twice])
    return dict(pairs)


_RENAMED = {
    "param_persistence_threshold": "stage3_param_persistence_threshold",
    "gather_16bit_weights_on_model_save": "stage3_gather_16bit_weights_on_model_save",
    "stage3_gather_fp16_weights_on_model_save": "stage3_gather_16bit_weights_on_model_save",
}


def _upgraded(found: dict[str, Any]) -> dict[str, Any]:
    """Keys of old, under the names that they have now."""
    found = {"bf16" if key == "bfloat16" else key: value for key, value in found.items()}
    zero = found.get("zero_optimization")
    if isinstance(zero, bool):
        zero = {"stage": int(zero)}
    if isinstance(zero, Mapping):
        zero = {_RENAMED.get(key, key): value for key, value in zero.items()}
        for old, new in (("cpu_offload", "offload_optimizer"), ("cpu_offload_param", "offload_param")):
            if zero.pop(old, False) is True:
                zero.setdefault(new, {"device": "cpu"})
        nothing = [key for key in ("offload_optimizer", "offload_param") if key in zero and zero[key] is None]
        found["zero_optimization"] = {key: value for key, value in zero.items() if key not in nothing}
    return found


def _without_auto(found: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: _without_auto(value) if isinstance(value, Mapping) and key != "zgraph" else value
        for key, value in found.items()
        if value != "auto"
    }


def _named(reading: Reading, section: str, found: Mapping[str, Any], kinds: Mapping[str, type[Any]]) -> Any:
    """What an optimizer or a scheduler takes, by its type."""
    name, params = found.get("type"), found.get("params", {})
    kind = next((k for n, k in kinds.items() if isinstance(name, str) and n.lower() == name.lower()), None)
    if kind is None:
        if isinstance(name, str):
            reading.problems.append(f"{section}.type: there is no {name}; it is one of {', '.join(kinds)}")
        return None
    return reading.read(kind, params, f"{section}.params") if isinstance(params, Mapping) else None


def _check_together(reading: Reading, keys: EngineConfig) -> None:
    zero = keys.zero_optimization
    if keys.fp16.enabled and keys.bf16.enabled:
        reading.problems.append("fp16.enabled, bf16.enabled: choose one of them")
    for name, least in (("offload_param", 3), ("offload_optimizer", 1)):
        if getattr(zero, name).device != "none" and zero.stage < least:
            reading.notes.append(f"zero_optimization.{name} has no effect: it takes stage {least} or more")
    if zero.offload_optimizer.device == "nvme" and zero.offload_optimizer.nvme_path is None:
        reading.problems.append("zero_optimization.offload_optimizer.nvme_path: where do the files go?")
    if zero.offload_param.device == "nvme":
        reading.problems.append('zero_optimization.offload_param.device: parameters go to "cpu" only')
    for package in PACKAGES:
        if getattr(keys, package).enabled and not is_installed(package):
            reading.problems.append(f"{package}.enabled: the package is missing; pip install {package}")


def _batches(reading: Reading, keys: EngineConfig, world_size: int) -> tuple[int, int]:
    """Rows of a forward and forwards of a step: train_batch_size is their product with the ranks."""
    train, micro, steps = keys.train_batch_size, keys.train_micro_batch_size_per_gpu, keys.gradient_accumulation_steps
    rule = "train_batch_size = train_micro_batch_size_per_gpu x gradient_accumulation_steps x ranks"
    if train is None and micro is None:
        reading.problems.append("train_batch_size, train_micro_batch_size_per_gpu: give one of them")
        return 1, 1
    if train is None:
        assert micro is not None
        return micro, steps or 1
    if micro is None:
        micro = train // (world_size * (steps or 1))
    steps = steps or (train // (world_size * micro) if micro else 0)
    if micro * steps * world_size != train:
        reading.problems.append(f"train_batch_size: {rule}, and {train} is not {micro} x {steps} x {world_size}")
    return micro, steps
