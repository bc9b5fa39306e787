"""The keys of a configuration: DeepSpeed's sections and zgraph's own.

Each section has keys that act, those that something else decides here, and those that are refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from zgraph.bridge.dtypes import as_dtype
from zgraph.engine.config.checkpoint_keys import RESUMES, CheckpointKeys
from zgraph.engine.config.sections import Section

_SCHEDULE = "the pass `schedule` moves communication behind computing for the costs of the hardware"
_BUCKET = "the pass `bucket` chooses the sizes for which the predicted step is shortest"
_BUDGET = "`zgraph.memory_budget` decides what is kept, gathered again, or computed again"
_ALWAYS = "it is always so"
_HOST = "the runtime sizes, pins and streams its host memory itself"


def _known(name: Any) -> Any:
    as_dtype(name, "a dtype")
    return name


Precision = Annotated[str, BeforeValidator(_known)]
"""A word for a dtype, as `zgraph.compile` takes it."""


class Offload(Section):
    """`offload_optimizer` or `offload_param`."""

    ignored: ClassVar[Mapping[str, str]] = dict.fromkeys(
        (
            "pin_memory",
            "buffer_count",
            "buffer_size",
            "max_in_cpu",
            "pipeline_read",
            "pipeline_write",
            "pipeline",
            "fast_init",
            "cpuadam_cores_perc",
        ),
        _HOST,
    )
    unsupported: ClassVar[Mapping[str, str]] = {
        "ratio": "all of the optimizer's state goes where `device` says: leave it out",
        "super_offload": "leave it out",
    }

    device: Literal["none", "cpu", "nvme"] = "none"
    nvme_path: Path | None = None


_EXACT = 'leave it out, and set zgraph.compress: "exact", which gathers weights in fewer bytes and rounds nothing'


class Zero(Section):
    """`zero_optimization`."""

    ignored: ClassVar[Mapping[str, str]] = {
        **dict.fromkeys(
            (
                "overlap_comm",
                "contiguous_gradients",
                "round_robin_gradients",
                "allgather_sequential",
                "stage3_allgather_sequential",
                "prefetch_bucket_size",
                "stage3_prefetch_bucket_size",
            ),
            _SCHEDULE,
        ),
        **dict.fromkeys(
            (
                "reduce_bucket_size",
                "allgather_bucket_size",
                "use_multi_rank_bucket_allreduce",
                "parameter_alignment",
                "module_granularity_threshold",
                "stage3_module_granularity_threshold",
            ),
            _BUCKET,
        ),
        **dict.fromkeys(
            (
                "max_live_parameters",
                "stage3_max_live_parameters",
                "max_reuse_distance",
                "stage3_max_reuse_distance",
                "model_persistence_threshold",
                "stage3_model_persistence_threshold",
                "memory_efficient_linear",
                "sub_group_size",
            ),
            _BUDGET,
        ),
        **dict.fromkeys(
            (
                "reduce_scatter",
                "allgather_partitions",
                "use_all_reduce_for_fetch_params",
                "stage3_use_all_reduce_for_fetch_params",
            ),
            "the passes choose the collective",
        ),
        **dict.fromkeys(
            ("load_from_fp32_weights", "compute_grad_norm", "ignore_unused_parameters", "override_module_apply"),
            _ALWAYS,
        ),
        **dict.fromkeys(("elastic_checkpoint", "pipeline_loading_checkpoint"), RESUMES),
        **dict.fromkeys(("log_trace_cache_warnings", "enable_sanity_checks"), "ZGRAPH_VERIFY checks every pass"),
        "legacy_stage1": "there is one stage 1",
        "leaf_module": "modules are not gathered as such: the graph has no hooks",
        "cpu_offload_use_pin_memory": _HOST,
    }
    unsupported: ClassVar[Mapping[str, str]] = {
        "zero_quantized_nontrainable_weights": _EXACT,
        "zenflow": "leave it out",
        **dict.fromkeys(
            ("mics_shard_size", "mics_hierarchical_params_gather"),
            "choose `zero_hpz_partition_size`, which shards everything over so many ranks",
        ),
        "save_muon_momentum_buffer_in_memory": "leave it out",
    }

    stage: Literal[0, 1, 2, 3] = 0
    offload_optimizer: Offload = Offload()
    offload_param: Offload = Offload()
    stage3_param_persistence_threshold: NonNegativeInt | None = None
    stage3_gather_16bit_weights_on_model_save: bool = False
    zero_hpz_partition_size: PositiveInt = 1
    zero_quantized_weights: bool = False
    zero_quantized_gradients: bool = False


class FP16(Section):
    """`fp16`: computing in half precision, with a loss scale that follows overflows."""

    ignored: ClassVar[Mapping[str, str]] = {"auto_cast": "inputs are always cast to the dtype to compute in"}
    unsupported: ClassVar[Mapping[str, str]] = {
        "fp16_master_weights_and_grads": "masters are fp32: leave it out",
        "amp": "leave it out",
        "opt_level": "leave it out",
    }

    enabled: bool = False
    loss_scale: NonNegativeFloat = 0.0
    initial_scale_power: NonNegativeInt = 16
    loss_scale_window: PositiveInt = 1000
    hysteresis: PositiveInt = 2
    consecutive_hysteresis: bool = False
    min_loss_scale: PositiveFloat = 1.0


class BF16(Section):
    """`bf16`: computing in bfloat16, with masters in fp32."""

    ignored: ClassVar[Mapping[str, str]] = {
        "immediate_grad_update": "gradients are added where they are reduced",
    }
    unsupported: ClassVar[Mapping[str, str]] = {
        "bf16_master_weights_and_grads": "masters are fp32: leave it out",
        "bf16_optimizer_states": "leave it out",
    }

    enabled: bool = False
    check_grad_overflow: bool = True


class Checkpointing(Section):
    """`activation_checkpointing`."""

    ignored: ClassVar[Mapping[str, str]] = dict.fromkeys(
        (
            "partition_activations",
            "contiguous_memory_optimization",
            "number_checkpoints",
            "synchronize_checkpoint_boundary",
            "profile",
        ),
        _BUDGET,
    )

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

    ignored: ClassVar[Mapping[str, str]] = dict.fromkeys(
        ("prof_all", "prof_ops", "verbose", "debug"), "the table has every collective of the plan"
    )

    enabled: bool = False


class FlopsProfiler(Section):
    """`flops_profiler`: FLOP by module, from the graph."""

    ignored: ClassVar[Mapping[str, str]] = {
        "recompute_fwd_factor": "what is computed again is in the graph, and counted",
    }

    enabled: bool = False
    profile_step: PositiveInt = 1
    module_depth: int = -1
    top_modules: PositiveInt = 1
    detailed: bool = True
    output_file: Path | None = None


class DataTypes(Section):
    """`data_types`."""

    ignored: ClassVar[Mapping[str, str]] = {
        "grad_accum_dtype": "gradients are added in the dtype of the masters",
        "keep_in_fp32_modules": "buffers keep their dtype",
    }
    unsupported: ClassVar[Mapping[str, str]] = {
        "param_dtype": "choose fp16 or bf16",
        "buffer_dtype": "buffers keep their dtype: leave it out",
    }


class OptimizerKeys(Section):
    """`optimizer`: its type, and what that takes."""

    ignored: ClassVar[Mapping[str, str]] = dict.fromkeys(
        ("legacy_fusion", "torch_adam"), "the update is over flat shards"
    )

    type: str
    params: dict[str, Any] = Field(default_factory=dict)
    max_grad_norm: NonNegativeFloat | None = None


class SchedulerKeys(Section):
    """`scheduler`: its type, and what that takes."""

    type: str
    params: dict[str, Any] = Field(default_factory=dict)


class TensorParallel(Section):
    """`tensor_parallel`: ranks that compute every op together."""

    ignored: ClassVar[Mapping[str, str]] = {
        "tp_overlap_comm": _SCHEDULE,
        "dtype": "choose fp16 or bf16",
        "keep_module_on_host": _HOST,
    }
    unsupported: ClassVar[Mapping[str, str]] = {
        **dict.fromkeys(("tensor_parallel", "tp"), "give autotp_size, the number of ranks"),
        **dict.fromkeys(
            ("injection_policy_tuple", "injection_policy", "partition_config", "preset_model"),
            "say in zgraph.placements how parameters are cut",
        ),
        **dict.fromkeys(("replace_with_kernel_inject", "kernel_inject"), "leave it out"),
    }

    autotp_size: NonNegativeInt = 0


class ExpertParallel(Section):
    """`expert_parallel`: ranks that share the experts of a mixture."""

    ignored: ClassVar[Mapping[str, str]] = {
        **dict.fromkeys(
            ("preset_model", "moe_layer_pattern", "expert_pattern", "router_pattern"),
            "experts are found in the model and in its graph",
        ),
        **dict.fromkeys(("use_grouped_mm", "grouped_mm_backend"), "the model's own product of groups runs"),
    }

    enabled: bool = False
    autoep_size: PositiveInt = 1


class Own(Section):
    """`zgraph`: what DeepSpeed has no word for; each as `zgraph.compile` takes it."""

    memory_budget: int | str | None = None
    recipe: str | None = None
    hardware: str | None = None
    kernels: Literal["aten", "triton", "inductor", "auto"] | None = None
    compute: Literal["float8", "float8-rowwise"] | None = None
    compress: str | dict[str, str] | None = None
    recompute: Literal["auto"] | bool = "auto"
    fullgraph: bool | Literal["eager"] = True
    dynamic: bool | None = None
    save: Path | None = None
    sequence_parallel: bool = False
    placements: dict[str, str] | None = None
    cuda_graphs: Literal["auto"] | bool = False
    regions: Literal["python", "c++", "auto"] = "python"


class EngineConfig(Section):
    """A configuration, read and checked. Its fields have DeepSpeed's names."""

    ignored: ClassVar[Mapping[str, str]] = {
        "zero_allow_untested_optimizer": "any optimizer that steps over DTensors is taken",
        "zero_force_ds_cpu_optimizer": "any optimizer that steps over DTensors is taken",
        "prescale_gradients": "gradients are averaged while they are summed",
        "gradient_predivide_factor": "gradients are averaged while they are summed",
        "disable_allgather": "the passes choose the collective",
        "sparse_gradients": "the gradient of an embedding is sharded as any other",
        "compile": "zgraph always compiles",
        "aio": _HOST,
        "nebula": "every rank writes its own files",
        "disable_python_gc": _ALWAYS,
        "log_level": "the logger `zgraph` of Python's logging",
        "graph_harvesting": "the whole step is one graph",
        "use_data_before_expert_parallelism": "ranks that share experts are neighbours",
        "hybrid_engine": "the model generates as it is: call engine.eval()",
        "autotuning": "zgraph.plan finds the stage; run `zgraph plan`",
        "memory_breakdown": "zgraph.report says what is alive at the peak, and zgraph view when",
        "seq_parallel_communication_data_type": "what is exchanged keeps its dtype",
        "vocabulary_size": "kernels know their sizes",
    }
    unsupported: ClassVar[Mapping[str, str]] = {
        **dict.fromkeys(("amp", "torch_autocast"), "choose fp16 or bf16"),
        **dict.fromkeys(
            (
                "elasticity",
                "data_efficiency",
                "curriculum_learning",
                "data_sampling",
                "eigenvalue",
                "progressive_layer_drop",
                "quantize_training",
                "compression_training",
                "sparse_attention",
                "pipeline",
                "random_ltd",
                "weight_quantization",
                "comet",
                "dump_state",
                "check_overflow",
                "autotp_size",
                "data_parallel_size",
            ),
            "leave it out",
        ),
        "moe": 'say "expert_parallel": {"enabled": true, "autoep_size": 2}',
    }

    train_batch_size: PositiveInt | None = None
    train_micro_batch_size_per_gpu: PositiveInt | None = None
    gradient_accumulation_steps: PositiveInt | None = None
    optimizer: OptimizerKeys | None = None
    scheduler: SchedulerKeys | None = None
    fp16: FP16 = FP16()
    bf16: BF16 = BF16()
    gradient_clipping: NonNegativeFloat = 1.0
    gradient_allreduce_op: Literal["mean"] = "mean"
    communication_data_type: Precision | None = None
    zero_optimization: Zero = Zero()
    activation_checkpointing: Checkpointing = Checkpointing()
    data_types: DataTypes = DataTypes()
    dataloader_drop_last: bool = False
    steps_per_print: NonNegativeInt | None = None
    managed_gradient_accumulation: bool = True
    wall_clock_breakdown: bool = False
    comms_logger: CommsLogger = CommsLogger()
    flops_profiler: FlopsProfiler = FlopsProfiler()
    tensorboard: Monitor = Monitor()
    csv_monitor: Monitor = Monitor()
    wandb: WandB = WandB()
    checkpoint: CheckpointKeys = CheckpointKeys()
    tensor_parallel: TensorParallel = TensorParallel()
    sequence_parallel_size: PositiveInt = 1
    expert_parallel: ExpertParallel = ExpertParallel()
    seed: NonNegativeInt | None = None
    zgraph: Own = Own()
