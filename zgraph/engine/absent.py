"""Names that DeepSpeed's engine has and this one has not, each with what to do instead."""

from __future__ import annotations

_KEYS = "engine.config.keys has the keys that act, under the names of the JSON"
_UNDECIDED = "leave it out: the passes decide, and zgraph.report(engine.module) says what they chose"
_FEATURE = "leave it out: zgraph does not have what it asks about"
_REDUCED = "leave it out: engine.backward has averaged the gradients"

ABSENT: dict[str, str] = {
    "compile": "leave it out: zgraph.initialize has compiled the model",
    "collect_python_gc": "call gc.collect()",
    "set_train_micro_batch_size": "give batches of any size, and say by set_train_batch_size how many end a step",
    "deepspeed_io": "give training_data= to zgraph.initialize, or a DataLoader of your own with a DistributedSampler",
    "get_type": "call engine.optimizer_name()",
    "get_data_types": "engine.config.param_dtype is the dtype to compute in; masters are fp32",
    "get_optimizer_configuration": "call engine.optimizer_name() and engine.optimizer_params()",
    "clip_fp32_gradients": "engine.step clips: give gradient_clipping in the configuration",
    "coalesce_grad_reduction": "leave it out: the pass `bucket` sends small gradients together",
    "offload_states": "give offload_optimizer or offload_param in the configuration: what is offloaded streams",
    "reload_states": "leave it out: what is offloaded comes back by itself",
    "register_compile_pass": "call zgraph.register_pass, and name the pass in the recipe",
    "get_wall_clock_timers": "give wall_clock_breakdown in the configuration",
    "print_forward_breakdown": "give flops_profiler in the configuration",
    "get_compile_time": "ZGRAPH_LOGS=capture tells what each compile takes",
    "get_model_parallel_rank": "it would be 0: there is no tensor parallelism",
    "get_tensor_parallel_rank": "it would be 0: there is no tensor parallelism",
    "get_sequence_parallel_group": "leave it out: there is no sequence parallelism",
    "load_moe_state_dict": "call engine.load_module_state_dict: experts are parameters as any other",
    "load_universal_checkpoint": "call engine.load_checkpoint: every checkpoint resumes at any number of ranks",
    "dump_state": "engine.config prints the configuration",
    "is_map_style_dataset": "call hasattr(dataset, '__getitem__')",
    "is_iterable_style_dataset": "call isinstance(dataset, torch.utils.data.IterableDataset)",
    "set_data_post_process_func": "change the batch before it is given to the engine",
    **dict.fromkeys(
        ("allreduce_gradients", "allreduce_bucket", "allreduce_and_copy", "allreduce_no_retain",
         "buffered_allreduce_fallback", "sparse_allreduce_no_retain", "sparse_allreduce_bucket", "sparse_allreduce",
         "sparse_all_gather", "all_gather_scalar"), _REDUCED,
    ),
    **dict.fromkeys(
        ("is_deepcompile_enabled", "is_deepcompile_active", "get_deepcompile_backend", "get_deepspeed_compile_backend",
         "get_autosp_backend", "get_autotp_backend", "compile_zero_optimization_stage", "compile_autosp",
         "compile_autotp", "uses_parallelization_pass_only"),
        "leave it out: zgraph.report(engine.module) says what was compiled",
    ),
    **dict.fromkeys(
        ("checkpoint_serialization_enabled", "checkpoint_writer_enabled", "checkpoint_tag_validation_enabled",
         "checkpoint_tag_validation_fail", "flops_profiler_enabled", "flops_profiler_recompute_fwd_factor",
         "flops_profiler_profile_step", "flops_profiler_module_depth", "flops_profiler_top_modules",
         "flops_profiler_detailed", "flops_profiler_output_file", "managed_gradient_accumulation",
         "use_node_local_storage", "log_level", "zero_param_persistence_threshold", "zero_nvme_offload_optimizer",
         "zero_use_cpu_optimizer", "dynamic_loss_scale_args", "is_first_weights_partition_group"), _KEYS,
    ),
    **dict.fromkeys(
        ("memory_breakdown", "optimizer_legacy_fusion", "zero_allow_untested_optimizer",
         "zero_force_ds_cpu_optimizer", "zero_reduce_scatter", "zero_overlap_comm", "zero_sub_group_size",
         "zero_reduce_bucket_size", "zero_multi_rank_bucket_allreduce", "zero_allgather_bucket_size",
         "zero_compute_grad_norm", "zero_contiguous_gradients", "zero_load_from_fp32_weights",
         "zero_elastic_checkpoint", "zero_max_live_parameters", "zero_max_reuse_distance",
         "zero_prefetch_bucket_size", "zero_module_granularity_threshold", "zero_model_persistence_threshold",
         "zero_legacy_stage1", "zero_ignore_unused_parameters", "zero_allgather_partitions",
         "zero_round_robin_gradients", "zero_parameter_alignment", "zero_log_trace_cache_warnings",
         "zero_allgather_sequential", "is_sanity_checks_enabled", "postscale_gradients", "gradient_predivide_factor",
         "fp16_auto_cast", "cpuadam_cores_perc", "swap_tensor_config", "aio_config"), _UNDECIDED,
    ),
    **dict.fromkeys(
        ("set_custom_curriculum_learning_schedule", "data_efficiency_enabled", "data_efficiency_config",
         "data_sampling_enabled", "data_sampling_config", "curriculum_learning_enabled", "curriculum_learning_config",
         "random_ltd_enabled", "random_ltd_config", "random_ltd_initialize", "autotuning_enabled",
         "autotuning_start_profile_step", "autotuning_end_profile_step", "autotuning_metric_path",
         "autotuning_model_info_path", "autotuning_metric", "autotuning_profile_model_info", "zero_partial_offload",
         "super_offload", "zero_save_muon_momentum_buffer_in_memory", "tensor_parallel_config", "autotp_size",
         "fp16_master_weights_and_gradients", "bf16_master_weights_and_gradients", "bf16_optimizer_states",
         "torch_autocast_enabled", "torch_autocast_dtype", "torch_autocast_lower_precision_safe_modules",
         "zero_quantized_weights", "zero_quantized_nontrainable_weights", "zero_quantized_gradients",
         "zenflow_config"), _FEATURE,
    ),
}  # fmt: skip
