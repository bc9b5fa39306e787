"""Views folded within a run of ops: the same numbers in the same places, whatever strides the operands have."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from tests.deep import DEEP
from zgraph.bridge.aten import effects, resolve
from zgraph.ir import DType, ExternalOp, Instruction, Node, TensorType, Value
from zgraph.ir.layout import dense_strides
from zgraph.runtime.folding import folded
from zgraph.runtime.region import Region, region_of
from zgraph.runtime.regions import Steps

CPU = torch.device("cpu")


def kind(tensor: torch.Tensor) -> TensorType:
    size, stride = tuple(tensor.shape), tuple(tensor.stride())
    return TensorType(DType.f32, size, None if stride == dense_strides(size) else stride)


class Chain:
    """A run of ops in the making, and what each of them gives for one input."""

    def __init__(self, first: torch.Tensor) -> None:
        self.made = [first]
        self.values = [Value("x", kind(first))]
        self.nodes: list[Node] = []

    def call(self, op: str, at: int, *args: Any) -> int:
        """Position of the result of an op on the value at a position."""
        made = resolve(op)(self.made[at], *args)
        self.made.append(made)
        self.values.append(Value(f"v{len(self.values)}", kind(made)))
        given = tuple(tuple(a) if isinstance(a, list) else a for a in args)
        self.nodes.append(Node(op, (self.values[at], *given), (self.values[-1],)))
        return len(self.made) - 1

    def region(self, *returned: int) -> Region:
        """The run as a region, which returns these values."""
        names = {self.values[i].name for i in returned}
        frees = tuple(v.name for v in self.values[1:] if v.name not in names)
        return region_of([*(Instruction(n, ()) for n in self.nodes[:-1]), Instruction(self.nodes[-1], frees)])

    def folded(self, *returned: int) -> Region:
        return folded(self.region(*returned), foreign(self.nodes))


def foreign(nodes: list[Node]) -> dict[str, ExternalOp]:
    return {n.op: effects(resolve(n.op), n.op, n.args, {}, multi=False) for n in nodes}


def ops(region: Region) -> list[str]:
    return [n.op.split(".")[1] for n in region.nodes]


def test_a_transpose_of_a_transpose_is_what_it_was() -> None:
    chain = Chain(torch.randn(3, 4))
    once = chain.call("aten.t.default", 0)
    twice = chain.call("aten.t.default", once)
    out = chain.call("aten.neg.default", twice)
    assert ops(chain.folded(out)) == ["neg"]
    assert ops(chain.folded(out, once)) == ["t", "neg"]
    assert ops(chain.folded(out, twice)) == ["t", "t", "neg"]


def test_dims_that_differ_are_not_undone() -> None:
    chain = Chain(torch.randn(2, 2, 2))
    once = chain.call("aten.transpose.int", 0, 0, 1)
    out = chain.call("aten.neg.default", chain.call("aten.transpose.int", once, 1, 2))
    assert ops(chain.folded(out)) == ["transpose", "transpose", "neg"]


def test_a_view_of_a_view_is_one_and_made_once() -> None:
    chain = Chain(torch.randn(2, 3, 4))
    first, second = (chain.call("aten.view.default", 0, [6, 4]) for _ in range(2))
    third = chain.call("aten.view.default", chain.call("aten.unsqueeze.default", second, 0), [4, 6])
    whole = chain.call("aten.view.default", chain.call("aten.view.default", third, [24]), [2, 3, 4])
    outs = [chain.call("aten.neg.default", i) for i in (first, second, third, whole)]
    region = chain.folded(*outs)
    assert ops(region) == ["view", "view", "neg", "neg", "neg", "neg"]
    assert region.nodes[-1].operands[0].name == "x"


def test_the_first_power_and_a_product_with_one_are_the_value() -> None:
    chain = Chain(torch.randn(3))
    one = chain.call("aten.mul.Scalar", chain.call("aten.pow.Tensor_Scalar", 0, 1.0), 1)
    two = chain.call("aten.pow.Tensor_Scalar", one, 2)
    assert ops(chain.folded(two)) == ["pow"]
    assert ops(chain.folded(two, one)) == ["mul", "pow"]


SHAPES = [(4, 6), (2, 3, 4), (1, 4, 3, 2), (6, 1, 4), (5,)]


def drawn(number: int) -> tuple[Chain, list[int]]:
    """A chain of views and products on strides of any order, and what it returns."""
    draw = random.Random(number)
    size = draw.choice(SHAPES)
    order = draw.sample(range(len(size)), len(size))
    first = torch.randn([size[i] for i in order]).permute([order.index(i) for i in range(len(size))])
    chain = Chain(first)
    for _ in range(draw.randint(2, 14)):
        at = draw.randrange(max(0, len(chain.made) - 3), len(chain.made))
        given = chain.made[at]
        dims = [draw.randrange(given.dim()) for _ in range(2)] if given.dim() else [0, 0]
        calls: list[tuple[Any, ...]] = [
            ("aten.transpose.int", *dims),
            ("aten.slice.Tensor", dims[0], draw.choice([0, 0, 1]), 2**62),
            ("aten.unsqueeze.default", dims[0]),
            ("aten.squeeze.dim", dims[0]),
            ("aten.expand.default", [*given.shape]),
            ("aten.detach.default",),
            ("aten.mul.Scalar", draw.choice([1, 1.0, 2.0])),
            ("aten.pow.Tensor_Scalar", draw.choice([1, 2])),
            ("aten._unsafe_view.default", [-1]),
            ("aten.view.default", [*given.shape]),
            ("aten.view.default", [given.numel()]),
            ("aten.view.default", draw.choice([[-1, 1], [1, -1], [-1, *given.shape[1:]]])),
            *([("aten.t.default",)] * 3 if given.dim() == 2 else []),
        ]
        try:
            op, *args = draw.choice(calls)
            chain.call(op, at, *args)
        except (RuntimeError, IndexError):
            continue
    chain.call("aten.neg.default", len(chain.made) - 1)
    returned = draw.sample(range(1, len(chain.made)), min(2, len(chain.made) - 1))
    return chain, sorted({*returned, len(chain.made) - 1})


@pytest.mark.parametrize("number", range(2000 if DEEP else 300))
def test_chains_give_the_same(number: int) -> None:
    chain, returned = drawn(number)
    region = chain.folded(*returned)
    assert len(region.nodes) <= len(chain.nodes)
    made = Steps(region, CPU, {})([chain.made[0]] if region.inputs else [])
    for name, found in zip((v.name for v in region.outputs), made, strict=True):
        wanted = chain.made[[v.name for v in chain.values].index(name)]
        assert torch.equal(found, wanted)
        assert found.shape == wanted.shape
