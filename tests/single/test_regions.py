"""Ops between collectives as regions, each different one compiled once."""

import copy
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from typing import Any

import pytest
import torch
from torch import nn

import small
import zgraph
from zgraph.bridge import private_inductor
from zgraph.bridge.private_inductor import Lowered
from zgraph.bridge.target import cost_table
from zgraph.compiler.compiled_model import compiled_model
from zgraph.errors import KernelError
from zgraph.ir import Axis, InputKind, Instruction, Plan
from zgraph.ir.ops import views
from zgraph.passes import RECIPES, Context, make_plan, parse_recipe
from zgraph.runtime import regions
from zgraph.runtime.region import Region, cut
from zgraph.runtime.regions import MAX_SIZES
from zgraph.runtime.strides import Strides

from .trained import MODELS, Trained, batch, losses, plain

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor needs a C++ compiler")


def op_by_op(function: Any, wait: Callable[[], None] = lambda: None) -> Lowered:
    return Lowered(lambda args: function(*args), wait)


@pytest.fixture
def compiled(monkeypatch) -> list[str]:
    """Regions run op by op; the list says when each would have been lowered, and when its kernels waited for."""
    found: list[str] = []

    def lowered(function: Any, examples: Any, *, checks_inputs: bool) -> Lowered:
        found.append("lowered")
        return op_by_op(function, lambda: found.append("waited"))

    monkeypatch.setattr(private_inductor, "lowered", lowered)
    return found


def planned(num_layers: int) -> Plan:
    torch.compiler.reset()
    with torch.device("meta"):
        model = small.llama(256, num_layers, 1000)
    ids = torch.zeros(2, 64, dtype=torch.int64)
    graph = zgraph.trace(model.train(), input_ids=ids, labels=ids, param_dtype=torch.bfloat16)
    context = Context(mesh=(Axis("shard", 8),), costs=cost_table("h100", torch.device("cuda")), groups_calls=True)
    return make_plan(parse_recipe(RECIPES[3]).run(graph, context))


def different(parts: Sequence[Instruction | Region]) -> set[str]:
    return {part.text for part in parts if isinstance(part, Region)}


def test_more_layers_are_no_more_different_regions():
    found = []
    for num_layers in (3, 4):
        plan = planned(num_layers)
        assert plan.backward is not None
        found.append([list(cut(p, plan.graph)) for p in (plan.forward, plan.backward)])
        for program, parts in zip((plan.forward, plan.backward), found[-1], strict=True):
            inside = [n for p in parts for n in (p.nodes if isinstance(p, Region) else [p.node]) if n.op != "release"]
            assert sorted(n.name for n in inside) == sorted(
                i.node.name for i in program.instructions if i.node.op != "release"
            )
    for few, more in zip(*found, strict=True):
        assert len(more) > len(few)
        assert len(different(more)) <= len(different(few))


@pytest.mark.parametrize("name", ["t5"])
def test_a_step_in_regions_is_the_same_step(name, compiled):
    """Bitwise, where regions run op by op: with dropout, and with what is computed again."""
    whole = plain(name)
    assert Trained(name, kernels="inductor").losses == whole.losses
    assert compiled
    tight = Trained(name, int(0.96 * whole.predicted), kernels="inductor")
    assert tight.losses == whole.losses


class Layers(nn.Module):
    """Repeated layers, with dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = nn.functional.dropout(x + nn.functional.gelu(layer(x)), 0.2)
        return x.square().mean()


def test_views_are_not_kept_and_fresh_gradients_not_copied():
    torch.compiler.reset()
    model = nn.Sequential(nn.Linear(8, 16, bias=False), nn.GELU(), nn.Linear(16, 8, bias=False))
    graph = zgraph.trace(model, torch.ones(2, 4, 8, requires_grad=True))
    recipes = RECIPES[0], RECIPES[0].replace("(stage=0", "(stage=0, repeat_views=false")
    kept, plain = (make_plan(parse_recipe(recipe).run(graph, Context())) for recipe in recipes)

    def views_of(plan: Plan) -> list[str]:
        return [v.name for v in plan.saved if (n := plan.graph.producers.get(v.name)) and views(plan.graph, n)]

    assert views_of(plain)
    assert not views_of(kept)
    assert not [n for n in kept.graph.nodes if n.op == "copy"]


@needs_compiler
def test_training_compiled_by_inductor():
    """Layers share their regions; dropouts draw as they do op by op."""
    found = []
    for kernels in ("aten", "inductor"):
        torch.compiler.reset()
        torch.manual_seed(0)
        model = zgraph.compile(Layers(), kernels=kernels)
        drawn = (torch.randn(8, 16, generator=torch.Generator().manual_seed(step)) for step in range(4))
        found.append(losses(model, ({"x": x} for x in drawn)))
    assert found[1] == pytest.approx(found[0], rel=1e-5)
    report = zgraph.report(model)
    regions = report.regions
    assert regions is not None
    assert regions.num_regions > regions.num_different > 1
    assert f"{regions.num_regions} regions, {regions.num_different} of them different" in str(report)


@needs_compiler
def test_gradients_are_memory_of_their_own():
    """In place changes of one gradient (clipping, say) leave all others as they are."""
    torch.compiler.reset()
    model = zgraph.compile(Twins(), kernels="inductor")
    model(torch.randn(4, 8)).backward()
    owned = {p.grad.untyped_storage().data_ptr() for p in model.parameters() if p.grad is not None}
    assert len(owned) == len(list(model.parameters()))


@needs_compiler
def test_functions_of_the_same_code_wait_for_the_same_kernels():
    """The second finds the first's module loaded, whose kernels are still building."""
    x = torch.randn(8)
    _, second = (private_inductor.lowered(lambda a: [a.sin() + 1], [x]) for _ in range(2))
    (made,) = second.ready()([x.clone()])
    torch.testing.assert_close(made, x.sin() + 1)


@needs_compiler
def test_strides_that_vary_between_calls():
    """A tangent that is laid out in another way from one call to the next."""
    torch.compiler.reset()
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(6, 6), nn.GELU(), nn.Linear(6, 6), nn.Tanh())
    model = zgraph.compile(copy.deepcopy(plain), kernels="inductor")
    x = torch.randn(6, 6)
    for tangent in (torch.randn(6, 6), torch.randn(6, 6), torch.randn(6, 6).t(), torch.randn(1, 6).expand(6, 6)):
        for each in (plain, model):
            each.zero_grad()
            each(x).backward(tangent)
        for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(ours.grad, theirs.grad)


def test_a_region_looks_at_strides_that_may_vary():
    """At all in the first call, at those that are loose in later ones, and at all again once any were others."""
    taken: list[str] = []
    found = regions.Regions()
    sized = regions._Sized(found, None)
    sized.by_size = lambda args: taken.append("by size") or args
    dense, other = torch.ones(3, 3), torch.ones(3, 3).t()[:, :2]
    kinds = [private_inductor.Example.of(t) for t in (dense, dense)]
    sized.are_static(kinds, lambda args: taken.append("compiled") or args)
    run, second = sized.runner([0]), sized.runner([])
    for args in ([dense, dense], [dense, dense], [other, dense]):
        run(args)
        second(args[1:] * 2)
    assert taken == ["compiled", "compiled"] * 2 + ["by size", "compiled"]
    second([dense, other])
    assert taken[-1] == "by size"


def test_strides_follow_from_what_is_read():
    plan = planned(2)
    parts = list(cut(plan.forward, plan.graph))
    inputs = {i.value.name for i in plan.graph.inputs if i.kind is not InputKind.param}
    strides = Strides(plan.graph, plan.resident, parts)
    found = [p for p in parts if isinstance(p, Region)]
    for region in found:
        for index in strides.loose(region):
            assert region.inputs[index].name in inputs
    loose = [v for p in found for v in (p.inputs[i] for i in strides.loose(p))]
    assert 0 < len(loose) < sum(len(p.inputs) for p in found)


class Twins(nn.Module):
    """Two biases whose gradients are the same numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 8))
        self.one, self.other = nn.Parameter(torch.zeros(8)), nn.Parameter(torch.zeros(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(x @ self.weight + self.one + self.other).sum()


def test_sizes_that_change(compiled):
    """A region is compiled for a few sizes, and then says that it gives up."""
    torch.compiler.reset()
    model = zgraph.compile(nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)), kernels="inductor", dynamic=True)
    for size in range(10, 10 + MAX_SIZES):
        model(torch.ones(size, 4)).sum().backward()
    number = len(compiled)
    with pytest.warns(UserWarning, match="Pad inputs to few sizes"):
        model(torch.ones(50, 4)).sum().backward()
    assert len(compiled) == number


def refusing(function: Any, examples: Any, **_: object) -> None:
    raise RuntimeError("no compiler")


def test_without_a_compiler_inductor_is_an_error(monkeypatch):
    monkeypatch.setattr(private_inductor, "lowered", refusing)
    monkeypatch.setenv("CXX", "no-such-compiler")
    torch.compiler.reset()
    model = zgraph.compile(MODELS["llama"](), kernels="inductor")
    with pytest.raises(KernelError, match=r"(?s)no compiler.*g\+\+"):
        model(**batch("llama", 0))
    assert compiled_model(model).regions is not None


def test_regions_are_compiled_before_anything_runs(compiled):
    """In the forward's first call, by the thread that makes it; the backward finds all compiled. All are lowered before
    the kernels of the first are waited for.
    """
    model = zgraph.compile(MODELS["llama"](), kernels="inductor")
    loss = model(**batch("llama", 0)).loss
    before = len(compiled)
    assert before > 2
    assert compiled == sorted(compiled)
    loss.backward()
    assert len(compiled) == before
    model(**batch("llama", 1)).loss.backward()
    assert len(compiled) == before


def test_a_device_thread_compiles_with_the_users_settings(monkeypatch):
    """Autograd runs backwards of GPUs in a thread whose context knows nothing of the main thread's."""
    setting: ContextVar[str] = ContextVar("setting", default="torch's")
    seen: list[str] = []

    def note(function: Any, examples: Any, *, checks_inputs: bool) -> Lowered:
        seen.append(setting.get())
        return op_by_op(function)

    monkeypatch.setattr(private_inductor, "lowered", note)
    monkeypatch.setattr(regions, "_examples", lambda region, session: None)  # as with sizes that are symbols
    model = zgraph.compile(MODELS["llama"](), kernels="inductor")
    setting.set("the user's")
    loss = model(**batch("llama", 0)).loss
    in_forward = len(seen)
    with ThreadPoolExecutor(1) as pool:
        pool.submit(loss.backward).result()
    assert len(seen) > in_forward
    assert set(seen) == {"the user's"}


def test_a_region_that_inductor_cannot_compile_runs_op_by_op(monkeypatch):
    """And says so, whether it is lowering that fails or building kernels; the others are compiled."""
    made: list[int] = []

    def fail() -> None:
        raise RuntimeError("OutOfResources: shared memory")

    def two_of_three(function: Any, examples: Any, *, checks_inputs: bool) -> Lowered:
        made.append(len(examples))
        if len(made) % 3 == 1:
            fail()
        return op_by_op(function, fail if len(made) % 3 == 2 else lambda: None)

    monkeypatch.setattr(private_inductor, "lowered", two_of_three)
    monkeypatch.setattr(regions, "has_inductor", lambda device: True)
    with pytest.warns(UserWarning, match=r"Inductor cannot compile \d+ ops of .*OutOfResources.*op by op") as told:
        assert Trained("t5", kernels="inductor").losses == plain("t5").losses
    assert len(told) == sum(number % 3 != 0 for number in range(1, len(made) + 1)) > 1


def test_no_memory_to_compile_is_no_memory(monkeypatch):
    def full(function: Any, examples: Any, **_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(private_inductor, "lowered", full)
    torch.compiler.reset()
    model = zgraph.compile(MODELS["llama"](), kernels="inductor")
    with pytest.raises(torch.OutOfMemoryError):
        model(**batch("llama", 0))
