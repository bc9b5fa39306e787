"""Capture under fake tensors: the graph of a model of any size, on a machine without room for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any, NoReturn

import torch
from torch import nn
from torch.utils import _pytree as pytree

from zgraph.bridge.aten import FROM_TORCH, compute_dtype
from zgraph.bridge.dtypes import Dtype, as_dtype_or_none
from zgraph.bridge.private_fake import FakeTensorMode
from zgraph.bridge.private_gpu import Capability, as_on_gpu, flex_attention_on_gpu
from zgraph.capture.frontend import Frontend, ParamInfo
from zgraph.capture.gpu import on_gpu
from zgraph.capture.hooks import without_gradient_hooks
from zgraph.errors import CaptureError
from zgraph.ir import DType, Graph

Stage = Callable[[str], int | None]


def trace(
    model: nn.Module,
    *args: Any,
    param_dtype: Dtype | None = None,
    stage: Stage | None = None,
    dynamic: bool | None = None,
    capability: Capability | None = None,
    **kwargs: Any,
) -> Graph:
    """The graph of one training step of `model`, captured under fake tensors: no memory, no process group.

    Args:
        model: a module, on the meta device or any other; it is not changed.
        args, kwargs: what its forward is called with: shapes, dtypes, and whether a gradient is wanted matter.
        param_dtype: dtype to compute in, as in `zgraph.compile`.
        stage: a function from a parameter's name to the stage that its input is marked with, or None.
        dynamic: as in `torch.compile`.
        capability: a GPU's compute capability, such as (9, 0): the graph is the one that a model on it is captured as,
            with its attention and its dropout. None captures what a processor runs.

    Raises:
        DtypeError: the dtype is none.
        GraphBreakError, CaptureError: as `zgraph.compile` does at the first call.
    """
    caught: list[Graph] = []
    dtype = as_dtype_or_none(param_dtype, "param_dtype")

    def catch(graph: Graph, constants: Mapping[str, torch.Tensor], hints: Mapping[str, int]) -> NoReturn:
        caught.append(graph)
        raise _Caught

    rewrite = as_on_gpu(capability) if capability is not None else None
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.device("cpu"):
        infos: dict[int, ParamInfo] = {}
        homes: list[tuple[dict[str, Any], str, Any]] = []
        fakes: dict[int, torch.Tensor] = {}
        for prefix, module in model.named_modules():
            for tensors in (module._parameters, module._buffers):
                for key, tensor in tensors.items():
                    if tensor is None:
                        continue
                    name = f"{prefix}.{key}" if prefix else key
                    if id(tensor) not in fakes:
                        fakes[id(tensor)] = fake = _fake(tensor, dtype if tensors is module._parameters else None)
                        if isinstance(tensor, nn.Parameter):
                            infos[id(fake)] = ParamInfo(name, stage(name) if stage else None, _master(tensor, fake))
                    homes.append((tensors, key, tensor))
        inputs = pytree.tree_map_only(torch.Tensor, lambda t: _fake(t, dtype), (args, kwargs))
        try:
            for tensors, key, tensor in homes:
                tensors[key] = fakes[id(tensor)]

            def buffers() -> dict[int, str]:
                return {id(b): n for n, b in model.named_buffers()}

            front = Frontend(infos, buffers, catch, type(model).__name__, rewrite=rewrite)
            there = flex_attention_on_gpu() if capability is not None else nullcontext()
            with torch.enable_grad(), without_gradient_hooks(model), there:
                front.wrap(model.forward, dynamic)(*inputs[0], **inputs[1])
        except _Caught:
            pass
        finally:
            for tensors, key, tensor in homes:
                tensors[key] = tensor
    del mode
    if not caught:
        raise CaptureError("the forward was run, but nothing was captured: it holds no tensor operation")
    return on_gpu(caught[0]) if capability is not None else caught[0]


class _Caught(CaptureError):
    """Ends the compilation once the graph is there."""


def _fake(tensor: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    """A fake tensor on the CPU with the metadata of `tensor`."""
    fake = torch.empty_strided(tensor.size(), tensor.stride(), dtype=compute_dtype(tensor, dtype), device="cpu")
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(fake, tensor.requires_grad)
    return fake.requires_grad_(tensor.requires_grad)


def _master(tensor: torch.Tensor, fake: torch.Tensor) -> DType | None:
    return FROM_TORCH[tensor.dtype] if tensor.dtype != fake.dtype else None
