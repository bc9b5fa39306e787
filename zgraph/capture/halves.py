"""The two halves of a program as AOTAutograd takes them: opaque modules, and runners under its calling convention."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx, nn

from zgraph.bridge import private_compile
from zgraph.bridge.aten import TO_TORCH
from zgraph.ir import Plan, TensorType, Value

Runner = Callable[[list[Any]], Sequence[Any]]
"""Takes its arguments in a list that it empties as it goes, and returns its results."""


class SavedNodes:
    """The saved values as AOTAutograd wants to see them: tensors apart from scalars, each with a fake value."""

    def __init__(self, joint: fx.GraphModule, plan: Plan) -> None:
        self.metas = {n.name: n.meta for n in joint.graph.nodes}
        self.producers = plan.graph.producers
        self.mode = private_compile.fake_mode_of(joint)
        device = next(
            (v.device for n in joint.graph.nodes if isinstance(v := n.meta.get("val"), torch.Tensor)),
            torch.device("cpu"),
        )
        self.device = device
        self.tensors = [self._entry(v) for v in plan.saved if isinstance(v.type, TensorType)]
        self.scalars = [self._entry(v) for v in plan.saved if not isinstance(v.type, TensorType)]

    def _entry(self, value: Value) -> tuple[str, dict[str, Any]]:
        if value.name in self.metas and "val" in self.metas[value.name]:
            return value.name, self.metas[value.name]
        kind = value.tensor
        if kind.is_on_host and (source := self._offloaded(value)) is not None:
            with self.mode:
                return value.name, {"val": source.to("cpu")}
        with self.mode:
            fake = torch.empty([int(d) for d in kind.shape], dtype=TO_TORCH[kind.dtype], device=self.device)
        return value.name, {"val": fake}

    def _offloaded(self, value: Value) -> Any:
        """The fake tensor of the device that a value of the host is a copy of."""
        node = self.producers.get(value.name)
        while node is not None and node.op in ("wait", "offload_start"):
            name = node.operands[0].name
            if "val" in self.metas.get(name, {}):
                return self.metas[name]["val"]
            node = self.producers.get(name)
        return None


def backward_runner(run: Runner, num_tensors: int, num_scalars: int) -> Runner:
    """AOTAutograd hands over scalars, then tensors, then tangents; the plan has tensors, then scalars, first."""

    def zgraph_backward(args: list[Any]) -> Sequence[Any]:
        args[: num_scalars + num_tensors] = (
            *args[num_scalars : num_scalars + num_tensors],
            *args[:num_scalars],
        )
        return run(args)

    return zgraph_backward


def opaque(
    run: Runner, name: str, inputs: Sequence[tuple[str, dict[str, Any]]], outputs: Sequence[Any], descs: Any
) -> fx.GraphModule:
    """A module with these placeholders and outputs, whose body is one call of `run`."""

    def body(*args: Any) -> Sequence[Any]:
        return run(list(args))

    body.__name__ = name
    body.zgraph_runner = run  # type: ignore[attr-defined]
    graph = fx.Graph()
    placeholders = []
    for label, meta in inputs:
        node = graph.placeholder(label)
        node.meta = dict(meta)
        placeholders.append(node)
    call = graph.call_function(body, tuple(placeholders))
    results: list[Any] = []
    for index, meta in enumerate(outputs):
        if meta is None:
            results.append(None)
            continue
        item = graph.call_function(operator.getitem, (call, index))
        item.meta = dict(meta)
        results.append(item)
    output = graph.output(tuple(results))
    output.meta = {"desc": descs} if descs else {}
    return fx.GraphModule(nn.Module(), graph)


def meta_of(output: Any) -> dict[str, Any] | None:
    return output.meta if isinstance(output, fx.Node) else None


def boxed_runner(run: Any) -> Callable[..., Any]:
    """`run` under the calling convention by which AOTAutograd lets go of its references to the arguments."""
    target = getattr(run, "zgraph_runner", run)

    def boxed(args: list[Any]) -> Sequence[Any]:
        return target(args)  # type: ignore[no-any-return]

    boxed._boxed_call = True  # type: ignore[attr-defined]
    return boxed
