"""Memory that ops take and keep on processors is measured, once for each op that differs."""

import pytest
import torch
from torch import nn
from torch.nn import functional

import zgraph
from benchmarks.memory import measure
from zgraph.bridge import scratch
from zgraph.capture import trace
from zgraph.compiler.compiled_model import compiled_model
from zgraph.cost.workspace import NUM_THREADS, by_rule, is_measured, kept_bytes, scratch_key, workspace_bytes

THREADS = {NUM_THREADS: 1}


class Depthwise(nn.Module):
    """A block as ConvNeXt's: a depthwise convolution of channels that lie last in memory."""

    def __init__(self, channels: int = 96) -> None:
        super().__init__()
        self.mixed = nn.Conv2d(channels, channels, 7, padding=3, groups=channels)
        self.out = nn.Linear(channels, channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.mixed(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2).square().mean()


def images(channels: int = 96) -> torch.Tensor:
    return torch.randn(2, 8, 8, channels).permute(0, 3, 1, 2)


class Restored(nn.Module):
    """A loss whose number lies in memory as large as what it is the mean of."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.mse_loss(self.conv(x), x)


def node_of(graph, op):
    return next(node for node in graph.nodes if node.op.startswith(op))


def test_a_depthwise_convolution_is_measured():
    graph = trace(Depthwise(), images())
    node = node_of(graph, "aten.convolution_backward")
    hints = THREADS | scratch.measured_scratch(graph, THREADS)
    assert workspace_bytes(node, hints) > 20 * by_rule(node, hints)
    assert all(is_measured(name) for name in hints.keys() - THREADS.keys())


@pytest.mark.parametrize(("build", "batch"), [(Depthwise, images), (Restored, lambda: torch.randn(2, 3, 64, 64))])
def test_the_peak_is_the_allocators(build, batch):
    model, x = zgraph.compile(build()), batch()

    def step(_):
        model.zero_grad()
        loss = model(x)
        loss.backward()
        return loss

    live = measure(lambda: step, warmup=2, device=torch.device("cpu"))
    gradients = sum(p.numel() * 4 for p in model.parameters())
    measured = live.peak_bytes - live.rest_bytes + gradients
    assert zgraph.report(model).step_peak_bytes == pytest.approx(measured, rel=0.005)


def test_a_loss_keeps_the_memory_of_what_it_is_the_mean_of():
    graph = trace(Restored(), torch.randn(2, 3, 64, 64))
    node = node_of(graph, "aten.mse_loss.")
    hints = THREADS | scratch.measured_scratch(graph, THREADS)
    assert kept_bytes(node, THREADS) == 0
    assert kept_bytes(node, hints) == pytest.approx(2 * 3 * 64 * 64 * 4, abs=64)


def test_an_op_is_run_once_and_leaves_no_trace(monkeypatch):
    graph = trace(
        nn.Sequential(*(nn.Sequential(nn.Linear(24, 24), nn.Dropout(0.5)) for _ in range(3))), torch.zeros(2, 24)
    )
    monkeypatch.setattr(scratch, "_known", {})
    run, real = [], scratch._taken
    monkeypatch.setattr(
        scratch, "_taken", lambda node, hints: run.append(scratch_key(node, hints)) or real(node, hints)
    )
    before = torch.random.get_rng_state()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
        first = scratch.measured_scratch(graph, THREADS)
        second = scratch.measured_scratch(graph, THREADS)
    assert first == second
    assert len(run) == len(set(run)) > 1
    assert any("native_dropout" in key for key in run)
    assert torch.equal(before, torch.random.get_rng_state())
    assert not [event for event in seen.events() if event.name.startswith("aten::native_dropout")]


def test_ops_of_other_libraries_are_not_run():
    @torch.library.custom_op("scratch_test::launch", mutates_args=())
    def launch(x: torch.Tensor) -> torch.Tensor:
        raise AssertionError("it ran")

    @launch.register_fake
    def _(x):
        return torch.empty_like(x)

    graph = trace(_Calling(), torch.zeros(4))
    assert any(node.op.startswith("scratch_test.") for node in graph.nodes)
    scratch.measured_scratch(graph, THREADS)


class _Calling(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.ops.scratch_test.launch(x) + 1


def test_what_is_too_large_or_cannot_run_is_left_to_its_rule(monkeypatch):
    graph = trace(Depthwise(), images())
    with monkeypatch.context() as patched:
        patched.setattr(scratch, "MAX_BYTES", 1000)
        assert scratch.measured_scratch(graph, THREADS) == {}
    monkeypatch.setattr(scratch, "_known", {})
    monkeypatch.setattr(scratch, "resolve", _refusing)
    hints = THREADS | scratch.measured_scratch(graph, THREADS)
    assert hints == THREADS
    assert workspace_bytes(node_of(graph, "aten.convolution."), hints) == by_rule(
        node_of(graph, "aten.convolution."), hints
    )


def _refusing(name):
    def op(*args, **kwargs):
        raise RuntimeError("not of zeros")

    return op


def test_keys_tell_what_memory_depends_on():
    dense = trace(Depthwise(), images().contiguous())
    strided = trace(Depthwise(), images())
    keys = {scratch_key(node_of(graph, "aten.convolution."), THREADS) for graph in (dense, strided)}
    assert len(keys) == 2
    same = trace(Depthwise(), images())
    assert scratch_key(node_of(same, "aten.convolution."), THREADS) in keys


def test_a_capture_measures_with_the_kernels_of_later_steps(monkeypatch):
    """Captures trace without oneDNN, whose convolutions take other memory."""
    monkeypatch.setattr(scratch, "_known", {})
    model = zgraph.compile(Depthwise())
    model(images()).backward()
    assert {has_onednn for _, has_onednn, _ in scratch._known} == {torch.backends.mkldnn.enabled}


def test_other_threads_than_planned_for_are_not_measured():
    graph = trace(Depthwise(), images())
    assert scratch.measured_scratch(graph, THREADS)
    assert scratch.measured_scratch(graph, {NUM_THREADS: 2}) == {}


def test_runs_for_a_graph_have_limits(monkeypatch):
    graph = trace(Depthwise(), images())
    whole = scratch.measured_scratch(graph, THREADS)
    convolutions = {key for key in scratch._within_limit(graph, THREADS) if key.startswith("aten.convolution")}
    assert convolutions
    with monkeypatch.context() as patched:
        patched.setattr(scratch, "MAX_GRAPH_FLOP", 1e3)
        assert not convolutions & scratch._within_limit(graph, THREADS).keys()
        fewer = scratch.measured_scratch(graph, THREADS)
    assert fewer.items() < whole.items(), "what is known already is not told either: it does not depend on that"
    monkeypatch.setattr(scratch, "_known", {})
    monkeypatch.setattr(scratch, "MAX_GRAPH_S", 0.0)
    assert scratch.measured_scratch(graph, THREADS) == {}


def test_a_lack_of_memory_is_told(monkeypatch):
    def op(*args, **kwargs):
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")

    graph = trace(Depthwise(), images())
    monkeypatch.setattr(scratch, "_known", {})
    with monkeypatch.context() as patched:
        patched.setattr(scratch, "resolve", lambda name: op)
        with pytest.warns(UserWarning, match=r"no memory to run aten\.convolution"):
            assert scratch.measured_scratch(graph, THREADS) == {}
    assert scratch.measured_scratch(graph, THREADS), "it is tried again, where there is room"


def test_a_result_in_an_operands_memory_is_not_taken_off(monkeypatch):
    """An op that gives its operand back, and takes as many bytes on the way."""

    def op(x, *args, **kwargs):
        (x + 1).sum()
        return x

    graph = trace(nn.Softmax(-1), torch.zeros(64, 64))
    node = node_of(graph, "aten._softmax")
    monkeypatch.setattr(scratch, "resolve", lambda name: op)
    taken, kept = scratch._taken(node, THREADS)
    assert taken >= 64 * 64 * 4
    assert kept == 0


def test_what_one_of_several_ranks_meets_alone_is_not_measured(monkeypatch):
    model = zgraph.compile(Depthwise())
    model(images()).backward()
    compiled = compiled_model(model)
    known = {name: size for name, size in compiled.hints.items() if is_measured(name)}
    assert known
    monkeypatch.setattr(type(compiled.session), "is_alone", False)
    later = trace(Depthwise(), torch.randn(3, 16, 16, 96).permute(0, 3, 1, 2))
    hints = compiled._agreed_hints(later, {})
    assert {name: size for name, size in hints.items() if is_measured(name)} == known
