"""Regions as libraries of C++: the numbers of Inductor's own code, what is left to that, and what is kept of them."""

import shutil
from collections.abc import Callable, Sequence
from contextvars import copy_context
from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import zgraph
from tests.deep import deep
from zgraph.bridge import private_aot, private_inductor
from zgraph.bridge.private_inductor import Example, Lowered
from zgraph.compiler import recordings
from zgraph.errors import CacheError, UsageError
from zgraph.options import validate
from zgraph.passes import Context
from zgraph.runtime import libraries, regions
from zgraph.runtime.libraries import Libraries

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor needs a C++ compiler")

aten: Any = torch.ops.aten


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def refuses() -> Any:
    raise AssertionError("nothing else was to be compiled")


def made(function: Callable[..., Any], inputs: Sequence[torch.Tensor], of: Libraries, otherwise: Any = refuses) -> Any:
    return of.begin(function, [*map(Example.of, inputs)], copy_context(), otherwise)()


def everything(x: torch.Tensor, w: torch.Tensor, y: torch.Tensor) -> list[torch.Tensor]:
    """Products, reductions, and results that are views of inputs, of one another, and inputs themselves."""
    hidden = torch.tanh(aten.mm(x, w)) * y.t()
    normed = torch.softmax(hidden - hidden.mean(-1, keepdim=True), -1)
    return [normed, normed.t(), w.t(), x, hidden[1:, ::2], y.bfloat16(), normed.argmax(-1), normed.view(-1)]


INPUTS = [torch.randn(6, 8), torch.randn(8, 4), torch.randn(4, 6)[:, ::1]]


@needs_compiler
def test_numbers_and_memory_are_those_of_inductors_own_code():
    """Bit for bit, with the same strides and views; a second library of the same is loaded from what is kept."""
    first, again = Libraries(), Libraries()
    wanted = private_inductor.inductor(everything, INPUTS)([*INPUTS])
    for of in (first, again):
        given = [*INPUTS]
        found = made(everything, INPUTS, of)(given)
        assert given == []  # inputs die within the call
        for one, other in zip(found, wanted, strict=True):
            assert torch.equal(one, other)
            assert (one.dtype, one.stride(), one.storage_offset()) == (
                other.dtype,
                other.stride(),
                other.storage_offset(),
            )
        bases = [[t.untyped_storage().data_ptr() for t in results] for results in (found, wanted)]
        shared = [
            [[a == b for b in (*own, *(i.untyped_storage().data_ptr() for i in INPUTS))] for a in own] for own in bases
        ]
        assert shared[0] == shared[1]
    assert (first.num_built, first.num_kept) == (1, 0)
    assert (again.num_built, again.num_kept) == (0, 1)
    assert str(again) == "1 as libraries of C++, 1 of them kept from before"


# --- what cannot be a library ----------------------------------------------------------------------------------------


class Fake:
    """In the place of a region that can be built: the package is its text."""

    built: list[str]
    may_keep = True

    def __init__(self, function: Any, examples: Any) -> None:
        self.function, self.text = function, f"text of {function.__name__}"

    def build(self) -> Callable[[], bytes]:
        Fake.built.append(self.text)
        return lambda: self.text.encode()


@pytest.fixture
def packages(monkeypatch) -> list[bytes]:
    """The packages that are loaded; none is built by a compiler."""
    found: list[bytes] = []

    def loaded(package: bytes) -> Any:
        found.append(package)
        return lambda args: [package]

    Fake.built = []
    monkeypatch.setattr(private_aot, "Region", Fake)
    monkeypatch.setattr(private_aot, "loaded", loaded)
    return found


def one(x: torch.Tensor) -> list[torch.Tensor]:
    return [x + 1]


def two(x: torch.Tensor) -> list[torch.Tensor]:
    return [x + 2]


@pytest.mark.parametrize(
    ("method", "error", "words"),
    [
        ("__init__", private_aot.Unsupported("it holds values"), "it holds values"),
        ("build", RuntimeError("C++ compile error\n  at 3:1"), "C\\+\\+ compile error at 3:1"),
    ],
)
def test_what_cannot_be_built_is_called_by_inductors_own_code(packages, monkeypatch, method, error, words):
    """And told in one line, once for each reason."""

    def fails(*_: Any) -> None:
        raise error

    monkeypatch.setattr(Fake, method, fails)
    of = Libraries()
    other = lambda: lambda: "other"  # noqa: E731 - begins, then waits
    with pytest.warns(UserWarning, match=words) as told:
        assert [made(f, [torch.ones(2)], of, other) for f in (one, two)] == ["other", "other"]
    assert len(told) == 1
    assert "\n" not in str(told[0].message)
    assert f"2 called by Inductor's own code: {type(error).__name__}" in str(of)


def test_a_compiler_that_fails_is_no_error(packages, monkeypatch):
    def fails() -> bytes:
        raise RuntimeError("g++: not found")

    monkeypatch.setattr(Fake, "build", lambda self: fails)
    of = Libraries()
    with pytest.warns(UserWarning, match="g\\+\\+: not found"):
        assert made(one, [torch.ones(2)], of, lambda: lambda: "other") == "other"
    assert (of.num_built, packages) == (0, [])


def test_no_memory_to_lower_is_no_memory(packages, monkeypatch):
    def full(self: Any) -> None:
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(Fake, "build", full)
    with pytest.raises(torch.OutOfMemoryError):
        made(one, [torch.ones(2)], Libraries())


# --- what is kept ----------------------------------------------------------------------------------------------------


def keep_one() -> Any:
    """A kept library, as a path."""
    made(one, [torch.ones(2)], Libraries())
    (path,) = libraries.folder().iterdir()
    return path


def used_again(packages: list[bytes]) -> bool:
    """Whether the next run takes what is kept, or builds it anew; what it loads is right in any case."""
    of = Libraries()
    made(one, [torch.ones(2)], of)
    assert packages[-1] == b"text of one"
    assert of.num_built + of.num_kept == 1
    return bool(of.num_kept)


def test_what_cannot_be_kept_runs_all_the_same(packages, monkeypatch):
    def full(*_: Any) -> None:
        raise CacheError("no space left; make room")

    monkeypatch.setattr(libraries, "write_sealed", full)
    with pytest.warns(UserWarning, match=r"not kept: .*no space left; make room"):
        assert made(one, [torch.ones(2)], Libraries())([]) == [b"text of one"]


def test_nothing_is_kept_with_passes_of_the_users(packages, monkeypatch):
    monkeypatch.setattr(Fake, "may_keep", False)
    made(one, [torch.ones(2)], Libraries())
    assert not [*libraries.folder().iterdir()]


def test_the_key_of_a_library_has_all_that_it_depends_on(monkeypatch):
    inductor: Any = torch._inductor.config
    found = []

    def region() -> private_aot.Region:
        found.append(private_aot.Region(one, [Example.of(torch.ones(2))]))
        return found[-1]

    assert region().may_keep
    with inductor.patch(post_grad_custom_post_pass=lambda graph: None):
        assert not region().may_keep
    assert found[0].text == found[1].text
    for setting, value, default in (
        (torch.use_deterministic_algorithms, True, False),
        (torch.set_default_dtype, torch.float64, torch.float32),
    ):
        setting(value)
        try:
            region()
        finally:
            setting(default)
    monkeypatch.setattr(private_aot, "processor", lambda: "another")
    region()
    assert len({region.text for region in found}) == 4


def test_what_is_kept_is_used(packages):
    path = keep_one()
    assert path.stat().st_mode & 0o777 == 0o600
    assert libraries.folder().stat().st_mode & 0o777 == 0o700
    assert used_again(packages)
    assert Fake.built == ["text of one"]


@pytest.mark.parametrize("at", ["digest", "text", "library", "end", "nothing"])
def test_a_file_that_is_changed_is_made_anew(packages, at):
    path = keep_one()
    held = bytearray(path.read_bytes())
    place = {"digest": 0, "text": held.index(b"text of one"), "library": len(held) - 3}.get(at)
    if place is not None:
        held[place] ^= 1
    path.write_bytes({"end": held[:-1], "nothing": b""}.get(at, bytes(held)))
    assert not used_again(packages)
    assert used_again(packages)


def test_a_whole_file_of_another_text_is_not_used(packages):
    """Whoever moves files about, or finds two texts of one digest, changes nothing."""
    path = keep_one()
    made(two, [torch.ones(2)], Libraries())
    libraries.path_of("text of two").replace(path)
    assert not used_again(packages)


def test_a_link_is_not_followed(packages, tmp_path):
    path = keep_one()
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    assert not used_again(packages)
    assert not path.is_symlink()


@pytest.mark.parametrize("kind", ["a link", "everyone's"])
def test_nothing_is_loaded_from_a_strangers_folder(packages, tmp_path, kind):
    folder = keep_one().parent
    number = len(packages)
    if kind == "a link":
        folder.rename(tmp_path / "elsewhere")
        folder.symlink_to(tmp_path / "elsewhere")
    else:
        folder.chmod(0o777)
    with pytest.raises(CacheError, match="XDG_CACHE_HOME"):
        made(one, [torch.ones(2)], Libraries())
    assert len(packages) == number


@needs_compiler
def test_a_text_has_all_that_a_library_depends_on():
    """It is the same for the same function, and another for other sizes, ops, settings or numbers of threads."""

    def text(function: Callable[..., Any] = one, size: int = 2) -> str:
        return private_aot.Region(function, [Example.of(torch.ones(size))]).text

    own = text()
    assert text() == own
    config: Any = torch._inductor.config
    with config.patch({"cpp.simdlen": 256}):
        assert text() != own
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    assert text() != own
    torch.set_num_threads(threads)
    assert own not in (text(two), text(size=3))
    assert " at 0x" not in own


# --- training and inference ------------------------------------------------------------------------------------------


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + nn.functional.gelu(layer(x))
        return x.square().mean()


def losses(**options: Any) -> tuple[list[float], str]:
    torch.compiler.reset()
    torch.manual_seed(0)
    model: Any = zgraph.compile(Net(), kernels="inductor", **options)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    found = []
    for step in range(2):
        loss = model(torch.randn(4, 8, generator=torch.Generator().manual_seed(step)))
        loss.backward()
        found.append(float(loss.detach()))
        optimizer.step()
        optimizer.zero_grad()
    return found, str(zgraph.report(model).regions)


@needs_compiler
@pytest.mark.skipif(bool(private_aot.libraries_problem()), reason="torch 2.13 makes libraries")
@pytest.mark.parametrize("regions", [deep("c++"), deep("auto")])
def test_training_by_libraries_is_that_without(regions):
    own, without = losses()
    found, said = losses(regions=regions)
    again, kept = losses(regions=regions)
    assert found == again == own
    assert "as libraries of C++" in said
    assert "kept from before" in kept
    assert "libraries" not in without


@cache
def plain() -> list[float]:
    """Losses of regions that run op by op, in Inductor's place."""
    return losses()[0]


@pytest.fixture
def in_steps(monkeypatch):
    """Regions that run op by op, as libraries and otherwise."""

    class Stepped(Fake):
        count = 0

        def build(self) -> Callable[[], bytes]:
            Stepped.count += 1
            self.text = f"{Stepped.count}"
            functions[self.text.encode()] = self.function
            return lambda: self.text.encode()

    functions: dict[bytes, Any] = {}
    Fake.built = []
    for room in (recordings, validate):
        monkeypatch.setattr(room, "libraries_problem", lambda: "")
    monkeypatch.setattr(private_aot, "Region", Stepped)
    monkeypatch.setattr(private_aot, "loaded", lambda package: lambda args: functions[package](*args))
    monkeypatch.setattr(libraries, "kept", lambda text: None)
    monkeypatch.setattr(
        private_inductor,
        "lowered",
        lambda function, examples, *, checks_inputs: Lowered(lambda args: function(*args), lambda: None),
    )


@pytest.mark.parametrize("calls", ["c++", "auto"])
def test_regions_of_a_model_are_libraries(in_steps, calls):
    """A small model is bound by launches."""
    found, said = losses(regions=calls)
    assert found == plain()
    number = said.partition(" regions")[0]
    different = int(said.partition(", ")[2].partition(" of them")[0])
    assert int(number) >= different > 1
    assert f"{different} as libraries of C++" in said


def test_auto_leaves_long_steps_alone(in_steps, monkeypatch):
    from zgraph.cost.launches import Launches

    monkeypatch.setattr(recordings, "launches", lambda *_: Launches(1e3, 1e6))
    found, said = losses(regions="auto")
    assert found == plain()
    assert "no libraries of C++, as by the figures of" in said


def test_an_older_torch_makes_no_libraries(in_steps, monkeypatch):
    for room in (recordings, validate):
        monkeypatch.setattr(room, "libraries_problem", lambda: "this torch is old")
    with pytest.raises(UsageError, match="this torch is old; install torch 2"):
        zgraph.compile(Net(), kernels="inductor", regions="c++")
    assert "no libraries of C++, as this torch is old" in losses(regions="auto")[1]


def test_auto_makes_no_libraries_on_a_gpu():
    of = regions.Regions()
    plan: Any = SimpleNamespace(graph=SimpleNamespace(name="step"))
    recordings.choose_calls(of, plan, Context(), "auto", torch.device("cuda:0"))
    assert (of.makes_libraries, of.libraries) == (False, None)


def test_sizes_that_change_are_left_to_inductor(in_steps, monkeypatch):
    monkeypatch.setattr(regions, "_examples", lambda region, session: None)
    found, said = losses(regions="c++")
    assert found == plain()
    assert "0 as libraries of C++; " in said
    assert "called by Inductor's own code: sizes that change from call to call" in said


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"regions": "fast"}, '"python", "c\\+\\+" or "auto"'),
        ({"regions": "c++"}, 'kernels="aten" there are none; pass kernels="inductor"'),
        ({"regions": "c++", "kernels": "triton"}, 'kernels="inductor"'),
    ],
)
def test_options_that_mean_nothing(options, words):
    with pytest.raises(UsageError, match=words):
        zgraph.compile(nn.Linear(4, 4), **options)
