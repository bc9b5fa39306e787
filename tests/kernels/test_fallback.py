"""Kernels that do not run: their references do, once told; and where kernels are started."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import nn

import zgraph
from zgraph.bridge.aten import TO_TORCH
from zgraph.codegen import fallback, kernels, library, matmul, reference, rotary
from zgraph.codegen.fallback import failures_raised, has_failed
from zgraph.codegen.rotary import Rotary
from zgraph.codegen.spec import KernelSpec
from zgraph.errors import KernelError
from zgraph.optim import AdamW

from .specs import SPECS


class OutOfResources(Exception):
    """As Triton's."""


@pytest.fixture(autouse=True)
def _as_for_users(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(fallback, "_failed", set())
    with failures_raised(False):
        yield


def broken(spec: object) -> Callable[..., None]:
    """A kernel that needs more than the GPU has."""

    class Kernel:
        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            raise OutOfResources("out of resource: shared memory, Required: 294912, Hardware limit: 232448")

    return Kernel()


def rows(text: str = "half 8: x f32[M,N] -> y f32[M,N]; y = mul(x, 0.5)") -> Callable[[], list[torch.Tensor]]:
    spec = KernelSpec.parse(text)
    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    return lambda: kernels.launch(spec, [x], 5)


def product() -> list[torch.Tensor]:
    spec = KernelSpec.parse("mm 8: acc f32[M,N] -> y f32[M,N]; y = neg(acc)")
    dice = torch.Generator().manual_seed(0)
    return matmul.launch(spec, torch.randn(5, 4, generator=dice), torch.randn(4, 8, generator=dice), [])


def turned() -> list[torch.Tensor]:
    x, cos, sin = torch.randn(3, 2, 3, 4, 8, generator=torch.Generator().manual_seed(0)).unbind()
    return [rotary.launch(x, cos, sin, [0, 1, 2, 3], False)]


@pytest.mark.parametrize(("module", "run"), [(kernels, rows()), (matmul, product), (rotary, turned)])
def test_a_kernel_that_does_not_run_is_told_once_and_its_reference_runs(module, run, monkeypatch):
    wanted = run()
    monkeypatch.setattr(module, "load", broken)
    with pytest.warns(UserWarning, match=r"OutOfResources: out of resource.*kernels=\"aten\"") as told:
        made = run()
    assert len(told) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = run()
    for results in (made, again):
        torch.testing.assert_close(results, wanted)


def test_what_inductor_cannot_compile_is_computed_by_the_reference(monkeypatch):
    def refuse(*_: object) -> None:
        raise RuntimeError("CppCompileError")

    monkeypatch.setattr(library.private_inductor, "lowered", refuse)
    x = torch.randn(3, 12)
    with pytest.warns(UserWarning, match="CppCompileError"):
        (made,) = torch.ops.zgraph.compiled([x], "third 12: x f32[M,N] -> y f32[M,N]; y = mul(x, 0.3)")
    torch.testing.assert_close(made, x * 0.3)


def test_whoever_measures_is_given_the_error(monkeypatch):
    monkeypatch.setattr(kernels, "load", broken)
    for _ in range(2):
        with failures_raised(), pytest.raises(OutOfResources):
            rows()()


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), KernelError("no such thing")])
def test_no_memory_and_no_sense_are_errors(error, monkeypatch):
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(kernels, "load", fail)
    with pytest.raises(type(error)):
        rows()()
    assert not fallback._failed


def test_an_error_of_the_device_reaches_the_user(monkeypatch):
    """After an illegal access every op fails: the reference does too."""

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(kernels, "load", broken)
    monkeypatch.setattr(reference, "run", fail)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        rows()()
    assert not fallback._failed


@contextmanager
def failing(monkeypatch: pytest.MonkeyPatch, columns: tuple[int, ...]) -> Iterator[None]:
    """Kernels with so many columns do not run."""
    load = kernels.load
    with monkeypatch.context() as patched:
        patched.setattr(kernels, "load", lambda spec: (broken if spec.columns in columns else load)(spec))
        yield


@pytest.mark.parametrize("columns", [(1024, 1), (1024,), (1,)], ids=str)
def test_an_optimizer_goes_on_without_its_kernel(columns, monkeypatch):
    """Each number is updated once in each step, whichever kernel of a piece fails."""
    found = []
    for breaks in (False, True):
        torch.manual_seed(0)
        parameter = nn.Parameter(torch.randn(3, 1024 + 5))
        optimizer = AdamW([parameter], lr=0.1, kernels="triton")
        with warnings.catch_warnings(record=True) as told, failing(monkeypatch, columns if breaks else ()):
            warnings.simplefilter("always")
            for step in range(3):
                parameter.grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(step))
                optimizer.step()
        assert len(told) == (len(columns) if breaks else 0)
        found.append(parameter.detach())
    torch.testing.assert_close(found[1], found[0])


def test_the_reference_writes_a_few_rows_at_a_time(monkeypatch):
    spec = SPECS["adamw"](4)
    dice = torch.Generator().manual_seed(0)
    tensors = [torch.rand(o.extent.shape((7,), 4), generator=dice) for o in spec.inputs]
    outs = [torch.empty(o.extent.shape((7,), 4), dtype=TO_TORCH[o.dtype]) for o in spec.outputs]
    wanted = reference.run(spec, tensors, 7)
    seen = []
    run = reference.run
    monkeypatch.setattr(reference, "run", lambda spec, given, count: seen.append(count) or run(spec, given, count))
    monkeypatch.setattr(kernels, "REFERENCE_NUMEL", 12)
    made = kernels._by_reference(spec, tensors, 7, outs)
    assert seen == [3, 3, 1]
    torch.testing.assert_close(made, wanted)


def test_a_compiled_model_goes_on_without_its_kernels(monkeypatch):
    """Of a device whose ops are kernels, here in the interpreter."""
    torch.compiler.reset()
    x = torch.randn(4, 16)
    plain = nn.Sequential(nn.Linear(16, 32), nn.LayerNorm(32), nn.GELU())
    wanted = plain(x).sum()
    monkeypatch.setattr(kernels, "load", broken)
    impl = torch.library.Library("zgraph", "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        impl.impl("rows", library._rows(kernels.launch), "CPU", allow_override=True)
    try:
        model = zgraph.compile(plain, kernels="triton")
        with pytest.warns(UserWarning, match="OutOfResources"):
            model(x).sum().backward()
        loss = model(x).sum()
    finally:
        impl._destroy()
    torch.testing.assert_close(loss, wanted)
    assert fallback._failed


class OnGpu:
    """Stands for a tensor on the third GPU."""

    device = torch.device("cuda", 3)


def test_a_kernel_is_started_on_the_device_of_its_operands(monkeypatch):
    current = [0]

    @contextmanager
    def device_of(tensor: OnGpu) -> Iterator[None]:
        current.append(tensor.device.index)
        yield
        current.pop()

    class Kernel:
        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            return lambda *_, **__: seen.append((grid, current[-1]))

    seen: list[tuple[tuple[int, ...], int]] = []
    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[-1])
    kernels.start(Kernel(), (7,), OnGpu(), 5)
    assert seen == [((7,), 3)]
    assert current == [0]
    current[0] = 3
    kernels.start(Kernel(), (7,), OnGpu(), 5)
    assert seen[1:] == [((7,), 3)]


def test_products_are_counted_along_the_first_axis_of_the_grid(monkeypatch):
    """The second one ends at 65,535."""
    seen = []

    class Kernel:
        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            return lambda *_, **__: seen.append(grid)

    monkeypatch.setattr(matmul, "load", lambda spec: Kernel())
    spec = KernelSpec.parse("mm 8: acc f32[M,N] -> y f32[M,N]; y = neg(acc)")
    matmul.launch(spec, torch.empty(70_000, 1, 2), torch.empty(70_000, 2, 8), [])
    assert seen == [(70_000,)]


@pytest.mark.parametrize("columns", [64, 5_000, 60_000_000, 200_000_000, 2_000_000_000])
def test_the_second_axis_of_a_grid_counts_all_columns(columns):
    cut = kernels.tiles(KernelSpec.parse(f"half {columns}: x f32[M,N] -> y f32[M,N]; y = mul(x, 0.5)"))
    assert -(-columns // cut.block_n) <= kernels.MAX_GRID[1]
    assert cut.block_n <= max(1024, 2 * -(-columns // kernels.MAX_GRID[1]))


def test_a_grid_that_no_gpu_counts_is_left_to_the_reference(monkeypatch):
    monkeypatch.setattr(kernels, "MAX_GRID", (4, 65_535))
    monkeypatch.setattr(kernels, "tiles", lambda spec: kernels.Tiles(1, 8, 1))
    with pytest.warns(UserWarning, match="GridError: a grid of 5 x 1 programs"):
        (made,) = rows()()
    assert made.shape == (5, 8)
    assert has_failed(KernelSpec.parse("half 8: x f32[M,N] -> y f32[M,N]; y = mul(x, 0.5)"))
    assert not has_failed(Rotary(4, 8))
