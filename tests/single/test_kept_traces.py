"""Kept traces: a second run traces nothing, computes the same, and never takes a trace of what is not the same."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import zgraph
from tests.deep import DEEP, deep
from zgraph.bridge import private_traces
from zgraph.bridge.private_traces import Code, is_data
from zgraph.capture.kept_traces import read_trace
from zgraph.compiler import trace_folder
from zgraph.compiler.compiled_model import compiled_model
from zgraph.errors import KeptPlanWarning, RunFileError

X = torch.randn(4, 6, generator=torch.Generator().manual_seed(1))


class Net(nn.Module):
    """Two layers, with a body that each test chooses."""

    def __init__(self, body: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 6)
        self.register_buffer("seen", torch.zeros(6))
        self.body = body

    def forward(self, x: Tensor) -> Any:
        return self.body(self, x)


def plain(net: Any, x: Tensor) -> Any:
    return net.last(torch.tanh(net.first(x))).square().mean()


def normalised(net: Any, x: Tensor) -> Any:
    return net.last(F.dropout(torch.relu(net.norm(net.first(x))), 0.3)).square().mean()


def writes(net: Any, x: Tensor) -> Any:
    out = net.last(net.first(x))
    net.seen += out.detach().sum(0)
    return out.mean() + net.seen.sum()


def views(net: Any, x: Tensor) -> Any:
    out = net.last(net.first(x))
    return {"loss": out.mean(), "part": out[:2], "turned": out.t(), "given": x, "words": ["a", 3]}


def constants(net: Any, x: Tensor) -> Any:
    return (net.last(net.first(x)) * torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])).mean() + torch.tensor([]).sum()


def tied(net: Any, x: Tensor) -> Any:
    return F.linear(torch.relu(net.first(x)), net.first.weight.t()).mean()


def attention(net: Any, x: Tensor) -> Any:
    hidden = net.first(x).view(1, 2, 4, 4)
    return net.last(F.scaled_dot_product_attention(hidden, hidden, hidden).reshape(4, 8)).mean()


BODIES = (writes, views, constants, *map(deep, (plain, normalised, tied, attention)))


def run(
    body: Callable[[Any, Tensor], Any], *, evaluates: bool = True, **options: Any
) -> tuple[list[Any], dict[str, int]]:
    """Results, gradients and buffers of two steps and an evaluation, and how many traces were made and reused."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = zgraph.compile(Net(body), **options)
    found: list[Any] = []
    for _ in range(2):
        made = model(X)
        loss = made["loss"] if isinstance(made, dict) else made
        loss.backward()
        if isinstance(made, dict):
            assert made["part"]._base is made["turned"]._base is not None
            assert made["given"] is X
            found += [made["part"].tolist(), made["turned"].tolist(), made["words"]]
        found += [loss.item(), *(None if p.grad is None else p.grad.tolist() for p in model.parameters())]
        model.zero_grad()
    if evaluates:
        model.eval()
        with torch.no_grad():
            made = model(X)
        found.append((made["loss"] if isinstance(made, dict) else made).item())
    found += [b.tolist() for b in model.buffers()]
    return found, dict(compiled_model(model).traces.counts)


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Where traces are kept in this test, with a key of its own. Kernels that other tests have registered are known."""
    others = (name for name in torch.library._impls if name.startswith("aten/"))
    monkeypatch.setattr(private_traces, "_OF_TORCH", private_traces._OF_TORCH | {*others})
    monkeypatch.setenv("ZGRAPH_PLANS", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    trace_folder.user_key.cache_clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error", KeptPlanWarning)
        yield
    trace_folder.user_key.cache_clear()


@pytest.mark.parametrize("body", BODIES)
def test_a_second_run_traces_nothing_and_computes_the_same(
    body: Callable[[Any, Tensor], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    first, made = run(body)
    second, reused = run(body)
    assert made == {"made": 2}
    assert reused == ({"made": 1, "reused": 1} if body is views else {"reused": 2})  # views take code to make again
    monkeypatch.setenv("ZGRAPH_PLANS", "0")
    without, none = run(body)
    assert none == {}
    assert first == second == without


def user_code(net: Any, x: Tensor) -> Any:
    return torch.ops.kept_traces.doubled(net.first(x)).mean()


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * 2


def own_function(net: Any, x: Tensor) -> Any:
    return Doubled.apply(net.first(x)).mean()


def again(net: Any, x: Tensor) -> Any:
    return torch.utils.checkpoint.checkpoint(net.first, x, use_reentrant=False).mean()


@pytest.mark.parametrize("body", [user_code, own_function, again])
def test_what_runs_code_that_no_key_knows_is_not_kept(body: Callable[[Any, Tensor], Any]) -> None:
    if body is user_code and not hasattr(torch.ops.kept_traces, "doubled"):

        @torch.library.custom_op("kept_traces::doubled", mutates_args=())
        def doubled(x: Tensor) -> Tensor:
            return x * 2

        doubled.register_fake(lambda x: torch.empty_like(x))
        doubled.register_autograd(lambda ctx, gradient: gradient * 2)
    for _ in range(2):
        assert counts(body).get("reused", 0) == 0


def of_other_lines(net: Any, x: Tensor) -> Any:
    return net.last(torch.tanh(net.first(x))).square().mean()


def of_another_number(net: Any, x: Tensor) -> Any:
    return net.last(torch.tanh(net.first(x))).square().mean() * 1.5


def of_another_order(net: Any, x: Tensor) -> Any:
    return net.last(net.first(x).tanh()).square().mean()


OPTIONS: tuple[dict[str, Any], ...] = ({"stage": 1}, {"memory_budget": "1GiB"})
IN_DEPTH: tuple[dict[str, Any], ...] = ({"recompute": True}, {"param_dtype": torch.bfloat16}, {"kernels": "inductor"})


def counts(body: Callable[[Any, Tensor], Any], **options: Any) -> dict[str, int]:
    """How many traces of training are made and reused."""
    return run(body, evaluates=False, **options)[1]


def test_another_graph_line_option_or_flag_is_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    made = {"made": 1}
    assert counts(plain) == made
    for body in (of_other_lines, of_another_number, of_another_order):
        assert counts(body) == made
    for options in OPTIONS + (IN_DEPTH if DEEP else ()):
        assert counts(plain, **options) == made, options
    flags: tuple[tuple[Callable[[bool], Any], bool], ...] = (
        (torch.backends.cuda.enable_flash_sdp, torch.backends.cuda.flash_sdp_enabled()),
        (torch.use_deterministic_algorithms, torch.are_deterministic_algorithms_enabled()),
    )
    for set_flag, now in flags:
        set_flag(not now)
        try:
            assert counts(plain) == made
        finally:
            set_flag(now)
    monkeypatch.setenv("TORCH_SOMETHING", "1")
    assert counts(plain) == made
    monkeypatch.delenv("TORCH_SOMETHING")
    assert counts(plain) == {"reused": 1}


def test_a_trace_without_this_users_mark_is_not_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    numbers, _ = run(plain, evaluates=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "of another user"))
    trace_folder.user_key.cache_clear()
    with pytest.warns(KeptPlanWarning, match="it has not this user's mark"):
        found, seen = run(plain, evaluates=False)
    assert found == numbers
    assert seen == {"made": 1}


class Evil:
    def __reduce__(self) -> Any:
        return print, ("code of a file ran",)


def test_nothing_in_a_trace_is_run(capsys: pytest.CaptureFixture[str]) -> None:
    for evil in (Evil(), Code("forward", print), {"compiled_fw": Evil()}, [1]):
        assert not is_data(pickle.dumps(evil))
    assert not is_data(b"")
    assert not is_data(b"cos\nsystem\n(S'true'\ntR.")
    for held in (b"", b"zgraph trace 1\n", b"zgraph trace 1\nabc", pickle.dumps(Evil())):
        with pytest.raises(RunFileError):
            read_trace(held)
    assert capsys.readouterr().out == ""


def test_an_op_of_torch_with_another_kernel_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.library, "_impls", {*torch.library._impls, "aten/tanh/CPU"})
    assert counts(plain) == {}
    assert private_traces._OF_TORCH  # those that torch has are no reason
