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
from typing import Any, Literal

from zgraph.engine.config.keys import EngineConfig, Zero
from zgraph.engine.config.lr_schedules import SCHEDULES, Schedule
from zgraph.engine.config.optimizers import ABSENT_OPTIMIZERS, OPTIMIZERS, OptimizerParams
from zgraph.engine.config.sections import NO_EFFECT, Reading, flatten
from zgraph.engine.monitor.writers import PACKAGES, is_installed
from zgraph.errors import CodecError, ConfigError, UsageError
from zgraph.options.compression import codes_of


@dataclass(frozen=True)
class Config:
    """Result of `read_config`.

    Args:
        keys: the configuration's keys.
        micro_batch: rows of one forward on one rank.
        accumulation: forwards before a step.
        world_size: ranks that each have a batch of their own.
        optimizer: parameters of the optimizer; None if the configuration names none.
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
    def state_folder(self) -> Path | None:
        """Where the optimizer's state lies, if on disk."""
        offload = self.keys.zero_optimization.offload_optimizer
        return offload.nvme_path if offload.device == "nvme" else None

    @property
    def tensor_parallel(self) -> int:
        """Ranks that compute every op together, on one batch."""
        return max(self.keys.tensor_parallel.autotp_size, 1)

    @property
    def context_parallel(self) -> int:
        """Ranks that share each sequence of one batch."""
        return self.keys.sequence_parallel_size

    @property
    def expert_parallel(self) -> int:
        """Ranks that share the experts, each with a batch of its own."""
        return _experts(self.keys)

    @property
    def together(self) -> int:
        """Ranks that compute together, and so draw the same random numbers."""
        return self.alike * self.expert_parallel

    @property
    def alike(self) -> int:
        """Ranks that have the same batch."""
        return self.tensor_parallel * self.context_parallel

    @property
    def num_ranks(self) -> int:
        """All ranks."""
        return self.world_size * self.tensor_parallel * self.context_parallel

    @property
    def train_batch(self) -> int:
        """Rows of all ranks and forwards before a step."""
        return self.micro_batch * self.accumulation * self.world_size

    @property
    def param_dtype(self) -> Literal["float16", "bfloat16"] | None:
        """Compute dtype, as a torch attribute name; None for the dtype of the parameters."""
        return "float16" if self.keys.fp16.enabled else "bfloat16" if self.keys.bf16.enabled else None


def read_config(source: Mapping[str, Any] | str | Path, *, world_size: int) -> Config:
    """Read and check a configuration.

    Args:
        source: a mapping, the path of a JSON file, or JSON in base64.
        world_size: all ranks.

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
        world_size = _data_ranks(reading, keys, world_size)
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
    zero = {f"zero_optimization.{key}" for key in Zero.ignored}
    return [place for place in automatic if place not in zero and place.rpartition(".")[2] not in EngineConfig.ignored]


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
    """The parameters of an optimizer or a scheduler, by its type."""
    name, params = found.get("type"), found.get("params", {})
    kind = next((k for n, k in kinds.items() if isinstance(name, str) and n.lower() == name.lower()), None)
    if kind is None:
        if isinstance(name, str):
            remedy = ABSENT_OPTIMIZERS.get(name, f"it is one of {', '.join(kinds)}")
            reading.problems.append(f"{section}.type: there is no {name}; {remedy}")
        return None
    return reading.read(kind, params, f"{section}.params") if isinstance(params, Mapping) else None


def _check_together(reading: Reading, keys: EngineConfig) -> None:
    zero = keys.zero_optimization
    if keys.fp16.enabled and keys.bf16.enabled:
        reading.problems.append("fp16.enabled, bf16.enabled: choose one of them")
    if not keys.managed_gradient_accumulation:
        reading.problems.append(
            "managed_gradient_accumulation: call engine.step() after every micro-batch and leave the key out, or say "
            "which ends a step by engine.set_gradient_accumulation_boundary"
        )
    if zero.zero_quantized_weights and zero.stage < 1:
        reading.notes.append(f"zero_optimization.zero_quantized_weights{NO_EFFECT}it takes stage 1 or more")
    if keys.zgraph.compress is not None and (zero.zero_quantized_gradients or zero.zero_quantized_weights):
        reading.problems.append(
            "zgraph.compress: takes the place of zero_quantized_gradients and zero_quantized_weights; write "
            '{"gradients": "q4", "parameters": "q8"} there, and leave them out'
        )
    try:
        codes_of(keys.zgraph.compress)
    except (CodecError, UsageError) as error:
        reading.problems.append(f"zgraph.compress: {str(error).splitlines()[0]}")
    for name, least in (("offload_param", 3), ("offload_optimizer", 1)):
        if getattr(zero, name).device != "none" and zero.stage < least:
            reading.notes.append(f"zero_optimization.{name}{NO_EFFECT}it takes stage {least} or more")
    if zero.offload_optimizer.device == "nvme" and zero.offload_optimizer.nvme_path is None:
        reading.problems.append("zero_optimization.offload_optimizer.nvme_path: where do the files go?")
    if zero.offload_param.device == "nvme":
        reading.problems.append('zero_optimization.offload_param.device: parameters go to "cpu" only')
    for package in PACKAGES:
        if getattr(keys, package).enabled and not is_installed(package):
            reading.problems.append(f"{package}.enabled: the package is missing; pip install {package}")


def _experts(keys: EngineConfig) -> int:
    """Ranks that share the experts."""
    return keys.expert_parallel.autoep_size if keys.expert_parallel.enabled else 1


def _data_ranks(reading: Reading, keys: EngineConfig, world_size: int) -> int:
    """Ranks that each compute rows of their own."""
    tensor, context, expert = max(keys.tensor_parallel.autotp_size, 1), keys.sequence_parallel_size, _experts(keys)
    together = tensor * context * expert
    if world_size % together:
        named = ["tensor_parallel.autotp_size"] * (tensor > 1) + ["sequence_parallel_size"] * (context > 1)
        named += ["expert_parallel.autoep_size"] * (expert > 1)
        reading.problems.append(f"{', '.join(named)}: {world_size} ranks are no multiple of {together}")
    if together > 1 and keys.zero_optimization.zero_hpz_partition_size > 1:
        reading.problems.append(
            "zero_optimization.zero_hpz_partition_size: leave it out where ranks compute together (tensor_parallel, "
            "sequence_parallel_size, expert_parallel)"
        )
    if context > 1 and keys.zgraph.sequence_parallel:
        reading.problems.append(
            "zgraph.sequence_parallel: sequence_parallel_size cuts the sequence already; leave one of them out"
        )
    if tensor == 1 and (keys.zgraph.sequence_parallel or keys.zgraph.placements is not None):
        reading.problems.append(
            "zgraph.sequence_parallel, zgraph.placements: they say how tensor parallelism is done; give "
            "tensor_parallel.autotp_size too"
        )
    return max(world_size // (tensor * context), 1)


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
