"""Loading a state dict into a sharded model: all of it is checked before any of it is taken."""

from __future__ import annotations

from collections.abc import MutableMapping
from difflib import get_close_matches
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor, Shard

from zgraph.errors import StateDictError
from zgraph.ir.layout import chunk_rows
from zgraph.runtime.shards import ShardStore


def check_state_dict(
    store: ShardStore, module: nn.Module, state: MutableMapping[str, Any], prefix: str, metadata: dict[str, Any],
    strict: bool, *_: Any,
) -> None:  # fmt: skip
    """A pre-hook of `load_state_dict`: refuses what does not fit, and shards whole tensors where shards are held.

    Raises:
        StateDictError: with every entry that is missing, unexpected or misshapen. Nothing was loaded.
    """
    wanted = {prefix + n: t for n, t in module.state_dict().items() if isinstance(t, torch.Tensor)}
    problems = [
        f"{name} has shape {tuple(state[name].shape)}, not {tuple(tensor.shape)}"
        for name, tensor in wanted.items()
        if isinstance(state.get(name), torch.Tensor) and state[name].shape != tensor.shape
    ]
    if strict:
        given = [n for n in state if n.startswith(prefix) and isinstance(state[n], torch.Tensor)]
        problems += [f"{name} is missing" + _near(name, given) for name in wanted if name not in state]
        problems += [f"{name} is not part of the model" for name in given if name not in wanted]
    if metadata.get("assign_to_params_buffers"):
        problems.append("assign=True would replace the shards; load with assign=False")
    if problems:
        shown = "\n  ".join(problems[:20]) + ("\n  ..." if len(problems) > 20 else "")
        raise StateDictError(f"the state dict does not fit; nothing was loaded. {len(problems)} problems:\n  {shown}")
    for name, tensor in wanted.items():
        if isinstance(tensor, DTensor) and isinstance(state.get(name), torch.Tensor):
            if not isinstance(state[name], DTensor):
                state[name] = _like(tensor, state[name], store)


def _like(held: DTensor, whole: torch.Tensor, store: ShardStore) -> DTensor:
    """A whole tensor placed as `held` is."""
    local = whole.to(held._local_tensor.device)
    if isinstance(held.placements[0], Shard):
        start = store.rank * chunk_rows(whole.shape[0], store.num_ranks)
        local = local[start : start + held._local_tensor.shape[0]]
    return DTensor.from_local(
        local, held.device_mesh, held.placements, run_check=False, shape=held.shape, stride=held.stride()
    )


def _near(name: str, given: list[str]) -> str:
    near = get_close_matches(name, given, 1)
    return f" (the state dict has {near[0]})" if near else ""
