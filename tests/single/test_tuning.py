"""The candidates for running a group, measured: what is chosen, kept, and told."""

import json
from dataclasses import replace

import pytest
import torch
from torch import nn

import zgraph
from zgraph.compiler import autotune
from zgraph.compiler.compiled_model import compiled_model
from zgraph.cost import CostTable, hardware
from zgraph.ir import Graph
from zgraph.ir.external_ops import COMPILED, MATMUL, RECTIFIED, ROWS
from zgraph.passes import Context, parse_recipe
from zgraph.passes.fuse import Fuse, candidates

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
        w.key: {candidate: 1.0 if candidate == fastest else 2.0 for candidate in w.nodes} for w in candidates(graph, {})
    }
    return replace(H100, costs=H100.costs.model_copy(update={"groups": groups}))


def ops(graph: Graph) -> set[str]:
    return {n.op for n in graph.nodes}


def test_all_ways_are_there_to_be_measured(graph):
    found = {candidate for w in candidates(graph, {}) for candidate in w.nodes}
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


def test_auto_is_op_by_op_on_processors():
    torch.compiler.reset()
    model = zgraph.compile(Mlp(), kernels="auto")
    model(torch.ones(16, 32)).backward()
    (entry,) = zgraph.report(model).entries
    assert ops(entry.plan.graph) & {ROWS, MATMUL} == set()


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
