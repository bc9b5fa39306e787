"""A DeepSpeed-style configuration beside TrainingArguments: "auto" is filled in, what contradicts them is refused."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from zgraph.engine.config.read import loaded, undecided
from zgraph.engine.config.sections import NO_EFFECT
from zgraph.errors import ConfigError
from zgraph.hf.parallelism import asked_together

DECIDED_ELSEWHERE = {
    **dict.fromkeys(("tensorboard", "csv_monitor", "wandb"), "report_to decides"),
    "steps_per_print": "logging_steps decides",
    "seed": "seed and data_seed decide",
    "dataloader_drop_last": "dataloader_drop_last of TrainingArguments decides",
    "checkpoint": "the Trainer writes its own checkpoints",
    **dict.fromkeys(("wall_clock_breakdown", "comms_logger", "flops_profiler"), "the engine's own loop has it"),
}
"""Keys of the engine that say nothing to a Trainer, each with what does."""

_LEFT_TO_ZGRAPH = "zero_optimization.stage3_param_persistence_threshold"


class _Known(NamedTuple):
    """Value that TrainingArguments give to a key.

    Args:
        place: of the key, with dots.
        value: theirs.
        argument: its name among them.
        always: whether it is filled in where the key is left out, too.
    """

    place: str
    value: Any
    argument: str
    always: bool = True


def filled(source: Mapping[str, Any] | str | Path, args: Any, *, num_steps: int | None = None) -> dict[str, Any]:
    """A configuration whose "auto" values are those of TrainingArguments.

    Args:
        source: a mapping, the path of a JSON file, or JSON in base64.
        args: TrainingArguments.
        num_steps: optimizer steps of the whole training; without it the `scheduler` is left out.

    Raises:
        ConfigError: it does not parse, or says something else than TrainingArguments; the error has all problems.
    """
    config = _copied(loaded(source))
    if num_steps is None:
        config.pop("scheduler", None)
    problems = []
    for known in _known(config, args, num_steps):
        section, key = _find(config, known.place)
        given = section.get(key, "auto" if known.always else None)
        if given == "auto":
            section[key] = known.value
        elif given is not None and not _same(given, known.value):
            problems.append(
                f'{known.place}: it is {given} here, and {known.value} by {known.argument}; give the same, or "auto"'
            )
    section, key = _find(config, _LEFT_TO_ZGRAPH)
    if section.get(key) == "auto":
        del section[key]
    problems += [f'{place}: TrainingArguments have no value for this "auto"; give one' for place in undecided(config)]
    if problems:
        raise ConfigError(problems)
    return config


def without_effect(config: Mapping[str, Any], notes: Sequence[str]) -> str:
    """A line about all keys that have no effect, with what decides instead; "" where there are none.

    Args:
        config: as `filled` gives it.
        notes: of reading it.
    """
    elsewhere = [f"{key}{NO_EFFECT}{why}" for key, why in DECIDED_ELSEWHERE.items() if key in config]
    listed = folded([*notes, *elsewhere])
    return f"without effect under a Trainer: {listed}" if listed else ""


def folded(notes: Sequence[str]) -> str:
    """Notes in one line: the keys, and behind those that something else decides together, what that is."""
    places: dict[str, list[str]] = defaultdict(list)
    for note in notes:
        place, _, why = note.partition(NO_EFFECT)
        places[why].append(place)
    return "; ".join(f"{', '.join(names)} ({why})" for why, names in places.items())


_TOGETHER = {
    "tensor": "tensor_parallel.autotp_size",
    "context": "sequence_parallel_size",
    "expert": "expert_parallel.autoep_size",
}
"""Keys of the ranks that compute together, by their axis."""


def _known(config: Mapping[str, Any], args: Any, num_steps: int | None) -> Iterator[_Known]:
    yield from _parallel(config, args)
    micro, steps = args.per_device_train_batch_size, args.gradient_accumulation_steps
    yield _Known("train_micro_batch_size_per_gpu", micro, "per_device_train_batch_size")
    yield _Known("gradient_accumulation_steps", steps, "gradient_accumulation_steps")
    rows, ranks = "per_device_train_batch_size x gradient_accumulation_steps x ranks", args.world_size
    for axis in ("tensor", "context"):  # by now what the arguments say is filled in
        ranks //= size if isinstance(size := _given(config, _TOGETHER[axis]), int) and size > 0 else 1
    yield _Known("train_batch_size", micro * steps * ranks, rows)
    yield _Known("gradient_clipping", args.max_grad_norm, "max_grad_norm")
    for name in ("fp16", "bf16"):
        yield _Known(f"{name}.enabled", args.mixed_precision == name, name)
    if isinstance(config.get("optimizer"), Mapping):
        yield _Known("optimizer.params.lr", args.learning_rate, "learning_rate")
        yield _Known("optimizer.params.weight_decay", args.weight_decay, "weight_decay")
        yield _Known("optimizer.params.betas", [args.adam_beta1, args.adam_beta2], "adam_beta1, adam_beta2", False)
        yield _Known("optimizer.params.eps", args.adam_epsilon, "adam_epsilon", False)
    if isinstance(config.get("scheduler"), Mapping) and num_steps is not None:
        warm_up = max(1, args.get_warmup_steps(num_steps))
        yield _Known("scheduler.params.warmup_max_lr", args.learning_rate, "learning_rate", False)
        yield _Known("scheduler.params.warmup_num_steps", warm_up, "warmup_steps", False)
        yield _Known("scheduler.params.total_num_steps", num_steps, "max_steps or num_train_epochs", False)
        if _find(config, "scheduler.params.warmup_min_lr")[0].get("warmup_min_lr") == "auto":
            yield _Known("scheduler.params.warmup_min_lr", 0.0, "nothing")


def _parallel(config: Mapping[str, Any], args: Any) -> Iterator[_Known]:
    """The ranks that compute together, where the arguments say that there are any, or a key is "auto"."""
    asked = asked_together(args, args.world_size)
    for axis, place in _TOGETHER.items():
        size, argument = getattr(asked, axis), asked.said_by.get(axis, f"{axis}_parallel")
        if size > 1 or _given(config, place) == "auto":
            yield _Known(place, size, argument)
    if asked.expert > 1:
        yield _Known("expert_parallel.enabled", True, asked.said_by["expert"])
    if asked.copies > 1:
        yield _Known(
            "zero_optimization.zero_hpz_partition_size",
            args.world_size // asked.copies,
            "parallelism_config.dp_replicate_size",
        )


def _given(config: Mapping[str, Any], place: str) -> Any:
    """Value that a configuration has at a place; None where it has nothing. Makes no section."""
    found: Any = config
    for name in place.split("."):
        found = found.get(name) if isinstance(found, Mapping) else None
    return found


def _find(config: Mapping[str, Any], place: str) -> tuple[MutableMapping[str, Any], str]:
    """The section that a place is in, made if there is none, and the key."""
    *sections, key = place.split(".")
    found: Any = config
    for name in sections:
        found = found.setdefault(name, {})
        if not isinstance(found, dict):
            return {}, key  # no section: `read_config` says so
    return found, key


def _copied(found: Mapping[str, Any]) -> dict[str, Any]:
    return {key: _copied(value) if isinstance(value, Mapping) else value for key, value in found.items()}


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return list(one) == list(other)
    return bool(one == other)
