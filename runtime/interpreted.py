"""Runs of ops that torch's interpreter executes in one call from Python, which saves the host time.

Each different run is built once, whatever layer it is in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch

from zgraph.bridge.aten import TO_TORCH, resolve, to_torch
from zgraph.bridge.private_script import Script, has_interpreter
from zgraph.errors import UnknownOpError
from zgraph.ir import (
    Arg,
    DType,
    ExternalOp,
    Graph,
    Instruction,
    Node,
    NoneType,
    Phase,
    Program,
    ScalarType,
    TensorType,
    Token,
    Value,
)
from zgraph.ir.external_ops import facts
from zgraph.runtime.folding import folded
from zgraph.runtime.region import Compute, Region, region_of

if TYPE_CHECKING:
    from zgraph.runtime.session import Session

MIN_OPS = 3
"""A call of a run costs as much as two ops: shorter ones are left as they are."""


MAX_EXACT = 1 << 24
"""The largest integer up to which float32 has all of them."""


class Interpreted:
    """The runs of one plan's programs.

    Args:
        device: of this rank.
    """

    is_shown = False

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._by_text: dict[tuple[str, bool], Compute] = {}
        self._takes: dict[object, bool] = {}
        self._foreign: dict[str, ExternalOp] = {}

    def cut(self, program: Program, graph: Graph) -> Iterator[Instruction | Region]:
        """The program's instructions in their order, with runs of one layer in the place of those that they hold."""
        self._foreign |= graph.foreign
        run = list[Instruction]()
        layer = ""
        for instruction in program.instructions:
            node = instruction.node
            takes = self._can_take(node, graph)
            if not takes or (node.origin.module and node.origin.layer != layer):
                yield from _ended(run)
            layer = node.origin.layer if node.origin.module else layer
            if takes:
                run.append(instruction)
            else:
                yield instruction
        yield from _ended(run)

    def runner(self, region: Region, _session: Session, _loose: Sequence[int]) -> Compute:
        """The function that runs a region, shared by all regions that compute the same."""
        key = (region.text, self._tracks_views(region))
        if key not in self._by_text:
            self._by_text[key] = self._built(folded(region, self._foreign))
        return self._by_text[key]

    def _tracks_views(self, region: Region) -> bool:
        """Whether autograd must know which results are views: what a forward gives may be written to, and is saved."""
        returned = {v.name for v in region.outputs}
        return any(
            node.phase is Phase.forward
            and self._foreign[node.op].views
            and any(r.name in returned for r in node.results)
            for node in region.nodes
            if node.op in self._foreign
        )

    def _can_take(self, node: Node, graph: Graph) -> bool:
        if node.op == "release":
            return True
        row = graph.foreign.get(node.op)
        is_ours = node.op in ("cast", "copy")
        if not is_ours and (row is None or not row.is_pure or not node.op.startswith("aten.")):
            return False
        if not all(isinstance(r.type, TensorType | NoneType) for r in node.results):
            return False
        key = (node.op, len(node.results), _kinds(node.args), tuple((k, _kinds(a)) for k, a in node.kwargs))
        if key not in self._takes:
            self._takes[key] = has_interpreter() and self._is_taken(node)
        return self._takes[key]

    def _is_taken(self, node: Node) -> bool:
        operands = tuple({v.name: v for v in node.operands}.values())
        try:
            self._built(Region((node,), operands, node.results, ()))
        except UnknownOpError:
            return False
        return True

    def _built(self, region: Region) -> Compute:
        tensors = [v for v in region.inputs if isinstance(v.type, TensorType)]
        numbers = [v for v in region.inputs if isinstance(v.type, ScalarType)]
        kinds = [v.type.kind for v in numbers if isinstance(v.type, ScalarType)]
        script = Script(len(tensors), kinds)
        values: dict[str, Any] = {v.name: None for v in region.inputs}
        values |= dict(zip((v.name for v in tensors), script.tensors, strict=True))
        values |= dict(zip((v.name for v in numbers), script.numbers, strict=True))

        def of(value: Value) -> Any:
            return values[value.name]

        for node in region.nodes:
            op, args, kwargs = self._call(node, of)
            made = script.call(op, args, kwargs, len(node.results))
            values.update(
                (r.name, None if isinstance(r.type, NoneType) else m) for r, m in zip(node.results, made, strict=True)
            )
        results = [values[v.name] for v in region.outputs]
        run = script.function("region", results, tracks_views=self._tracks_views(region))
        names = [v.name for v in region.inputs]
        at, others = [names.index(v.name) for v in tensors], [names.index(v.name) for v in numbers]
        if len(at) == len(names):
            return run

        def compute(args: list[Any]) -> Sequence[Any]:
            numbers = [args[i] for i in others]
            args[:] = [args[i] for i in at]
            return run(args, *numbers)

        return compute

    def _call(self, node: Node, of: Callable[[Value], Any]) -> tuple[Any, list[Any], dict[str, Any]]:
        """The overload that a node calls, and what it is given."""
        dense = torch.contiguous_format
        if node.op == "copy":
            return torch.ops.aten.clone.default, [of(node.operands[0])], {"memory_format": dense}
        if node.op == "cast":
            dtype = to_torch(node.option("dtype"), self.device, of)
            return torch.ops.aten.to.dtype, [of(node.operands[0]), dtype], {"memory_format": dense}
        args = [to_torch(a, self.device, of) for a in node.args]
        op = facts(node.op).by_tensor
        if op is not None and len(args) > 1 and (number := _as_tensor(node)) is not None:
            args[1] = number
        else:
            op = node.op
        return resolve(op), args, {k: to_torch(a, self.device, of) for k, a in node.kwargs}


def _as_tensor(node: Node) -> torch.Tensor | None:
    """The number that a node computes with as a tensor, which saves making one in each call; None where the result
    might be another.

    torch computes with the number in the dtype of what it meets: in half precision with more of its digits.
    """
    first, number, made = node.args[0], node.args[1], node.results[0].type
    if not isinstance(first, Value) or not isinstance(first.type, TensorType) or not isinstance(made, TensorType):
        return None
    if first.type.dtype is not made.dtype or isinstance(number, bool):
        return None
    is_exact = isinstance(number, int) and abs(number) <= MAX_EXACT
    if made.dtype in (DType.f32, DType.f64) and (is_exact or isinstance(number, float)):
        return torch.tensor(number, dtype=TO_TORCH[made.dtype])
    return torch.tensor(number) if made.dtype is DType.i64 and isinstance(number, int) else None


def _kinds(arg: Arg) -> object:
    """Kinds of an argument, on which it depends whether the interpreter takes a call."""
    if isinstance(arg, Value):
        return arg.type.kind if isinstance(arg.type, ScalarType) else type(arg.type)
    if isinstance(arg, tuple):
        return tuple(dict.fromkeys(_kinds(a) for a in arg)), bool(arg)
    return arg.kind if isinstance(arg, Token) else type(arg)


def _ended(run: list[Instruction]) -> Iterator[Instruction | Region]:
    """A run as a region, if it is worth one; the list is empty then."""
    region = region_of(run)
    yield from [region] if len(region.nodes) >= MIN_OPS and region.outputs else run
    run.clear()
