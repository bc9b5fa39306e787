"""Kept plans: a second run captures nothing and trains alike, and a plan is never used for what is not the same."""

from __future__ import annotations

import dataclasses
import stat
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import zgraph
from zgraph.bridge.private_files import write_private
from zgraph.compiler import plan_cache, reuse_key
from zgraph.compiler.compiled_model import compiled_model
from zgraph.errors import CacheError, PlanCacheWarning, UsageError
from zgraph.runfile.kept import Kept, load_kept

GAIN = 1.5
TABLE = {"gain": 1.0}


def doubled(x: Tensor) -> Tensor:
    return x * 2


class Net(nn.Module):
    """Normalisation with buffers that are written to, random numbers, state of many kinds, and a result with a loss."""

    power = 1

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(6, width), nn.BatchNorm1d(width)
        self.drop, self.last = nn.Dropout(0.2), nn.Linear(width, 6)
        self.last.weight = nn.Parameter(self.last.weight.detach().clone())
        self.scale, self.options, self.then = 2, {"shift": [1, 2]}, doubled

    def forward(self, x: Tensor, y: Tensor | None = None, *, flip: bool = False) -> dict[str, Any]:
        hidden = self.drop(torch.relu(self.norm(self.first(x))))
        out = self.then(self.last(hidden) * self.scale * GAIN * TABLE["gain"]) ** self.power + self.options["shift"][1]
        out = -out if flip else out
        return {"loss": None if y is None else F.mse_loss(out, y), "out": out, "words": ["seen", len(x)]}


def net(width: int = 12, **options: Any) -> Net:
    torch.manual_seed(0)
    return zgraph.compile(Net(width), **options)


X, Y = torch.randn(5, 6), torch.randn(5, 6)


def train(model: nn.Module, steps: int = 2) -> list[float]:
    """Losses, gradients and buffers of some steps."""
    torch.manual_seed(1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    found = []
    for _ in range(steps):
        result = model(X, y=Y)
        result["loss"].backward()
        assert result["words"] == ["seen", 5]
        found += [result["loss"].item(), *(p.grad.sum().item() for p in model.parameters())]
        optimizer.step()
        optimizer.zero_grad()
    return [*found, *(b.sum().item() for b in model.buffers())]


def counts(model: nn.Module) -> tuple[int, int]:
    """Graphs that were captured and that were reused."""
    found = compiled_model(model)
    return found.num_captured, found.num_reused


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[float]]:
    """A folder with the plans of `Net` in training and evaluation, and what the run that made them has found."""
    folder = tmp_path_factory.mktemp("filled")
    model = net(plan_cache=folder)
    found = train(model)
    model.eval()
    with torch.no_grad():
        found.append(model(X)["out"].sum().item())
    assert counts(model) == (2, 0)
    assert len(files(folder)) == 2
    torch._dynamo.reset()
    return folder, found


@pytest.fixture
def folder(filled: tuple[Path, list[float]], tmp_path: Path) -> Path:
    """A copy of it."""
    plans = plan_cache.plan_cache(tmp_path)
    assert plans is not None
    for path in files(filled[0]):
        write_private(plans.folder / path.name, path.read_bytes())
    return tmp_path


def files(folder: Path) -> list[Path]:
    return sorted((folder / plan_cache.FOLDER).glob("*.zg"))


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error", PlanCacheWarning)
        yield


# --- what is the same -----------------------------------------------------------------------------------------------


def test_a_second_run_captures_nothing_and_trains_to_the_last_bit(
    folder: Path,
    filled: tuple[Path, list[float]],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("ZGRAPH_LOGS", "capture")
    caplog.set_level("INFO", "zgraph")
    model = net(plan_cache=folder)
    found = train(model)
    model.eval()
    with torch.no_grad():
        found.append(model(X)["out"].sum().item())
    assert found == filled[1]
    assert counts(model) == (0, 2)
    report = zgraph.report(model)
    assert "0 graphs captured, 2 reused from" in str(report)
    assert [entry.kind for entry in report.entries] == ["training", "inference"]
    assert report.entries[0].steps[0].text.startswith("canonicalize")
    assert report.entries[0].certificate is not None
    said = caplog.text
    assert said.count("reused the plan of Net") == 2
    assert "nothing was captured" in said
    uncached = net()
    assert train(uncached) == filled[1][:-1]


def test_gradients_of_inputs_and_two_backwards_are_those_of_eager_pytorch(tmp_path: Path) -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            hidden = torch.tanh(self.layer(a))
            return hidden.t().contiguous(), (hidden * b).sum(), a

    def grads(model: nn.Module) -> list[Tensor]:
        a = torch.linspace(0, 1, 12).reshape(3, 4).requires_grad_()
        left, right, same = model(a, a)
        assert same is a
        (left.t() * 3).sum().backward(retain_graph=True)
        right.backward()
        return [a.grad, *(p.grad for p in model.parameters())]

    torch.manual_seed(0)
    plain = Plain()
    wanted = [grad.clone() for grad in grads(plain)]
    for captured, reused in ((1, 0), (0, 1)):
        torch.manual_seed(0)
        model = zgraph.compile(Plain(), plan_cache=tmp_path)
        torch.testing.assert_close(grads(model), wanted)
        assert counts(model) == (captured, reused)
        with pytest.raises(RuntimeError, match=r"second time|second backward"):
            backward_twice(model)


def backward_twice(model: nn.Module) -> None:
    a = torch.ones(3, 4, requires_grad=True)
    out = model(a, a)[1]
    out.backward()
    out.backward()


# --- what is not the same -------------------------------------------------------------------------------------------


def another_forward(self: Net, x: Tensor, y: Tensor | None = None, *, flip: bool = False) -> dict[str, Any]:
    out = self.last(self.first(x)) + 0
    return {"loss": F.mse_loss(out, Y), "out": out, "words": ["seen", 5]}


def frozen(model: Net) -> None:
    model.first.weight.requires_grad_(requires_grad=False)


def tied(model: Net) -> None:
    model.norm.bias = model.norm.weight


def in_double(model: Net) -> None:
    model.double()


OTHERS: dict[str, Callable[[pytest.MonkeyPatch], Any]] = {
    "width": lambda patch: net(16, plan_cache=None),
    "dtype option": lambda patch: net(param_dtype="bf16"),
    "recipe": lambda patch: net(recompute=True),
    "version": lambda patch: patch.setattr(reuse_key, "__version__", "9.9"),
    "torch": lambda patch: patch.setattr(torch.version, "git_version", "0"),
    "source": lambda patch: patch.setattr(reuse_key, "sources_digest", lambda: "0"),
    "forward": lambda patch: patch.setattr(Net, "forward", another_forward),
    "global": lambda patch: patch.setitem(globals(), "GAIN", 2.5),
    "table": lambda patch: patch.setitem(TABLE, "gain", 3.0),
    "class": lambda patch: patch.setattr(Net, "power", 2),
    "default dtype": lambda patch: patch.setattr(torch, "get_num_threads", lambda: 3),
}


@pytest.mark.parametrize("name", OTHERS)
def test_the_key_of_another_model_option_or_version_is_another(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No capture is needed to tell: the rehearsal's key is not that of the folder."""

    def key(model: nn.Module) -> str:
        found: list[str] = []
        monkeypatch.setattr(plan_cache.PlanCache, "find", lambda self, key: found.append(key))
        monkeypatch.setattr("zgraph.compiler.reuse.Reuse._captured", lambda self, signature, call, prepared: None)
        model(X, y=Y)
        return found[0]

    with monkeypatch.context() as usual:
        usual.setenv("ZGRAPH_PLAN_CACHE", str(tmp_path))
        before, again = key(net()), key(net())
        assert before == again
    monkeypatch.setenv("ZGRAPH_PLAN_CACHE", str(tmp_path))
    made = OTHERS[name](monkeypatch)
    assert key(made if isinstance(made, nn.Module) else net()) != before


@pytest.mark.parametrize("change", [frozen, tied, in_double])
def test_a_model_that_was_changed_has_another_plan(
    change: Callable[[Net], None], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model = Net()
    change(model)
    model = zgraph.compile(model, plan_cache=folder)
    monkeypatch.setattr("zgraph.compiler.reuse.Reuse._captured", lambda self, signature, call, prepared: "captured")
    dtype = model.first.bias.dtype
    assert model(X.to(dtype), y=Y.to(dtype)) == "captured"


def set_scale(model: Net) -> None:
    model.scale = 3


def set_option(model: Net) -> None:
    model.options["shift"][1] = 7


def set_rate(model: Net) -> None:
    model.drop.p = 0.9


def set_function(model: Net) -> None:
    model.then = torch.tanh


def set_evaluation_of_one(model: Net) -> None:
    model.norm.eval()


def freeze(model: Net) -> None:
    model.last.bias.requires_grad_(requires_grad=False)


def set_gain(model: Net) -> None:
    globals()["GAIN"] = 4.5


def set_table(model: Net) -> None:
    TABLE["gain"] = 0.25


def set_class(model: Net) -> None:
    Net.power = 3


def set_nothing(model: Net) -> None:
    model.remark = "nothing reads this"


CHANGES = [
    set_scale,
    set_option,
    set_rate,
    set_function,
    set_evaluation_of_one,
    freeze,
    set_gain,
    set_table,
    set_class,
    set_nothing,
]


@pytest.mark.parametrize("change", CHANGES)
def test_what_python_changes_between_calls_is_noticed(
    change: Callable[[Net], None], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(globals(), "GAIN", GAIN)
    monkeypatch.setitem(TABLE, "gain", TABLE["gain"])
    monkeypatch.setattr(Net, "power", Net.power)
    model = net(plan_cache=folder)
    model(X, y=Y)
    model(X, y=Y)
    assert counts(model) == (0, 1)
    monkeypatch.setattr("zgraph.compiler.reuse.Reuse._captured", lambda self, signature, call, prepared: "captured")
    change(model)
    if change is not set_nothing:
        assert model(X, y=Y) == "captured"
        return
    eager = net_eager()
    torch.manual_seed(4)
    found = model(X, y=Y)["loss"]
    torch.manual_seed(4)
    torch.testing.assert_close(found, eager(X, y=Y)["loss"])
    assert counts(model) == (0, 1)


def test_other_arguments_and_modes_are_other_calls(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zgraph.compiler.reuse.Reuse._captured", lambda self, signature, call, prepared: "captured")
    model, eager = net(plan_cache=folder).eval(), net_eager().eval()
    assert model(X) == "captured"  # with gradients
    with torch.no_grad():
        torch.testing.assert_close(model(X)["out"], eager(X)["out"])
        assert model(X, flip=True) == "captured"
        assert model(X[:3]) == "captured"
        assert model(X.t().contiguous().t()) == "captured"
        with torch.autocast("cpu"):
            assert model(X) == "captured"
        torch.testing.assert_close(model(X)["out"], eager(X)["out"])
    assert counts(model) == (0, 1)


def net_eager() -> Net:
    torch.manual_seed(0)
    return Net()


# --- what cannot be reused ------------------------------------------------------------------------------------------


def counted(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    calls = 0

    def wrapper(x: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return function(x)

    return wrapper


counted_sum = counted(torch.sum)


def gathering(x: Tensor, seen: list[int] = []) -> Tensor:  # noqa: B006 - what it is about
    return x * (len(seen) + 1)


class _Own(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * 3


class Odd(nn.Module):
    """A layer beside which something happens."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.layer, self.kind, self.count, self.seen = nn.Linear(3, 3), kind, 0, []

    def forward(self, x: Tensor, *others: Any) -> Any:
        if self.kind == "writes":
            x.add_(1)
        out = self.layer(x)
        if self.kind == "counts":
            self.count += 1
        elif self.kind == "prints":
            print("called")
        elif self.kind == "view":
            return out, out[1:]
        elif self.kind == "own backward":
            return _Own.apply(out)
        elif self.kind == "closure":
            return counted_sum(out)
        elif self.kind == "default":
            return gathering(out)
        return out


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        ("own backward", "it applies _Own, whose backward is not seen"),
        ("closure", "it changes calls of wrapper"),
        ("default", "has a list for a default"),
        ("counts", "it changes the model"),
        ("prints", "it prints, warns or asks at test_plan_cache.py"),
        ("view", "share memory"),
        ("writes", "it writes to input 0"),
        ("argument", "an argument is a object"),
    ],
)
def test_what_cannot_be_reused_is_captured_as_ever_and_told(
    kind: str, why: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = zgraph.compile(Odd(kind), plan_cache=tmp_path)
    others = [object()] if kind == "argument" else []
    x = torch.zeros(2, 3)
    for _ in range(2):
        model(x, *others)
    assert why in zgraph.report(model).reuse
    assert counts(model)[1] == 0
    assert not files(tmp_path)
    if kind == "counts":
        assert model.count == 2
    if kind == "prints":
        assert capsys.readouterr().out.count("called") == 2
    if kind == "writes":
        assert x.sum() == 12


# --- files ----------------------------------------------------------------------------------------------------------


def resigned(held: bytes, change: Callable[[Kept], Kept]) -> bytes:
    """A file that somebody has changed who knows how its hash is made."""
    from io import BytesIO

    from zgraph.runfile.archive import opened
    from zgraph.runfile.format import load_run
    from zgraph.runfile.kept import REUSE, Reuse

    with opened(BytesIO(held), "it") as archive:
        reuse = Reuse.model_validate_json(archive.read(REUSE))
    return change(Kept(load_run(BytesIO(held)), reuse)).signed().to_bytes()


def other_program(kept: Kept) -> Kept:
    member = kept.run.member("final")
    text = kept.run.texts[member]
    assert "aten.relu.default" in text
    texts = {**kept.run.texts, member: text.replace("aten.relu.default", "aten.neg.default")}
    return dataclasses.replace(kept, run=dataclasses.replace(kept.run, texts=texts, _graphs={}))


def other_binding(kept: Kept) -> Kept:
    swapped = [*kept.reuse.inputs]
    places = [i for i, bound in enumerate(swapped) if bound.target in ("norm.weight", "norm.bias")]
    first, second = (swapped[i] for i in places)
    swapped[places[0]] = first.model_copy(update={"target": second.target})
    swapped[places[1]] = second.model_copy(update={"target": first.target})
    return dataclasses.replace(kept, reuse=kept.reuse.model_copy(update={"inputs": tuple(swapped)}))


def other_outputs(kept: Kept) -> Kept:
    return dataclasses.replace(kept, reuse=kept.reuse.model_copy(update={"outputs": (99, 0)}))


def other_context(kept: Kept) -> Kept:
    context = dataclasses.replace(kept.run.context, memory_budget=1 << 40)
    manifest = kept.run.manifest.model_copy(update={"context": context})
    return dataclasses.replace(kept, run=dataclasses.replace(kept.run, manifest=manifest))


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda held: b"",
    "cut off": lambda held: held[: len(held) // 2],
    "a bit": lambda held: held[:300] + bytes([held[300] ^ 1]) + held[301:],
    "pickle": lambda held: b"\x80\x04cos\nsystem\n(S'false'\ntR.",
    "program": lambda held: resigned(held, other_program),
    "binding": lambda held: resigned(held, other_binding),
    "outputs": lambda held: resigned(held, other_outputs),
    "context": lambda held: resigned(held, other_context),
    "another key": lambda held: resigned(
        held, lambda kept: dataclasses.replace(kept, reuse=kept.reuse.model_copy(update={"key": "another"}))
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_or_hostile_file_is_refused_and_the_model_captured(
    name: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for path in files(folder):
        path.write_bytes(DAMAGES[name](path.read_bytes()))
    model = net(plan_cache=folder)
    monkeypatch.setattr("zgraph.compiler.reuse.Reuse._captured", lambda self, signature, call, prepared: "captured")
    with pytest.warns(PlanCacheWarning, match="is not used, and removed"):
        assert model(X, y=Y) == "captured"
    assert len(files(folder)) == 1  # that of evaluation


def test_a_damaged_file_is_replaced(folder: Path, filled: tuple[Path, list[float]]) -> None:
    for path in files(folder):
        path.write_bytes(b"PK")
    model = net(plan_cache=folder)
    with pytest.warns(PlanCacheWarning):
        assert train(model) == filled[1][:-1]
    assert counts(model) == (1, 0)
    assert any(path.stat().st_size > 100 for path in files(folder))


def test_files_are_of_this_user_alone_and_not_too_many(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plans = folder / plan_cache.FOLDER
    assert stat.S_IMODE(plans.stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in files(folder)} == {0o600}
    sizes = [path.stat().st_size for path in files(folder)]
    monkeypatch.setattr(plan_cache, "MAX_FOLDER_BYTES", sum(sizes))
    plan_cache.PlanCache(plans).keep("new", bytes(10))
    assert len(files(folder)) == 2
    plans.chmod(0o777)
    with pytest.raises(CacheError, match="written by everyone"):
        net(plan_cache=folder)


def test_what_is_no_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="plan_cache must be a folder"):
        net(plan_cache=3)
    with pytest.raises(UsageError, match="leave fullgraph= or it out"):
        net(plan_cache=tmp_path, fullgraph=False)


def test_a_file_holds_texts(folder: Path) -> None:
    for path in files(folder):
        with pytest.raises(zgraph.errors.RunFileError, match="another model, call, option or version"):
            load_kept(path.read_bytes(), "another key")
        key = resigned_key(path.read_bytes())
        assert load_kept(path.read_bytes(), key).name == path.name


def resigned_key(held: bytes) -> str:
    found: list[str] = []
    resigned(held, lambda kept: (found.append(kept.reuse.key), kept)[1])
    return found[0]


def test_the_environment_says_where_plans_lie(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for text, wanted in (("", None), ("0", None), ("1", tmp_path / "zgraph"), (str(tmp_path), tmp_path)):
        monkeypatch.setenv("ZGRAPH_PLAN_CACHE", text)
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        found = plan_cache.plan_cache(None)
        assert (found and found.folder) == (wanted and wanted / plan_cache.FOLDER)
    assert plan_cache.plan_cache(False) is None
