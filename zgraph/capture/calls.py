"""Capture of one call of a function of a model's: its graph, and nothing is run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import nn

from zgraph.capture.frontend import Frontend, ParamInfo
from zgraph.errors import CaptureError
from zgraph.ir import Graph


@dataclass(frozen=True)
class Call:
    """A call as it was captured.

    Args:
        graph: a forward alone. Its parameters and buffers have the model's names, its inputs those of the arguments.
        constants: tensors that the code made while it was traced, by the targets of the graph's constants.
    """

    graph: Graph
    constants: Mapping[str, torch.Tensor]


def capture_call(
    function: Callable[..., Any], arguments: Mapping[str, torch.Tensor], model: nn.Module, name: str
) -> Call:
    """The graph of `function(*arguments.values())`, of these sizes alone, without gradients.

    Args:
        function: calls the model. It gives tensors, and may write to its arguments.
        arguments: tensors by name, no two in the same memory.
        model: whose parameters and buffers the function reads.
        name: of the graph.

    Raises:
        GraphBreakError, CaptureError: as `zgraph.compile` does at the first call.
    """
    caught: list[Call] = []

    def catch(graph: Graph, constants: Mapping[str, torch.Tensor], _hints: Mapping[str, int]) -> NoReturn:
        caught.append(Call(graph, dict(constants)))
        raise _Caught

    params = {id(p): ParamInfo(n) for n, p in model.named_parameters()}
    inputs = {id(tensor): key for key, tensor in arguments.items()}
    buffers = {id(b): n for n, b in model.named_buffers()}  # torch keeps the frontend, which must not keep the model
    front = Frontend(params, lambda: buffers, catch, name, inputs=inputs)
    try:
        with torch.no_grad():
            front.wrap(function, dynamic=False)(*arguments.values())
    except _Caught:
        return caught[0]
    raise CaptureError(f"{name} was run, but nothing was captured: it holds no tensor operation")


class _Caught(CaptureError):
    """Ends the compilation once the graph is there."""
