"""Keys of `fsdp_config` in a file of `accelerate config`: `accelerate launch` hands them over as FSDP_... variables."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from zgraph.engine.config.sections import NO_EFFECT, asks
from zgraph.errors import ConfigError, did_you_mean
from zgraph.hf.parallelism import Together

STAGES = {
    "FULL_SHARD": 3,
    "SHARD_GRAD_OP": 2,
    "NO_SHARD": 0,
    "HYBRID_SHARD": 3,
    "HYBRID_SHARD_ZERO2": 2,
}
"""FSDP's strategies in the order of their numbers, and the ZeRO stage that shards as much."""

_ONE_OF = f"it is one of {', '.join(STAGES)}"
_SCHEDULE = "the pass `schedule` moves communication behind computing"
_GRAPH = "the graph needs no wrapped modules: the pass `bucket` chooses what is sent together"
_FIRST = "the first rank's parameters are taken on every rank, one after the other"

IGNORED = {
    **dict.fromkeys(("BACKWARD_PREFETCH", "FORWARD_PREFETCH"), _SCHEDULE),
    **dict.fromkeys(("AUTO_WRAP_POLICY", "TRANSFORMER_CLS_TO_WRAP", "MIN_NUM_PARAMS"), _GRAPH),
    **dict.fromkeys(("CPU_RAM_EFFICIENT_LOADING", "SYNC_MODULE_STATES"), _FIRST),
    "USE_ORIG_PARAMS": "parameters keep their names",
    "STATE_DICT_TYPE": "save_pretrained and save_model write whole weights",
}
"""Keys without effect, each with what decides instead."""

USUAL = {"FORWARD_PREFETCH": "false", "MIN_NUM_PARAMS": "100000000", "USE_ORIG_PARAMS": "true"}
"""Values that `accelerate launch` hands over where the file says nothing."""


@dataclass(frozen=True)
class FromFile:
    """Options of zgraph that a file asks for.

    Args:
        options: of `zgraph.compile`.
        is_hybrid: whether to shard within a host, and to replicate over hosts.
        notes: for each key that has no effect, what decides instead.
        num_copies: ranks that hold the same shard; 1 leaves it to `is_hybrid`.
    """

    options: dict[str, Any] = field(default_factory=dict)
    is_hybrid: bool = False
    notes: tuple[str, ...] = ()
    num_copies: int = 1

    def along(self, together: Together) -> FromFile:
        """The same, with ranks that compute together.

        Raises:
            ConfigError: hosts are to have copies, too.
        """
        sizes = {f"{axis}_parallel": getattr(together, axis) for axis in ("tensor", "context")}
        sizes = {name: size for name, size in sizes.items() if size > 1}
        if sizes and self.is_hybrid:
            raise ConfigError(
                ["fsdp_sharding_strategy: where ranks compute together, all others shard; choose FULL_SHARD"]
            )
        return replace(self, options={**self.options, **sizes}, num_copies=together.copies)


def from_file(variables: Mapping[str, str]) -> FromFile:
    """Read the variables of `accelerate launch`; without FSDP among them, nothing is asked.

    Raises:
        ConfigError: a key asks for what zgraph does not have; the error has all problems.
    """
    problems = _refused(variables)
    if not _is_on(variables, "ACCELERATE_USE_FSDP"):
        if problems:
            raise ConfigError(problems)
        return FromFile()
    strategy = _strategy(variables, problems)
    if _is_on(variables, "FSDP_ACTIVATION_CHECKPOINTING_OFFLOAD") or _is_on(variables, "FSDP_OFFLOAD_PARAMS"):
        kinds = {"parameters": "FSDP_OFFLOAD_PARAMS", "activations": "FSDP_ACTIVATION_CHECKPOINTING_OFFLOAD"}
        options: dict[str, Any] = {"offload": tuple(kind for kind, key in kinds.items() if _is_on(variables, key))}
    else:
        options = {}
    if _is_on(variables, "FSDP_ACTIVATION_CHECKPOINTING"):
        options["recompute"] = True
    if problems:
        raise ConfigError(problems)
    given = {key: variables.get(f"FSDP_{key}") for key in IGNORED}
    notes = [
        f"fsdp_{key.lower()}{NO_EFFECT}{IGNORED[key]}"
        for key, value in given.items()
        if value is not None and value.lower() != USUAL.get(key, "none")
    ]
    return FromFile({"stage": STAGES[strategy], **options}, strategy.startswith("HYBRID"), tuple(notes))


def _refused(variables: Mapping[str, str]) -> list[str]:
    """Problems with what is not FSDP's, or has no counterpart."""
    asked = {
        "distributed_type: DEEPSPEED: take zgraph.initialize, which reads its file, or FSDP": (
            _is_on(variables, "ACCELERATE_USE_DEEPSPEED")
        ),
        "distributed_type: MEGATRON_LM: there is no pipeline parallelism; take FSDP, with parallelism_config": (
            _is_on(variables, "ACCELERATE_USE_MEGATRON_LM")
        ),
        "dynamo_backend: zgraph compiles; leave it out": (
            variables.get("ACCELERATE_DYNAMO_BACKEND", "no").lower() not in ("no", "")
        ),
        "fsdp_ignored_modules: every parameter is sharded; leave it out": (
            _is_on(variables, "ACCELERATE_USE_FSDP") and asks(variables.get("FSDP_IGNORED_MODULES", ""))
        ),
    }
    return [problem for problem, is_asked in asked.items() if is_asked]


def _strategy(variables: Mapping[str, str], problems: list[str]) -> str:
    """FSDP's strategy: of version 2, whether parameters are kept from the forward to the backward."""
    reshards = variables.get("FSDP_RESHARD_AFTER_FORWARD", "true").upper()
    if variables.get("FSDP_VERSION", "1") == "2":
        if reshards not in ("TRUE", "FALSE"):
            problems.append(f"fsdp_reshard_after_forward: it must be true or false, not {reshards.lower()}")
        return "FULL_SHARD" if reshards == "TRUE" else "SHARD_GRAD_OP"
    given = variables.get("FSDP_SHARDING_STRATEGY", "FULL_SHARD").upper()
    if given == "FULL_SHARD" and reshards in STAGES:
        given = reshards  # where `accelerate config` writes the strategy of version 1
    numbered = {str(number): name for number, name in enumerate(STAGES, 1)}
    strategy = numbered.get(given, given)
    if strategy not in STAGES:
        problems.append(f"fsdp_sharding_strategy: there is no {given}; {did_you_mean(given, STAGES, _ONE_OF)}")
        return "FULL_SHARD"
    return strategy


def _is_on(variables: Mapping[str, str], key: str) -> bool:
    return variables.get(key, "false").lower() in ("1", "true", "yes")
