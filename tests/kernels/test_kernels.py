"""Generated kernels, in Triton's interpreter, against their steps in float64: of rows held whole, and looped over."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.deep import DEEP
from zgraph.bridge.aten import TO_TORCH
from zgraph.codegen import kernels, reference
from zgraph.codegen.emit import source
from zgraph.codegen.philox import uniform
from zgraph.codegen.spec import KernelSpec
from zgraph.ir import DType

from .captured import of_small_models
from .specs import SPECS
from .strategies import kernels as any_kernel

TOLERANCE = {"f32": 1e-5, "bf16": 1e-2, "f16": 1e-3}


@pytest.fixture(autouse=True, scope="module")
def _poisoned(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Fills what `torch.empty` makes with NaN, so that what a kernel does not write is seen."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        empty = torch.empty
        patched.setattr(torch, "empty", lambda *sizes, **options: poisoned(empty(*sizes, **options)))
        yield


def poisoned(made: torch.Tensor) -> torch.Tensor:
    return made.fill_(float("nan")) if made.is_floating_point() else made


@contextmanager
def looped(block_m: int = 2, block_n: int = 16) -> Iterator[None]:
    """All rows are too long for a program to hold, and few programs sum over many."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("zgraph.codegen.spec.MAX_WHOLE_COLUMNS", 0)
        patched.setattr(kernels, "LOOPED", kernels.Tiles(block_m, block_n, 1))
        patched.setattr(kernels, "LOOPED_SUMS", kernels.Tiles(block_m, block_n, 1))
        patched.setattr(kernels, "MAX_PROGRAMS", 2)
        kernels.load.cache_clear()
        yield
    kernels.load.cache_clear()


def operands(spec: KernelSpec, num_rows: int, seed: int) -> list[torch.Tensor]:
    """Random operands; positive where a root or a quotient needs it."""
    dice = torch.Generator().manual_seed(seed)
    found = []
    for operand in spec.inputs:
        shape = operand.extent.shape((num_rows,), spec.columns)
        drawn = torch.tensor(seed) if operand.dtype is DType.i64 else torch.randn(shape, generator=dice)
        found.append((drawn.abs() + 0.1 if operand.name in ("v", "r", "fix") else drawn).to(TO_TORCH[operand.dtype]))
    return found


def is_close(got: torch.Tensor, wanted: torch.Tensor, limit: float) -> bool:
    """By the size of what is wanted, or of 1 where that is smaller."""
    return float((got.double() - wanted).norm()) <= limit * max(float(wanted.norm()), wanted.numel() ** 0.5)


def cuts(spec: KernelSpec) -> list[Callable[[], AbstractContextManager[None]]]:
    """How the kernel may be cut."""
    return [nullcontext, looped] if spec.needs_whole_rows else [nullcontext]


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@given(num_rows=st.integers(0, 9), columns=st.integers(1, 70), seed=st.integers(0, 99))
@settings(max_examples=8, deadline=None)
def test_a_kernel_is_its_steps(name, dtype, num_rows, columns, seed):
    spec = SPECS[name](columns, dtype)
    inputs = operands(spec, num_rows, seed)
    wanted = reference.run(spec, inputs, num_rows, torch.float64)
    plain = reference.run(spec, inputs, num_rows)
    for cut in cuts(spec):
        with cut():
            made = kernels.launch(spec, inputs, num_rows)
        for output, got, same, exact in zip(spec.outputs, made, plain, wanted, strict=True):
            limit = max(TOLERANCE[dtype], TOLERANCE[output.dtype.value])
            assert got.shape == exact.shape
            assert got.dtype == same.dtype == TO_TORCH[output.dtype]
            assert is_close(got, exact, limit)
            assert is_close(same, exact, limit)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, beyond the rows that count
@given(spec=any_kernel(), num_rows=st.integers(0, 9), block_m=st.sampled_from((1, 4)), seed=st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_any_kernel_is_its_steps(spec, num_rows, block_m, seed):
    inputs = operands(spec, num_rows, seed)
    wanted = reference.run(spec, inputs, num_rows, torch.float64)
    whole = kernels.launch(spec, inputs, num_rows)
    with looped(block_m):
        assert spec.is_looped
        assert "for first in range" in source(spec)
        made = kernels.launch(spec, inputs, num_rows)
    for output, *found, exact in zip(spec.outputs, whole, made, wanted, strict=True):
        for got in found:
            assert is_close(got, exact, TOLERANCE[output.dtype.value]), (output, got, exact)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, beyond the rows that count
def test_the_kernels_of_captured_steps_are_their_steps():
    """In every dtype and with an odd number of rows; operands away from zero, as some are roots and quotients."""
    specs = [s for s in of_small_models().values() if not s.is_epilogue]
    for spec in specs if DEEP else specs[::3]:
        for num_rows in (1, 5) if DEEP else (5,):
            dice = torch.Generator().manual_seed(num_rows)
            inputs = []
            for operand in spec.inputs:
                shape, dtype = operand.extent.shape((num_rows,), spec.columns), TO_TORCH[operand.dtype]
                drawn = torch.rand(shape, generator=dice) + 0.1
                if dtype is torch.int64:
                    inputs.append(torch.tensor(num_rows + 12345))
                    continue
                inputs.append(drawn > 0.5 if dtype is torch.bool else drawn.to(dtype))
            wanted = reference.run(spec, inputs, num_rows, torch.float64)
            made = kernels.launch(spec, inputs, num_rows)
            for output, got, exact in zip(spec.outputs, made, wanted, strict=True):
                scale = max(float(exact.norm()), 1e-2 * exact.numel() ** 0.5)
                assert float((got.double() - exact).norm()) < max(TOLERANCE[output.dtype.value], 1e-5) * scale, str(
                    spec
                )


@given(seed=st.integers(0, 2**31 - 1), num_rows=st.integers(1, 9), columns=st.integers(1, 70))
@settings(max_examples=20, deadline=None)
def test_random_numbers_are_those_of_the_twin_to_the_last_bit(seed, num_rows, columns):
    spec = KernelSpec.parse(
        f"draw {columns}: x f32[M,N], s i64[] -> u f32[M,N], t f32[M,1]; "
        "r = random(s); z = mul(x, 0.0); u = add(r, z); t = row_max(u)"
    )
    inputs = [torch.ones(num_rows, columns), torch.tensor(seed)]
    plain = reference.run(spec, inputs, num_rows)
    for cut in cuts(spec):
        with cut():
            made = kernels.launch(spec, inputs, num_rows)
        assert all(map(torch.equal, made, plain))
    assert torch.equal(plain[0].flatten(), uniform(torch.tensor(seed), num_rows * columns))


def test_random_numbers_are_uniform_and_differ_by_seed():
    one, other = uniform(torch.tensor(1), 100_000), uniform(torch.tensor(2), 100_000)
    assert float(one.min()) >= 0
    assert float(one.max()) < 1
    assert float(one.mean()) == pytest.approx(0.5, abs=0.005)
    assert float(one.var()) == pytest.approx(1 / 12, rel=0.02)
    assert abs(float(torch.corrcoef(torch.stack([one, other]))[0, 1])) < 0.02
    assert abs(float(torch.corrcoef(torch.stack([one[1:], one[:-1]]))[0, 1])) < 0.02


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("columns", [48, 16_384])
def test_the_source_can_be_read(name, columns, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    kernels.load.cache_clear()
    kernels.load(SPECS[name](columns))
    (path,) = kernels.folder().iterdir()
    text = path.read_text()
    assert f"def {name}(" in text
    assert max(map(len, text.splitlines())) < 160
    kernels.load.cache_clear()


def test_what_the_twin_writes_is_memory_of_its_own():
    spec = KernelSpec.parse("same 8: x f32[M,N] -> x f32[M,N], y f32[M,N], z f32[M,N]; y = copy(x); z = copy(y)")
    x = torch.ones(3, 8)
    assert len({t.data_ptr() for t in (x, *reference.run(spec, [x], 3))}) == 4
