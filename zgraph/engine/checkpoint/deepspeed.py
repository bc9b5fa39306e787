"""Checkpoints that DeepSpeed has written at ZeRO stage 1, 2 or 3, read without running anything that is in them.

The files are pickles. torch's restricted loader reads them; classes of DeepSpeed's in them become objects that only
hold what they were given. Stages 1 and 2 keep of each group of parameters one vector, cut into as many parts as there
were ranks; stage 3 cuts each parameter, and keeps the parts of a rank behind one another.
"""

from __future__ import annotations

import math
import pickle
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from zgraph.engine.checkpoint.index import Entry
from zgraph.engine.checkpoint.optimizer_state import Group, OptimizerLoad, OptimizerState
from zgraph.engine.checkpoint.state import State, model_targets, restore
from zgraph.engine.checkpoint.tensors import fill, model_tensors
from zgraph.errors import CheckpointError

if TYPE_CHECKING:
    from zgraph.engine.protocol import Trains

_MODEL = re.compile(r"(?:zero_pp_rank_(\d+)_)?mp_rank_(\d+)_model_states\.pt")
_OPTIMIZER = re.compile(r"(?:bf16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt")

_OWN = frozenset(
    {
        "module",
        "buffer_names",
        "optimizer",
        "param_shapes",
        "frozen_param_shapes",
        "shared_params",
        "frozen_param_fragments",
        "lr_scheduler",
        "data_sampler",
        "random_ltd",
        "sparse_tensor_module_names",
        "skipped_steps",
        "global_steps",
        "global_samples",
        "dp_world_size",
        "mp_world_size",
        "checkpoint_parallel_dimensions",
        "ds_config",
        "ds_version",
        "universal_checkpoint_info",
    }
)
"""Keys of the model's file that are DeepSpeed's; the others are client_state."""

MASTER = "master"


class StandIn:
    """An object of a class of DeepSpeed's, in place of it: it has the attributes, and does nothing."""

    def __init__(self, *args: Any) -> None:
        self.args = args


_STAND_INS = (
    "deepspeed.runtime.zero.config.ZeroStageEnum",
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
    "deepspeed.utils.tensor_fragment.fragment_address",
)


def is_deepspeed(folder: Path) -> bool:
    """Whether DeepSpeed has written it."""
    return any(_MODEL.fullmatch(path.name) for path in folder.glob("*.pt"))


def load_deepspeed(
    engine: Trains, folder: Path, *, strict: bool, optimizer: bool, scheduler: bool, module_only: bool
) -> dict[str, Any]:
    """Take parameters, optimizer, schedule and counts from a checkpoint of DeepSpeed's; its client_state is returned.

    Raises:
        CheckpointError: it is damaged, holds what cannot be read safely, or does not fit.
    """
    try:
        found = _read(folder)
        stored = {f"model.{name}": _stored(tuple(shape)) for name, shape in found.shapes(engine).items()}
        targets = model_targets(engine.module, stored, strict=strict)
        load = None
        if optimizer and engine.optimizer is not None:
            load = OptimizerLoad(engine.optimizer, engine.module, found.optimizer_shapes(engine))
        state = found.state(engine)
        for name, target in targets.items():
            fill(target, found.value(MASTER, name.removeprefix("model.")))
        if load is not None:
            for full, target in load.targets.items():
                _, key, name = full.split(".", 2)
                fill(target, found.value(key, name))
            load.finish(OptimizerState(groups=found.groups(engine)))
        if not module_only:
            restore(engine, state, scheduler=scheduler, optimizer=optimizer)
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{folder} is damaged, or not as DeepSpeed 0.19 writes it: {error!r}") from None
    return found.client_state(engine.ranks.rank)


@dataclass
class Vector:
    """A vector in parts that follow one another."""

    parts: Sequence[torch.Tensor]

    def take(self, start: int, numel: int) -> torch.Tensor:
        """A stretch of it."""
        found, begin = [], 0
        for part in self.parts:
            first, last = max(start - begin, 0), min(start + numel - begin, part.numel())
            if first < last:
                found.append(part[first:last])
            begin += part.numel()
        taken = torch.cat(found) if found else torch.empty(0)
        if taken.numel() != numel:
            raise ValueError(f"a vector has {begin} numbers, and {start + numel} are needed")
        return taken


@dataclass
class Files:
    """Contents of the files of all ranks.

    Args:
        models: of each model's file; one for stages 1 and 2.
        optimizers: of each rank's file for the optimizer.
    """

    models: list[dict[str, Any]]
    optimizers: list[dict[str, Any]]

    @property
    def is_cut_by_parameter(self) -> bool:
        """Whether this is stage 3."""
        return "fp32_flat_groups" in self.optimizers[0]

    @property
    def base(self) -> list[dict[str, Any]]:
        """The state dict of each rank's own optimizer; of an elastic checkpoint without the groups' options."""
        key = "optimizer_state_dict" if self.is_cut_by_parameter else "base_optimizer_state"
        held = [optimizer[key] for optimizer in self.optimizers]
        return [{"state": dict(enumerate(h)), "param_groups": []} if isinstance(h, list) else h for h in held]

    # --- where parameters lie ----------------------------------------------------------------------------------------

    def places(self) -> Iterator[tuple[str, int, int, torch.Size]]:
        """Each trained parameter: its name, its group, where it begins there, and its shape."""
        start = 0
        for number, group in enumerate(self.models[0]["param_shapes"]):
            start = start if self.is_cut_by_parameter else 0
            for name, shape in group.items():
                yield name, number, start, shape
                numel = math.prod(shape)
                start += -(-numel // len(self.optimizers)) if self.is_cut_by_parameter else numel

    def value(self, key: str, name: str) -> torch.Tensor:
        """All of a parameter, a buffer, or a state of the optimizer."""
        name = self._first_name(name)
        for found, group, start, shape in self.places():
            if found == name:
                return self._scalar(key, group) if key == "step" else self._joined(key, group, start, shape)
        frozen = self.models[0].get("frozen_param_fragments") or {}
        if name in frozen:
            shape = self.models[0]["frozen_param_shapes"][name]
            if not self.is_cut_by_parameter:
                return frozen[name].view(shape)  # type: ignore[no-any-return]
            parts = [model["frozen_param_fragments"][name].flatten() for model in self.models]
            return torch.cat(parts)[: math.prod(shape)].view(shape)
        return self.models[0]["module"][name]  # type: ignore[no-any-return]

    def _joined(self, key: str, group: int, start: int, shape: torch.Size) -> torch.Tensor:
        numel = math.prod(shape)
        if not self.is_cut_by_parameter:
            return Vector([self._vector(key, rank, group) for rank in self._ranks]).take(start, numel).view(shape)
        size = -(-numel // len(self.optimizers))
        parts = [Vector(self._vectors(key, rank)).take(start, size) for rank in self._ranks]
        return torch.cat(parts)[:numel].view(shape)

    @property
    def _ranks(self) -> range:
        return range(len(self.optimizers))

    def _vector(self, key: str, rank: int, group: int) -> torch.Tensor:
        if key == MASTER:
            masters = "fp32_flat_groups" if self.is_cut_by_parameter else "single_partition_of_fp32_groups"
            return self.optimizers[rank][masters][group].flatten()  # type: ignore[no-any-return]
        return self.base[rank]["state"][group][key].flatten()  # type: ignore[no-any-return]

    def _vectors(self, key: str, rank: int) -> list[torch.Tensor]:
        return [self._vector(key, rank, group) for group in range(len(self.optimizers[rank]["fp32_flat_groups"]))]

    def _scalar(self, key: str, group: int) -> torch.Tensor:
        states, groups = self.base[0]["state"], self.base[0]["param_groups"]
        held = states.get(group, states[min(states)]).get(key)
        return torch.as_tensor(float(held if held is not None else groups[min(group, len(groups) - 1)][key]))

    def _first_name(self, name: str) -> str:
        """A parameter that has several names lies under one of them."""
        shared = self.models[0].get("shared_params") or {}
        known = {found for found, *_ in self.places()}
        if name in known:
            return name
        return next((n for pair in shared.items() if name in pair for n in pair if n in known), name)

    # --- what there is -----------------------------------------------------------------------------------------------

    def shapes(self, engine: Trains) -> dict[str, Sequence[int]]:
        """The shape of each tensor of the model, under the engine's names."""
        model = self.models[0]
        found: dict[str, Sequence[int]] = {name: shape for name, _, _, shape in self.places()}
        found |= model.get("frozen_param_shapes") or {}
        found |= {name: model["module"][name].shape for name in model["buffer_names"]}
        if not self.is_cut_by_parameter:  # stage 1 has frozen parameters here alone
            others = model["module"].keys() - found.keys() - (model.get("shared_params") or {}).keys()
            found |= {name: model["module"][name].shape for name in others}
        for name in model_tensors(engine.module):
            first = self._first_name(name)
            if name not in found and first in found:
                found[name] = found.pop(first)
        return found

    def optimizer_shapes(self, engine: Trains) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Dtype and shape of each state of each parameter."""
        states: Mapping[int, Mapping[str, Any]] = self.base[0]["state"]
        places = {name: (group, shape) for name, group, _, shape in self.places()}
        found: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
        for name in model_tensors(engine.module):
            group, shape = places.get(self._first_name(name), (None, ()))
            if group is None or group not in states:
                continue
            for key, held in states[group].items():
                if isinstance(held, torch.Tensor) and held.dim():
                    found[f"optimizer.{key}.{name}"] = held.dtype, tuple(shape)
            found[f"optimizer.step.{name}"] = torch.float32, ()
        return found

    def groups(self, engine: Trains) -> tuple[Group, ...]:
        """The groups of the optimizer with their options, where it can be told which parameters are in which."""
        options = [{k: v for k, v in group.items() if k != "params"} for group in self.base[0]["param_groups"]]
        members = [tuple(group) for group in self.models[0]["param_shapes"]]
        if len(options) == 1:
            members = [tuple(name for group in members for name in group)]
        if len(options) != len(members):
            return ()
        firsts = {self._first_name(name): name for name in model_tensors(engine.module)}
        return tuple(
            Group(names=tuple(firsts.get(name, name) for name in names), options=some)
            for names, some in zip(members, options, strict=True)
        )

    def state(self, engine: Trains) -> State:
        """Counts, schedule and loss scale."""
        model, scaler = self.models[0], self.optimizers[0].get("loss_scaler")
        own = engine.loss_scaler.state_dict()
        return State(
            world_size=len(self.optimizers),
            global_steps=model["global_steps"],
            skipped_steps=model["skipped_steps"],
            micro_steps=model["global_steps"] * engine.accumulation,
            scheduler=model.get("lr_scheduler"),
            loss_scale={
                "scale": getattr(scaler, "cur_scale", own["scale"]),
                "step": getattr(scaler, "cur_iter", own["step"]),
                "patience": getattr(scaler, "cur_hysteresis", own["patience"]),
                "last_overflow": getattr(scaler, "last_overflow_iter", own["last_overflow"]),
            },
        )

    def client_state(self, rank: int) -> dict[str, Any]:
        """The user's client state: of this rank, if it saved one at stage 3, else of the first rank."""
        model = self.models[rank if rank < len(self.models) else 0]
        return {key: value for key, value in model.items() if key not in _OWN}


def _read(folder: Path) -> Files:
    if (folder / "zero").is_dir():
        raise CheckpointError(
            f"{folder} is a universal checkpoint: load the one that it was made of, which any number of ranks can do"
        )
    models, optimizers = _by_rank(folder, _MODEL), _by_rank(folder, _OPTIMIZER)
    files = Files([_load(path) for path in models], [_load(path)["optimizer_state_dict"] for path in optimizers])
    if files.models[0]["mp_world_size"] != 1:
        raise CheckpointError(f"{folder} has parts of tensors (model parallelism): zgraph reads ZeRO alone")
    if not optimizers and files.models[0]["optimizer"] is not None:
        raise CheckpointError(
            f"{folder} was saved at stage 0, and zgraph reads what DeepSpeed saves at stage 1, 2 or 3; its weights are "
            f"under `module` in the model's file: load them into the model before initialize_engine"
        )
    expected = files.models[0]["dp_world_size"]
    num_models = expected if optimizers and files.is_cut_by_parameter else 1
    if len(optimizers) != expected or len(models) != num_models:
        raise CheckpointError(
            f"{folder} has {len(models)} files of the model and {len(optimizers)} of the optimizer, and was written by "
            f"{expected} ranks of a ZeRO stage: copy all of them"
        )
    return files


def _by_rank(folder: Path, pattern: re.Pattern[str]) -> list[Path]:
    found = [(int(match[1] or 0), path) for path in folder.iterdir() if (match := pattern.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


def _load(path: Path) -> Any:
    """The contents of a file, read by torch's restricted loader.

    Raises:
        CheckpointError: it is damaged, or has an object of another class.
    """
    try:
        with torch.serialization.safe_globals([(StandIn, name) for name in _STAND_INS]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL (\S+)", str(error))
        what = f"an object of {named[1]}" if named else "what is not data"
        raise CheckpointError(
            f"{path} holds {what}, which is not read, since that could run code; save it with DeepSpeed again without "
            f"it (client_state is where such objects come from)"
        ) from None
    except (OSError, RuntimeError, EOFError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} cannot be read, or is damaged: {error}") from None


def _stored(shape: tuple[int, ...]) -> Entry:
    return Entry(dtype="float32", shape=shape, layout=0)
