"""Every generated kernel against its steps in float64, on operands that are aligned and on some that are not.

What a kernel is to write is NaN before. The kernels are those of `tests/kernels`: written by hand, captured from small
models and from a layer of Llama-3 8B; matmuls with their epilogues, rotary embeddings, and updates in place.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

sys.path.append(str(Path(__file__).parents[2] / "tests"))  # the models there import each other so

from benchmarks.lease.results import Emit
from tests.kernels.captured import of_llama_8b, of_small_models
from tests.kernels.specs import EPILOGUES, SPECS, UPDATES, epilogue
from zgraph.bridge.aten import TO_TORCH
from zgraph.codegen import kernels, matmul, reference, rotary
from zgraph.codegen.fallback import failures_raised
from zgraph.codegen.philox import uniform
from zgraph.codegen.spec import ACC, KernelSpec, Operand
from zgraph.ir import DType

LIMIT = {"f64": 1e-5, "f32": 1e-5, "f16": 1e-3, "bf16": 1e-2}
"""Error over the norm of what is wanted, by the dtype of what is written."""

FLOOR = 1e-2
"""Numbers below this count as if they were as large."""

NUM_THREADS = 16
LAST_S = 5.0
"""Kernels are not begun later than so many seconds before the end."""


@dataclass(frozen=True)
class Sizes:
    """Sizes that kernels are tried at.

    Args:
        columns: of kernels written by hand.
        rows: of all kernels, each with whether operands are aligned to 16 bytes.
        inner: of a matmul.
        dtypes: of operands.
    """

    columns: tuple[int, ...]
    rows: tuple[tuple[int, bool], ...]
    inner: int
    dtypes: tuple[str, ...]


LARGE = Sizes((4096, 16_384), ((1, True), (127, False), (4096, True)), 1000, ("bf16", "f32"))
SMALL = Sizes((40,), ((5, False),), 19, ("f32",))

Check = Callable[[], float]
"""The error of a kernel over what it may be."""


def run(emit: Emit, small: bool) -> None:
    """Each kernel is one result."""
    is_interpreted = os.environ.get("TRITON_INTERPRET") == "1"  # which is made for one thread
    left_out: list[str] = []

    def tried(name: str, check: Check) -> None:
        if emit.left_s < LAST_S:
            left_out.append(name)
            return
        with emit.trying(name), failures_raised():
            error = check()
            emit(name, error, "of the limit", ok=error <= 1)

    with poisoned(), ThreadPoolExecutor(1 if is_interpreted else NUM_THREADS) as pool:
        wanted = ((n, check) for n, check in checks(SMALL if small else LARGE, small) if n not in emit.done)
        futures = [pool.submit(tried, name, check) for name, check in wanted]  # they begin while others are captured
        for future in futures:
            future.result()
    emit("kernels", len(futures) - len(left_out), "tried", left_out=len(left_out))


def checks(sizes: Sizes, small: bool) -> Iterator[tuple[str, Check]]:
    """All kernels by name: those of most models first."""
    yield "random numbers", partial(_random, 1000 if small else 1 << 20)
    for name in EPILOGUES:
        for dtype in sizes.dtypes:
            yield f"matmul, {name} {dtype}", partial(_matmuls, epilogue(name, sizes.inner, dtype), sizes)
    for head, turned in ((16, 8),) if small else ((128, 128), (64, 64), (128, 32)):
        for back in (False, True):
            yield f"rotary {turned} of {head}{', back' * back}", partial(_rotary, head, turned, back)
    for name, make in SPECS.items():
        for columns in sizes.columns:
            for dtype in sizes.dtypes:
                spec = make(columns, dtype)
                yield f"{name} {columns} {dtype}", partial(_rows, spec, sizes.rows)
    captured = {} if small else {"Llama-3 8B": of_llama_8b(), "small models": of_small_models()}
    for model, specs in captured.items():
        for number, spec in enumerate(specs.values()):
            check = _matmuls if spec.is_epilogue else _captured
            yield f"{model}, {number}: {spec.name} {spec.columns}", partial(check, spec, sizes)


@contextmanager
def poisoned() -> Iterator[None]:
    """Context in which what kernels are to write is NaN before."""

    def filled(made: Any) -> Any:
        for tensor in [made] if isinstance(made, Tensor) else made:
            if tensor.is_floating_point():
                tensor.fill_(float("nan"))
        return made

    with ExitStack() as stack:
        for module in (kernels, matmul, rotary):
            empty = module.empty
            stack.enter_context(patch.object(module, "empty", lambda *given, empty=empty: filled(empty(*given))))
        yield


# --- checks ----------------------------------------------------------------------------------------------------------


def _rows(spec: KernelSpec, rows: Sequence[tuple[int, bool]]) -> float:
    """The largest error at all numbers of rows."""
    return max(_one(spec, count if spec.columns < 10_000 else min(count, 512), aligned) for count, aligned in rows)


def _captured(spec: KernelSpec, sizes: Sizes) -> float:
    return _one(spec, 127, False) if spec.columns < 50_000 else _one(spec, 5, False)


def _one(spec: KernelSpec, num_rows: int, aligned: bool) -> float:
    dice = torch.Generator().manual_seed(num_rows)
    inputs = [_operand(operand, spec, num_rows, dice, aligned) for operand in spec.inputs]
    wanted = reference.run(spec, inputs, num_rows, torch.float64)
    made = kernels.launch(spec, inputs, num_rows)
    found = _error(spec, made, wanted)
    if spec.name in UPDATES:  # parameter and states are written over; gradients are not
        kept = {o.name: t for o, t in zip(spec.inputs, inputs, strict=True)}
        out = [kept.get(o.name[:-1], made[i]) for i, o in enumerate(spec.outputs)]
        found = max(found, _error(spec, kernels.launch(spec, inputs, num_rows, out), wanted))
    return found


def _operand(operand: Operand, spec: KernelSpec, num_rows: int, dice: torch.Generator, aligned: bool) -> Tensor:
    """Random numbers away from zero, as some are roots and quotients; in memory that is aligned or not."""
    dtype = TO_TORCH[operand.dtype]
    if operand.dtype is DType.i64:
        return torch.tensor(12_345, device="cuda")
    drawn = torch.rand(operand.extent.shape((num_rows,), spec.columns), generator=dice) + 0.1
    return _placed(drawn > 0.5 if dtype is torch.bool else drawn.to(dtype), aligned)


def _placed(tensor: Tensor, aligned: bool) -> Tensor:
    """A copy on the device."""
    if aligned:
        return tensor.to("cuda")
    memory = torch.empty(tensor.numel() + 1, dtype=tensor.dtype, device="cuda")
    return memory[1:].view(tensor.shape).copy_(tensor)


def _matmuls(spec: KernelSpec, sizes: Sizes) -> float:
    """At all numbers of rows, with each operand as it is and turned."""
    dtypes = {o.dtype for o in (*spec.inputs, *spec.outputs) if o.name != ACC}
    dtype = torch.bfloat16 if DType.bf16 in dtypes else torch.float32
    found = 0.0
    for number, (num_rows, aligned) in enumerate(sizes.rows):
        dice = torch.Generator().manual_seed(num_rows)
        count = num_rows if spec.columns < 10_000 else min(num_rows, 127)
        shapes = (
            ((sizes.inner, count), (sizes.inner, spec.columns))
            if number % 2
            else (
                (count, sizes.inner),
                (spec.columns, sizes.inner),
            )
        )
        a, b = (_placed(torch.randn(shape, generator=dice).to(dtype), aligned) for shape in shapes)
        a, b = (a.t(), b) if number % 2 else (a, b.t())
        inputs = [_operand(o, spec, count, dice, aligned) for o in spec.inputs if o.name != ACC]
        wanted = reference.run(spec, [a.double() @ b.double(), *inputs], count, torch.float64)
        found = max(found, _error(spec, matmul.launch(spec, a, b, inputs), wanted))
    return found


def _rotary(head: int, turned: int, back: bool) -> float:
    """Of heads as they come from a projection, to heads as attention takes them."""
    dice = torch.Generator().manual_seed(head)
    found = 0.0
    for dtype, limit in ((torch.float32, LIMIT["f32"]), (torch.bfloat16, LIMIT["bf16"])):
        x = torch.randn(2, 33, 3, head, generator=dice).to(dtype).to("cuda").transpose(1, 2)
        cos, sin = (torch.randn(1, 1, 33, turned, generator=dice).to(dtype).to("cuda") for _ in range(2))
        for order in ((0, 1, 2, 3), (0, 2, 1, 3)):
            wanted = rotary.run_reference(x.double(), cos.double(), sin.double(), order, back)
            made = rotary.launch(x, cos, sin, order, back)
            found = max(found, _distance(made, wanted) / limit)
    return found


def _random(numel: int) -> float:
    """The numbers that a kernel draws are those of the processor, to the last bit."""
    spec = KernelSpec.parse(
        f"draw {numel}: x f32[M,N], s i64[] -> u f32[M,N]; r = random(s); z = mul(x, 0.0); u = add(r, z)"
    )
    seed = torch.tensor(12_345)
    (made,) = kernels.launch(spec, [torch.ones(3, numel, device="cuda"), seed.to("cuda")], 3)
    return 0.0 if torch.equal(made.cpu().flatten(), uniform(seed, 3 * numel)) else float("inf")


def _error(spec: KernelSpec, made: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    """The largest error of an output over what it may be. NaN, which is left where nothing is written, is too large."""
    least = max(LIMIT[o.dtype.value] for o in spec.outputs if o.dtype.value in LIMIT)
    return max(_distance(a, b) for a, b in zip(made, wanted, strict=True)) / least


def _distance(made: Tensor, wanted: Tensor) -> float:
    exact = wanted.double()
    scale = exact.norm().clamp(min=FLOOR * max(exact.numel(), 1) ** 0.5)
    found = float((made.double().view(exact.shape) - exact).norm() / scale)
    return found if found == found else float("inf")
