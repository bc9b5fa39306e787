"""The state of a sharded optimizer in a folder: one safetensors file a rank, and a JSON file with the options.

Every rank writes its own shards. On another number of ranks, or at another stage, each reads the rows that it needs
from whichever files have them. Nothing is unpickled.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from zgraph.errors import StateDictError
from zgraph.ir.layout import chunk_rows
from zgraph.runtime import torch_private

OPTIONS = "optimizer.json"


def save_state(folder: Path, model: nn.Module, optimizer: Optimizer) -> None:
    """Write the optimizer's state; all ranks call it, and have written when it returns.

    Args:
        folder: one that all hosts see.
        model: whose parameters the optimizer has.
        optimizer: any of torch's or zgraph's.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rank, num_ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    names = {id(p): n for n, p in model.named_parameters()}
    tensors, starts = {}, {}
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            local, start = _part(torch.as_tensor(value))
            if _writes(value, rank) and (local.numel() or not local.dim()):
                entry = f"{key}/{names[id(parameter)]}"
                tensors[entry], starts[entry] = local.contiguous(), start
    save_file(tensors, folder / _file(rank, num_ranks), {"starts": json.dumps(starts)})
    _barrier()
    if rank == 0:
        groups = [{**g, "params": [names[id(p)] for p in g["params"]]} for g in optimizer.param_groups]
        (folder / OPTIONS).write_text(json.dumps({"num_files": num_ranks, "groups": groups}, default=float))
    _barrier()


def load_state(folder: Path, model: nn.Module, optimizer: Optimizer) -> None:
    """Read what `save_state` wrote into an optimizer of the same model, however it is sharded now.

    Raises:
        StateDictError: the folder is not complete, or of another model; nothing was loaded.
    """
    options = _options(folder)
    names = {id(p): n for n, p in model.named_parameters()}
    held = optimizer.state_dict()
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    indices = [i for group in held["param_groups"] for i in group["params"]]
    with contextlib.ExitStack() as stack:
        saved = _Saved.opened(folder, options["num_files"], stack)
        state = {
            i: found
            for i, p in zip(indices, parameters, strict=True)
            if (found := {key: saved.tensor(entry, p) for key, entry in saved.entries(names[id(p)])})
        }
    by_name = {name: group for group in options["groups"] for name in group["params"]}
    if missing := sorted({names[id(p)] for p in parameters} - by_name.keys()):
        raise StateDictError(f"{folder} has no state of {', '.join(missing[:5])}: it is of another model")
    groups = []
    for now, group in zip(held["param_groups"], optimizer.param_groups, strict=True):
        before = by_name[names[id(group["params"][0])]] if group["params"] else {}
        groups.append({key: _like(before.get(key, value), value) for key, value in now.items() if key != "params"})
        groups[-1] |= {"initial_lr": before["initial_lr"]} if "initial_lr" in before else {}
        groups[-1]["params"] = now["params"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})


# --- files ---------------------------------------------------------------------------------------------------------


@dataclass
class _Saved:
    """Where the files of a folder have which rows of which entry."""

    pieces: dict[str, list[tuple[int, Any]]] = field(default_factory=dict)

    @classmethod
    def opened(cls, folder: Path, num_files: int, stack: contextlib.ExitStack) -> _Saved:
        saved = cls()
        for rank in range(num_files):
            path = folder / _file(rank, num_files)
            try:
                file = stack.enter_context(safe_open(path, "pt"))
                starts = json.loads(file.metadata()["starts"])
            except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
                raise StateDictError(
                    f"{path} cannot be read ({error}); nothing was loaded. Save to a folder that all hosts see"
                ) from None
            for entry in file.keys():  # noqa: SIM118 - it is no mapping
                saved.pieces.setdefault(entry, []).append((starts[entry], file))
        return saved

    def entries(self, name: str) -> Iterator[tuple[str, str]]:
        """The states of a parameter: key and entry."""
        for entry in self.pieces:
            key, _, of = entry.partition("/")
            if of == name:
                yield key, entry

    def tensor(self, entry: str, parameter: torch.Tensor) -> torch.Tensor:
        """An entry, sharded as the parameter is if it is as large."""
        pieces = [(start, file, file.get_slice(entry)) for start, file in self.pieces[entry]]
        shape = pieces[0][2].get_shape()
        if not shape:
            value: torch.Tensor = pieces[0][1].get_tensor(entry)
            return value
        num_rows = max(start + piece.get_shape()[0] for start, _, piece in pieces)
        if (num_rows, *shape[1:]) != tuple(parameter.shape):
            raise StateDictError(
                f"{entry} is {(num_rows, *shape[1:])}, the parameter {tuple(parameter.shape)}; nothing was loaded"
            )
        local, first = _part(parameter)
        last = first + local.shape[0]
        rows = [
            piece[max(first - start, 0) : last - start]
            for start, _, piece in sorted(pieces, key=lambda p: p[0])
            if start < last and start + piece.get_shape()[0] > first
        ]
        whole = torch.cat(rows) if rows else torch.empty(local.shape)
        if whole.shape != local.shape:
            raise StateDictError(f"{entry} is not complete; nothing was loaded. Save it again")
        whole = whole.to(local.device)
        return torch_private.dtensor_like(whole, parameter) if isinstance(parameter, DTensor) else whole


def _options(folder: Path) -> Mapping[str, Any]:
    try:
        found: Mapping[str, Any] = json.loads((folder / OPTIONS).read_text())
    except (OSError, ValueError) as error:
        raise StateDictError(
            f"{folder} holds no complete state of an optimizer ({error}); resume from an earlier checkpoint"
        ) from None
    return found


def _file(rank: int, num_ranks: int) -> str:
    return f"optimizer-{rank:05}-of-{num_ranks:05}.safetensors"


# --- shards --------------------------------------------------------------------------------------------------------


def _part(tensor: torch.Tensor) -> tuple[torch.Tensor, int]:
    """What this rank has of a tensor, and its first row."""
    if not isinstance(tensor, DTensor):
        return tensor.detach(), 0
    local, mesh = tensor.to_local().detach(), tensor.device_mesh
    if not tensor.placements[-1].is_shard():
        return local, 0
    rows = chunk_rows(tensor.shape[0], mesh.size(-1))
    return local, min(rows * mesh.get_local_rank(mesh.ndim - 1), tensor.shape[0])


def _writes(value: Any, rank: int) -> bool:
    """Whether this rank is the one that writes what it has: others may have the same."""
    if not isinstance(value, DTensor):
        return rank == 0
    coordinate = value.device_mesh.get_coordinate()
    assert coordinate is not None
    return all(at == 0 for at, place in zip(coordinate, value.placements, strict=True) if not place.is_shard())


def _like(value: Any, now: Any) -> Any:
    return tuple(value) if isinstance(now, tuple) else value


def _barrier() -> None:
    if dist.is_initialized():
        dist.barrier()
