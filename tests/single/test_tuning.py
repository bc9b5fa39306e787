"""The candidates for running a group, measured: what is chosen, kept, and told."""

import json
import logging
from dataclasses import replace

import pytest
import torch
from torch import nn

import zgraph
from zgraph.compiler import autotune
from zgraph.compiler import compiled_model as compiled_model_module
from zgraph.compiler.compiled_model import compiled_model
from zgraph.cost import CostTable, hardware
from zgraph.errors import KernelError
from zgraph.ir import Graph
from zgraph.ir.external_ops import COMPILED, MATMUL, PROJECTED_LOSS, RECTIFIED, ROWS
from zgraph.options.settings import kernels_for
from zgraph.passes import Context, parse_recipe
from zgraph.passes.fuse import Fuse, candidates
from zgraph.runfile.format import has_backward

H100 = Context(costs=CostTable(hardware=hardware("h100")))


class Mlp(nn.Module):
    """A gated projection, and one whose bias is followed by a rectifier."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(32, 64, bias=False), nn.Linear(32, 64, bias=False)
        self.rectified, self.down = nn.Linear(64, 64), nn.Linear(64, 8, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.rectified(nn.functional.silu(self.gate(x)) * self.up(x)).relu()).sum()


@pytest.fixture(scope="module")
def graph() -> Graph:
    torch.compiler.reset()
    return parse_recipe("canonicalize").run(zgraph.trace(Mlp(), torch.ones(16, 32, requires_grad=True)), Context())


def measured(graph: Graph, fastest: str) -> Context:
    """As if this candidate was the fastest wherever it is one."""
    groups = {
        w.key: {candidate: 1.0 if candidate == fastest else 2.0 for candidate in w.nodes}
        for w in candidates(graph, Context())
    }
    return replace(H100, costs=H100.costs.model_copy(update={"groups": groups}))


def ops(graph: Graph) -> set[str]:
    return {n.op for n in graph.nodes}


def test_all_ways_are_there_to_be_measured(graph):
    found = {candidate for w in candidates(graph, Context()) for candidate in w.nodes}
    assert found == {"aten", "kernel", "inductor", "matmul", "library"}


def test_what_was_measured_is_what_counts(graph):
    """A group is never fused where that was measured to be slower."""
    assert ops(Fuse().run(graph, measured(graph, "aten"))) & {ROWS, MATMUL, RECTIFIED} == set()
    assert ROWS in ops(Fuse().run(graph, measured(graph, "kernel")))
    assert MATMUL not in ops(Fuse().run(graph, measured(graph, "kernel")))
    assert MATMUL in ops(Fuse().run(graph, measured(graph, "matmul")))
    assert RECTIFIED in ops(Fuse().run(graph, measured(graph, "library")))
    assert COMPILED in ops(Fuse().run(graph, measured(graph, "inductor")))
    assert ROWS not in ops(Fuse().run(graph, measured(graph, "inductor")))


def test_without_measurements_the_cost_model_weighs_the_rate_of_matmuls(graph):
    """Where a generated matmul loses more than its epilogue wins, it is left to the library."""
    h100 = hardware("h100")
    for rate, is_fused in ((1e-6, False), (1.0, True)):
        device = h100.device.model_copy(update={"generated_matmul_rate": rate})
        context = Context(costs=CostTable(hardware=h100.model_copy(update={"device": device})))
        assert (MATMUL in ops(Fuse().run(graph, context))) == is_fused


@pytest.mark.parametrize(("candidate", "op"), [("library", RECTIFIED), ("inductor", COMPILED)])
def test_ways_that_are_others_give_the_same_numbers(candidate, op):
    """Of one rank, run as measured."""
    if not autotune.has_inductor(torch.device("cpu")):
        pytest.skip("Inductor needs a C++ compiler")
    losses = []
    for fastest in ("aten", candidate):
        torch.compiler.reset()
        torch.manual_seed(0)
        model = Mlp()
        x = torch.randn(16, 32, requires_grad=True)
        seen = parse_recipe("canonicalize").run(zgraph.trace(model, x), Context())
        torch.compiler.reset()
        compiled = zgraph.compile(model, kernels="triton", hardware=measured(seen, fastest).costs)
        loss = compiled(x)
        loss.backward()
        losses.append([loss.item(), *(float(p.grad.norm()) for p in model.parameters())])
        (entry,) = zgraph.report(model).entries
        assert (op in ops(entry.plan.graph)) == (fastest == candidate)
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_measuring_in_the_first_call(monkeypatch, tmp_path):
    """Times are kept in a file, read again, and measured anew where the file is damaged."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    counted: list[int] = []
    measure = autotune.measured
    monkeypatch.setattr(autotune, "measured", lambda *args: counted.append(1) or measure(*args))
    monkeypatch.setattr(autotune, "has_inductor", lambda device: False)
    device = torch.device("cpu")
    for _ in range(3):
        torch.compiler.reset()
        model = zgraph.compile(Mlp(), kernels="triton")
        compiled = compiled_model(model)
        compiled.tunes = True
        model(torch.ones(16, 32)).backward()
        groups = compiled.context.costs.groups
        assert groups
        assert all(us > 0 for times in groups.values() for us in times.values())
        if len(counted) == 2 * len(groups):
            break
        assert len(counted) == len(groups)
        if _ == 1:
            autotune.times_path(device).write_text('{"half')
    assert len(counted) == 2 * len(groups)
    assert json.loads(autotune.times_path(device).read_text()).keys() == groups.keys()


@pytest.fixture
def tuning(monkeypatch, tmp_path) -> None:
    """An empty cache, candidates without Inductor, and few rounds."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(autotune, "has_inductor", lambda device: False)
    monkeypatch.setattr(autotune, "NUM_ROUNDS", 3)


def fails(monkeypatch, wanted: set[str], error: Exception) -> None:
    """Calls of these candidates fail."""
    prepare = autotune._prepared

    def prepared(nodes, *rest):
        found = {"zgraph.rows.default": "kernel", MATMUL: "matmul", RECTIFIED: "library"}
        candidate = next((found[n.op] for n in nodes if n.op in found), "aten")
        run = prepare(nodes, *rest)

        def failing() -> None:
            raise error

        return failing if candidate in wanted else run

    monkeypatch.setattr(autotune, "_prepared", prepared)


OUT_OF_RESOURCES = RuntimeError("out of resource: shared memory,\nRequired: 294912, Hardware limit: 232448")


def test_a_candidate_that_fails_is_left_out_and_told(graph, tuning, monkeypatch):
    fails(monkeypatch, {"kernel", "matmul"}, OUT_OF_RESOURCES)
    told: list[str] = []
    costs = autotune.tuned(graph, H100, torch.device("cpu"), None, told.append)
    for times in costs.groups.values():
        failed = {candidate for candidate, us in times.items() if us == autotune.NEVER_US}
        assert failed == {"kernel", "matmul", "inductor"} & times.keys()
    assert len(told) == sum(len({"kernel", "matmul"} & times.keys()) for times in costs.groups.values())
    assert any('"kernel" for silu_' in line for line in told), "the kernel's name"
    assert all("RuntimeError: out of resource: shared memory, Required: 294912" in line for line in told)
    assert ops(Fuse().run(graph, replace(H100, costs=costs))) & {ROWS, MATMUL} == set()


def test_op_by_op_is_what_is_left_where_all_candidates_fail(graph, tuning, monkeypatch):
    """Of operands that do not fit, say. The next process tries again."""
    fails(monkeypatch, {"aten", "kernel", "matmul", "library"}, torch.OutOfMemoryError("CUDA out of memory"))
    told: list[str] = []
    costs = autotune.tuned(graph, H100, torch.device("cpu"), None, told.append)
    assert {us for times in costs.groups.values() for us in times.values()} == {autotune.NEVER_US}
    assert ops(Fuse().run(graph, replace(H100, costs=costs))) & {ROWS, MATMUL, RECTIFIED, COMPILED} == set()
    monkeypatch.undo()
    assert told
    for times in autotune._read(autotune.times_path(torch.device("cpu"))).values():
        assert set(times) <= {"inductor"}


def test_what_failed_is_tried_again_by_the_next_process(graph, tuning, monkeypatch):
    with monkeypatch.context() as patched:
        fails(patched, {"kernel"}, OUT_OF_RESOURCES)
        autotune.tuned(graph, H100, torch.device("cpu"), None)
    costs = autotune.tuned(graph, H100, torch.device("cpu"), None)
    assert all(us < autotune.NEVER_US for times in costs.groups.values() for c, us in times.items() if c == "kernel")


def test_a_device_that_a_candidate_broke_is_an_error(graph, tuning, monkeypatch):
    class Broken(autotune.Clock):
        def synchronize(self) -> None:
            if broken:
                raise RuntimeError("CUDA error: an illegal memory access was encountered")

    broken: list[int] = []
    prepare = autotune._prepared

    def prepared(*args):
        run = prepare(*args)
        return lambda: (run(), broken.append(1))

    monkeypatch.setattr(autotune, "Clock", Broken)
    monkeypatch.setattr(autotune, "_prepared", prepared)
    with pytest.raises(KernelError, match=r"broke the device.*illegal memory access.*kernels=\"aten\""):
        autotune.tuned(graph, H100, torch.device("cpu"), None)


def test_a_first_call_does_not_end_with_a_candidate_that_fails(tuning, monkeypatch, caplog):
    monkeypatch.setenv("ZGRAPH_LOGS", "capture")
    caplog.set_level("INFO", "zgraph")
    fails(monkeypatch, {"kernel"}, OUT_OF_RESOURCES)
    torch.compiler.reset()
    model = zgraph.compile(Mlp(), kernels="triton")
    compiled_model(model).tunes = True
    model(torch.ones(16, 32)).backward()
    assert ROWS not in ops(zgraph.report(model).entries[0].plan.graph)
    assert 'Mlp: the candidate "kernel" for silu' in caplog.text
    assert "is left out: RuntimeError: out of resource: shared memory" in caplog.text


class Dropped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(nn.functional.dropout(nn.functional.gelu(self.up(x)), 0.3)).sum()


def test_random_numbers_of_the_user_are_as_they_were(tuning):
    """Whether times are in a file or measured, and whatever the candidates draw."""
    after = []
    for _ in range(2):
        torch.compiler.reset()
        torch.manual_seed(0)
        model = zgraph.compile(Dropped(), kernels="triton")
        compiled_model(model).tunes = True
        loss = model(torch.ones(16, 32))
        loss.backward()
        after.append((loss.item(), torch.rand(()).item()))
        assert compiled_model(model).context.costs.groups
    assert after[0] == after[1]


def test_tuning_draws_from_a_generator_of_its_own(tuning, monkeypatch):
    torch.compiler.reset()
    seen = parse_recipe("canonicalize").run(zgraph.trace(Dropped(), torch.ones(16, 32)), Context())
    before = torch.get_rng_state()
    drawn: list[torch.Tensor] = []
    measure = autotune.measured
    monkeypatch.setattr(autotune, "measured", lambda *args: (measure(*args), drawn.append(torch.get_rng_state()))[0])
    autotune.tuned(seen, H100, torch.device("cpu"), None)
    assert any(not torch.equal(state, before) for state in drawn)
    assert torch.equal(torch.get_rng_state(), before)


def test_each_training_graph_is_measured_and_not_only_the_first_graph(tuning, monkeypatch):
    """An evaluation may come first, and other sizes later."""
    seen: list[bool] = []
    tune = compiled_model_module.tuned
    monkeypatch.setattr(compiled_model_module, "tuned", lambda g, *args: seen.append(has_backward(g)) or tune(g, *args))
    torch.compiler.reset()
    model = zgraph.compile(Mlp(), kernels="triton", dynamic=False)
    compiled = compiled_model(model)
    compiled.tunes = True
    with torch.no_grad():
        model(torch.ones(16, 32))
        model(torch.ones(17, 32))
    inference = set(compiled.context.costs.groups)
    model(torch.ones(16, 32)).backward()
    training = set(compiled.context.costs.groups)
    model(torch.ones(18, 32)).backward()
    assert seen == [False, True, True]
    assert inference < training < set(compiled.context.costs.groups)


def test_other_sizes_are_judged_by_the_nearest_that_were_measured(graph):
    """As a rank does that meets them alone, and all others when they meet them."""
    torch.compiler.reset()
    larger = zgraph.trace(Mlp(), torch.ones(24, 32, requires_grad=True))
    larger = parse_recipe("canonicalize").run(larger, Context())
    for fastest, op in (("aten", None), ("kernel", ROWS), ("library", RECTIFIED)):
        known = measured(graph, fastest)
        keys = {w.key for w in candidates(larger, Context())}
        assert not keys & known.costs.groups.keys()
        found = ops(Fuse().run(larger, known))
        assert op in found if op else found & {ROWS, MATMUL, RECTIFIED, COMPILED} == set()
    times = {"a(f32[4x8]); k": {"aten": 1.0}, "a(f32[64x8]); k": {"aten": 2.0}, "a(f32[16x8]); j": {"aten": 3.0}}
    table = H100.costs.model_copy(update={"groups": times})
    assert table.group_us("a(f32[5x8]); k") == {"aten": 1.0}
    assert table.group_us("a(f32[40x8|8x1]); k") == {"aten": 2.0}
    assert table.group_us("a(bf16[16x8]); k") == {}


def test_inductor_is_measured_while_a_graph_is_captured(monkeypatch, tmp_path):
    if not autotune.has_inductor(torch.device("cpu")):
        pytest.skip("Inductor needs a C++ compiler")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    torch.compiler.reset()
    model = zgraph.compile(nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.GELU()), kernels="triton")
    compiled = compiled_model(model)
    compiled.tunes = True
    model(torch.ones(4, 8)).sum().backward()
    times = [times["inductor"] for times in compiled.context.costs.groups.values() if "inductor" in times]
    assert times
    assert max(times) < autotune.NEVER_US


@pytest.mark.parametrize("fastest", ["kernel", "matmul", "inductor", "aten", None])
def test_only_what_was_measured_to_be_faster_leaves_the_regions(graph, fastest):
    """The rest is Inductor's, which compiles it with what is around it."""
    context = H100 if fastest is None else measured(graph, fastest)
    expected = {"kernel": {ROWS}, "matmul": {MATMUL}}.get(str(fastest), set())
    assert ops(Fuse(only_measured=True).run(graph, context)) & {ROWS, MATMUL, COMPILED, RECTIFIED} == expected


class Words(nn.Module):
    """A loss of a projection to many words."""

    def __init__(self) -> None:
        super().__init__()
        self.embedded, self.words = nn.Embedding(500, 8), nn.Linear(8, 500, bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(self.words(self.embedded(ids)), ids)


def test_the_loss_is_left_to_inductor_where_its_logits_fit():
    torch.compiler.reset()
    captured = parse_recipe("canonicalize").run(zgraph.trace(Words(), torch.arange(400)), Context())
    logits = 4 * 400 * 500
    found = {
        budget: PROJECTED_LOSS in ops(Fuse(only_measured=True).run(captured, Context(memory_budget=budget)))
        for budget in (None, 9 * logits, logits)
    }
    assert found == {None: False, 9 * logits: False, logits: True}


def test_auto_without_inductor_is_told(monkeypatch, caplog):
    caplog.set_level(logging.INFO, "zgraph")
    monkeypatch.setenv("ZGRAPH_LOGS", "capture")
    monkeypatch.setenv("CXX", "no-such-compiler")
    model = zgraph.compile(Mlp(), kernels="auto")
    (line,) = caplog.messages
    assert 'kernels="auto" is kernels="aten" here' in line
    assert "no-such-compiler" in line
    assert zgraph.report(model).regions is None
    kernels, remark = kernels_for(None, torch.device("cuda"))
    assert kernels == "aten"
    assert "the default on GPUs" in remark


def test_what_inductor_makes_of_a_kernel_is_what_its_twin_makes():
    """Random numbers too, and outputs that are copies of each other are memory of their own."""
    if not autotune.has_inductor(torch.device("cpu")):
        pytest.skip("Inductor needs a C++ compiler")
    text = (
        "drop 24: x f32[M,N], s i64[], w f32[N] -> y f32[M,N], z f32[M,N], t f32[M,1], d f32[N]; u = random(s); "
        "k = less(0.3, u); a = mul(x, k); y = mul(a, w); z = copy(y); t = row_sum(y); d = col_sum(y)"
    )
    inputs = [torch.randn(7, 24), torch.tensor(5), torch.randn(24)]
    made, plain = torch.ops.zgraph.compiled(inputs, text), torch.ops.zgraph.rows(inputs, text)
    for got, same in zip(made, plain, strict=True):
        assert torch.allclose(got, same, rtol=1e-5, atol=1e-6)
    assert len({t.data_ptr() for t in made}) == 4
