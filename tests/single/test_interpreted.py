"""Runs of ops by torch's interpreter: the same ops on the same numbers, and the same memory."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import small
import zgraph
from tests.deep import deep
from zgraph.bridge.private_script import Script
from zgraph.compiler.compiled_model import compiled_model
from zgraph.errors import UnknownOpError
from zgraph.ir import Graph, Instruction, Program
from zgraph.runtime.interpreted import Interpreted
from zgraph.runtime.region import Region

from .trained import batch

aten = torch.ops.aten


class Mixed(nn.Module):
    """Normalised convolutions, a recurrence, sizes of several kinds, lists of tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.turns, self.out = nn.LSTM(8, 8, batch_first=True), nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = torch.relu(self.norm(self.conv(x))).flatten(2).transpose(1, 2)
        hidden, _ = self.turns(hidden)
        first, *rest = hidden.chunk(3, dim=1)
        picked = hidden[:, torch.tensor([0, 2]), :]
        top, _ = hidden.max(dim=1)
        whole = torch.cat([first.mean(1), *(r.std(1) for r in rest), picked.sum(1), top])
        return self.out(whole).logsumexp(-1).sum() + nn.functional.interpolate(x, scale_factor=2.0).square().mean()


class Sized(nn.Module):
    """Sizes that are computed with, and a number of rows that is made of two."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(8, 16), nn.LayerNorm(16), nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, tokens, _ = x.shape
        hidden = nn.functional.gelu(self.norm(self.first(x.reshape(batch * tokens, -1))))
        places = torch.arange(tokens, device=x.device).repeat(batch) / tokens
        return (self.last(hidden) * places[:, None]).view(batch, tokens, 4)[:, : tokens // 2].square().mean()


MODELS: dict[str, Callable[[], nn.Module]] = {
    "mixed": Mixed,
    "sized": Sized,
    "llama": small.llama,
    "gpt2": small.gpt2,
    "t5": small.t5,
    "vit": small.vit,
}
INPUTS = {"mixed": lambda: torch.randn(4, 3, 5, 5), "sized": lambda: torch.randn(3, 6, 8)}


@pytest.fixture
def op_by_op(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    def cut(self: Interpreted, program: Program, graph: Graph) -> Iterator[Instruction | Region]:
        yield from program.instructions

    return lambda: monkeypatch.setattr(Interpreted, "cut", cut)


def steps(model: nn.Module, given: Any, *, is_together: bool = False, **options: Any) -> list[torch.Tensor]:
    """Losses of three steps, and the parameters after them."""
    torch.manual_seed(1)
    torch._dynamo.reset()
    compiled = zgraph.compile(copy.deepcopy(model).train(), **options)
    optimizer = torch.optim.SGD(compiled.parameters(), lr=0.1)
    losses = []
    for _ in range(3):
        found = compiled(**given) if isinstance(given, dict) else compiled(given)
        loss = found if isinstance(found, torch.Tensor) else found.loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    regions = [
        part
        for plan in compiled_model(compiled).session.plans
        for program in (plan.forward, plan.backward)
        if program is not None
        for part in Interpreted(torch.device("cpu")).cut(program, plan.graph)
        if isinstance(part, Region)
    ]
    nodes = sum(len(plan.graph.nodes) for plan in compiled_model(compiled).session.plans)
    if is_together:
        assert sum(len(r.nodes) for r in regions) > 0.6 * nodes
    return [*losses, *(p.detach() for p in compiled.parameters())]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("mixed", {"stage": 3}),
        ("sized", {"stage": 0, "dynamic": True}),
        deep("gpt2", {"stage": 3}),
        deep("llama", {"stage": 3}),
        deep("t5", {"stage": 0, "dynamic": True}),
    ],
)
def test_a_step_is_the_same_step(name: str, options: dict[str, Any], op_by_op: Callable[[], None]) -> None:
    torch.manual_seed(0)
    model = MODELS[name]()
    given: Any = INPUTS[name]() if name in INPUTS else batch(name, 0)
    together = steps(model, given, is_together=True, **options)
    op_by_op()
    for ours, theirs in zip(together, steps(model, given, **options), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_what_is_freed_within_a_run_is_gone_before_its_end() -> None:
    """The memory of an argument that the caller lets go of is taken again by the first result after its last use."""
    script = Script(2, [])
    first, second = script.tensors
    (doubled,) = script.call(aten.mul.Tensor, [first, second], {}, 1)
    (places,) = script.call(aten.mul.Tensor, [doubled, second], {}, 1)
    run = script.function("region", [places])
    seen: list[int] = []

    class Watching(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(sum(1 for t in alive if t() is not None))
            return func(*args, **(kwargs or {}))

    args = [torch.ones(4), torch.full((4,), 2.0)]
    alive = [_storage_of(t) for t in args]
    with torch.no_grad(), Watching():
        (result,) = run(args)
    assert args == []
    assert seen == [2, 1]
    assert result.tolist() == [4.0] * 4


def _storage_of(tensor: torch.Tensor) -> Callable[[], object]:
    storage = tensor.untyped_storage()._weak_ref()
    return lambda: None if torch.UntypedStorage._expired(storage) else storage


def test_another_overload_is_refused() -> None:
    script = Script(1, [])
    with pytest.raises(UnknownOpError, match=r"aten::add.Tensor.* for aten.add.Scalar"):
        script.call(aten.add.Scalar, [script.tensors[0], script.tensors[0]], {}, 1)
    with pytest.raises(UnknownOpError, match="returns"):
        script.call(aten.sym_size.int, [script.tensors[0], 0], {}, 1)
    mixed = Script(1, ["float"])
    for sizes in ([mixed.numbers[0], 2], [mixed.numbers[0]]):
        with pytest.raises(UnknownOpError, match="is a list of int"):
            mixed.call(aten.view.default, [mixed.tensors[0], sizes], {}, 1)
    with pytest.raises(UnknownOpError, match="no constant for"):
        script.call(aten.add.Tensor, [script.tensors[0], object()], {}, 1)


class Stop(Exception):
    """Raised by a mode of the user's."""


class Stopping(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise Stop(str(func))


def test_an_error_of_an_op_is_the_ops_own() -> None:
    script = Script(2, [])
    run = script.function("region", script.call(aten.mm.default, script.tensors, {}, 1))
    with pytest.raises(RuntimeError, match=r"^mat1 and mat2 shapes cannot be multiplied \(2x3 and 2x3\)"):
        run([torch.ones(2, 3), torch.ones(2, 3)])
    given = [torch.ones(2, 3), torch.ones(3, 2)]
    with Stopping(), pytest.raises(Stop, match=r"^aten\.mm\.default$"):
        run(given)
    assert torch._C._get_graph_executor_optimize() is True


def test_runs_of_many_threads_leave_torchscript_as_it_was() -> None:
    script = Script(1, [])
    run = script.function("region", script.call(aten.neg.default, script.tensors, {}, 1))
    seen: list[bool] = []

    class Looking(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(torch._C._get_graph_executor_optimize())
            time.sleep(0.001)
            return func(*args, **(kwargs or {}))

    def negated(number: int) -> float:
        given = [torch.full((3,), float(number))]
        with Looking():
            (found,) = run(given)
        seen.append(not torch._C._get_graph_executor_optimize())
        return float(found[0])

    with ThreadPoolExecutor(4) as pool:
        assert [*pool.map(negated, range(100))] == [-n for n in range(100)]
    assert set(seen) == {False}
    theirs = torch.jit.trace(lambda a, b: a.view(2, 2) @ b, (torch.ones(4), torch.ones(2, 2)))
    with pytest.raises(RuntimeError, match="The following operation failed in the TorchScript interpreter"):
        theirs(torch.ones(5), torch.ones(2, 2))


class Numbers(nn.Module):
    """Numbers of several kinds beside tensors of several dtypes."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        places = torch.arange(x.shape[0], device=x.device)
        half = (x.bfloat16() * 0.1 + 1e-3) / 3
        scalar = (x.sum() * 0.3 + 1e-6).float()
        return (x * 1e-6 + 3) / 7 + half + scalar + (places * 3 + 1) * 0.5 + (x.double() * 0.1).float()


def test_numbers_beside_tensors_give_the_same_bits(op_by_op: Callable[[], None]) -> None:
    """Half precision computes with more digits of a number than it has itself."""
    x = torch.randn(257)
    wanted = Numbers()(x)
    torch._dynamo.reset()
    assert torch.equal(zgraph.compile(Numbers())(x), wanted)
    op_by_op()
    torch._dynamo.reset()
    assert torch.equal(zgraph.compile(Numbers())(x), wanted)


def test_a_list_is_made_once_and_each_call_has_its_own() -> None:
    """A call within a call, by a dispatch mode, has another list than the one that is being read."""
    script = Script(1, [])
    run = script.function("region", script.call(aten.neg.default, script.tensors, {}, 1))
    found: list[float] = []

    class Calling(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            with torch.utils._python_dispatch._disable_current_modes():
                (inner,) = run([torch.tensor([5.0])])
            found.append(float(inner))
            return func(*args, **(kwargs or {}))

    given = [torch.tensor([3.0])]
    with Calling():
        (made,) = run(given)
    assert (float(made), found, given) == (-3.0, [-5.0], [])
    (again,) = run([torch.tensor([4.0])])
    assert float(again) == -4.0
