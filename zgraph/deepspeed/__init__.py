"""DeepSpeed's names over zgraph: `import zgraph.deepspeed as deepspeed` in a script that was written for it.

Of names that DeepSpeed has and zgraph has not, an error says what to do instead.
"""

from zgraph.deepspeed import checkpointing, comm, ops, utils, zero
from zgraph.deepspeed.absent import finder
from zgraph.deepspeed.utils import log_dist, logger
from zgraph.engine.engine import Engine as DeepSpeedEngine
from zgraph.engine.initialize import add_config_arguments, init_distributed, initialize
from zgraph.version import __version__

__all__ = [
    "DeepSpeedEngine",
    "__version__",
    "add_config_arguments",
    "checkpointing",
    "comm",
    "init_distributed",
    "initialize",
    "log_dist",
    "logger",
    "ops",
    "utils",
    "zero",
]

__getattr__ = finder(
    __name__,
    {
        "init_inference": "call engine.eval(), or load the exported model in transformers: zgraph trains",
        "InferenceEngine": "call engine.eval(): zgraph trains",
        "DeepSpeedInferenceConfig": "leave it out: zgraph trains",
        "DeepSpeedConfig": "give the JSON to initialize, which reads and checks it",
        "DeepSpeedConfigError": "catch zgraph.errors.ConfigError",
        "DeepSpeedHybridEngine": "leave it out: a compiled model of transformers generates as it is",
        "PipelineModule": "give the whole model: stage 3 shards it; there is no pipeline parallelism",
        "PipelineEngine": "give the whole model: stage 3 shards it; there is no pipeline parallelism",
        "pipe": "give the whole model: stage 3 shards it; there is no pipeline parallelism",
        "moe": "take transformers' experts: zgraph.compile(model, expert_parallel=N) shares them over ranks",
        "tp_model_init": "leave it out: zgraph.compile(model, tensor_parallel=N) cuts the model",
        "set_autotp_mode": "leave it out: zgraph.compile(model, tensor_parallel=N) cuts the model",
        "DeepSpeedTransformerLayer": "take torch's or transformers' layer: kernels=\"triton\" fuses it",
        "DeepSpeedTransformerConfig": "take torch's or transformers' layer: kernels=\"triton\" fuses it",
        "replace_transformer_layer": 'leave it out: "zgraph": {"kernels": "triton"} in the configuration fuses',
        "module_inject": 'leave it out: "zgraph": {"kernels": "triton"} in the configuration fuses',
        "OnDevice": 'build the model under torch.device("meta")',
        "get_accelerator": "call torch.accelerator",
        "accelerator": "call torch.accelerator",
        "profiling": "give flops_profiler in the configuration, or run `zgraph view`",
        "sequence": "leave it out: zgraph.compile(model, context_parallel=N) cuts sequences",
        "autotuning": "run `zgraph plan`",
        "compression": "run `zgraph quantise`, which makes weights of int8 or int4",
        "monitor": "give tensorboard, csv_monitor or wandb in the configuration",
        "runtime": "its public names are here, in zero and in utils",
    },
)
