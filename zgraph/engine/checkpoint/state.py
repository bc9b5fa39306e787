"""State in an engine's checkpoint: tensors by the names of parameters, and everything else as JSON."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, Protocol

from pydantic import Field, NonNegativeInt, PositiveInt
from torch import nn

from zgraph.engine.checkpoint.json_codec import decode, encode
from zgraph.engine.checkpoint.optimizer_state import OptimizerState, optimizer_rest, optimizer_tensors
from zgraph.engine.checkpoint.rng_state import Randomness
from zgraph.engine.checkpoint.tensors import Tensors, model_tensors
from zgraph.errors import CheckpointError

if TYPE_CHECKING:
    from zgraph.engine.protocol import Trains


class Shaped(Protocol):
    """A tensor of a checkpoint, as far as it must fit."""

    @property
    def shape(self) -> tuple[int, ...]: ...


class State(OptimizerState):
    """All that is not a tensor, and the same on all ranks.

    Args:
        accumulation: micro-batches of a step.
        pending: those of them whose gradients are in the checkpoint, as they wait for the rest.
        buffers: the names of the model's tensors that are not parameters.
        dtype: the compute dtype, where that is not the dtype of the masters.
        config: that of the run, for information.
        model_info: the model's own configuration, if it has one as those of transformers have.
    """

    world_size: PositiveInt
    global_steps: NonNegativeInt
    micro_steps: NonNegativeInt
    skipped_steps: NonNegativeInt
    accumulation: PositiveInt = 1
    pending: NonNegativeInt = 0
    loss_scale: dict[str, int | float]
    scheduler: dict[str, Any] | None = None
    dataloader: dict[str, NonNegativeInt] | None = None
    client_state: dict[str, Any] = Field(default_factory=dict)
    buffers: tuple[str, ...] = ()
    dtype: Literal["float16", "bfloat16"] | None = None
    config: dict[str, Any] = Field(default_factory=dict)
    model_info: dict[str, Any] | None = None


class OfRank(Randomness):
    """State that each rank saves for itself.

    Args:
        client_state: its own, at stage 3; None where that of the first rank is everyone's.
    """

    client_state: dict[str, Any] | None = None


STATE = "state.json"


def of_rank(rank: int) -> str:
    """The name of the file that has the state of a rank."""
    return f"rank_{rank}.json"


# --- what is saved ---------------------------------------------------------------------------------------------------


def tensors_of(engine: Trains) -> Tensors:
    """All tensors of a checkpoint: `model.NAME`, and `optimizer.KEY.NAME`."""
    found = {f"model.{name}": tensor for name, tensor in model_tensors(engine.module).items()}
    return found | (optimizer_tensors(engine.module, engine.optimizer) if engine.optimizer is not None else {})


def without_frozen(module: nn.Module, tensors: Tensors) -> Tensors:
    """Those of a checkpoint that training changes."""
    frozen = {f"model.{n}" for n, p in module.named_parameters() if not p.requires_grad}
    return {name: tensor for name, tensor in tensors.items() if name not in frozen}


def state_of(engine: Trains, client_state: Mapping[str, Any]) -> State:
    """The rest.

    Raises:
        CheckpointError: JSON cannot hold something; the error names the key.
    """
    scheduler, loader = engine.lr_scheduler, engine.training_dataloader
    rest = optimizer_rest(engine.module, engine.optimizer) if engine.optimizer is not None else OptimizerState()
    config: Any = getattr(engine.module, "config", None)
    tensors = model_tensors(engine.module)
    return State(
        world_size=engine.config.num_ranks,
        global_steps=engine.global_steps,
        micro_steps=engine.micro_steps,
        skipped_steps=engine.skipped_steps,
        accumulation=engine.accumulation,
        pending=engine.pending,
        loss_scale=engine.loss_scaler.state_dict(),
        scheduler=encode(scheduler.state_dict(), "lr_scheduler") if scheduler is not None else None,
        dataloader=loader.state_dict() if loader is not None else None,
        groups=rest.groups,
        values=rest.values,
        client_state=encode(dict(client_state), "client_state"),
        buffers=tuple(name for name, tensor in tensors.items() if not isinstance(tensor, nn.Parameter)),
        dtype=engine.config.param_dtype,
        config=engine.config.keys.model_dump(mode="json"),
        model_info=config.to_diff_dict() if hasattr(config, "to_diff_dict") else None,
    )


def texts_of(engine: Trains, client_state: Mapping[str, Any], *, of_all: bool) -> dict[str, str]:
    """The JSON files that this rank writes beside its tensors.

    Args:
        of_all: whether the state that is the same on all ranks is among them.

    Raises:
        CheckpointError: JSON cannot hold something; the error names the key.
    """
    state, rank = state_of(engine, client_state), engine.ranks.rank
    mine = encode(dict(client_state), "client_state") if engine.zero_optimization_stage() == 3 else None
    own = OfRank(**dict(Randomness.here()), client_state=mine)
    found = {of_rank(rank): own.model_dump_json()}
    return found | ({STATE: state.model_dump_json()} if of_all else {})


# --- what is loaded --------------------------------------------------------------------------------------------------


def model_targets(module: nn.Module, stored: Mapping[str, Shaped], *, strict: bool) -> Tensors:
    """Where a checkpoint's values of the model go.

    Raises:
        CheckpointError: it does not fit the model.
    """
    wanted = {f"model.{name}": tensor for name, tensor in model_tensors(module).items()}
    given = {name for name in stored if name.startswith("model.")}
    problems = [
        f"{name[6:]} has shape {stored[name].shape}, not {tuple(tensor.shape)}"
        for name, tensor in wanted.items()
        if name in given and stored[name].shape != tuple(tensor.shape)
    ]
    if strict:
        problems += [f"{name[6:]} is missing" for name in wanted if name not in given]
        problems += [f"{name[6:]} is not part of the model" for name in sorted(given - set(wanted))]
    if problems:
        shown = "\n  ".join(problems[:20]) + ("\n  ..." if len(problems) > 20 else "")
        raise CheckpointError(f"the checkpoint does not fit the model; nothing was loaded:\n  {shown}")
    return {name: tensor for name, tensor in wanted.items() if name in given}


def restore(engine: Trains, state: State, *, scheduler: bool, optimizer: bool) -> None:
    """Take what is not a tensor. Within a step, training goes on there if the optimizer does.

    Raises:
        CheckpointError: it does not fit.
    """
    try:
        if optimizer:
            engine.loss_scaler.load_state_dict(state.loss_scale)
        if scheduler and engine.lr_scheduler is not None and state.scheduler is not None:
            engine.lr_scheduler.load_state_dict(decode(state.scheduler))
        if engine.training_dataloader is not None and state.dataloader is not None:
            engine.training_dataloader.load_state_dict(state.dataloader)
    except (KeyError, TypeError, ValueError, AttributeError, ZeroDivisionError) as error:
        raise CheckpointError(f"the state of scheduler, loader or loss scale does not fit: {error!r}") from None
    engine.global_steps, engine.skipped_steps = state.global_steps, state.skipped_steps
    engine.pending = state.pending if optimizer and engine.optimizer is not None else 0
    engine.micro_steps = state.micro_steps - (0 if engine.pending else state.micro_steps % engine.accumulation)
