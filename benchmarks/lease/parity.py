"""One rank beside eager torch on the same device: losses, and the peak of memory beside the one that was predicted.

A Llama in fp32 and in bf16, with each kind of kernels, each offload, states of AdamW elsewhere, a memory budget, and
micro-steps without sync.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig

import zgraph
from benchmarks.contenders import LossOnly
from benchmarks.lease.results import Emit
from tests.emulated.nets import WORDS, Attending

RATE = 1e-3
LIMITS = {None: 1e-4, torch.bfloat16: 3e-2}
"""How far losses may be from eager's, relative, by the dtype that is computed in. fp32 keeps to 1e-6 at first; then
updates of parameters whose gradients are nearly zero drift apart."""

PEAK_LIMIT = 1.1
"""The most that the peak of a step may be over the predicted one, which is that of a whole step with torch's AdamW."""

NUM_MICRO_STEPS = 2
BUDGET = 0.6
"""Of the predicted peak without a budget."""

REHEARSED: tuple[str, ...] | None = ("offload parameters bf16", "in a budget")
"""Trainings with small sizes; None has all."""

LAST_S = 8.0
"""Trainings are not begun later than so many seconds before the end."""


@dataclass(frozen=True)
class Sizes:
    """Sizes of the model, and of a micro-batch.

    Args:
        width, num_layers, num_words: of the model.
        batch, tokens: of a micro-batch.
        num_steps: of a training.
        is_llama: else it is a decoder whose attention is spelled out, for a device without kernels of its own.
    """

    width: int
    num_layers: int
    num_words: int
    batch: int
    tokens: int
    num_steps: int
    is_llama: bool = True


LARGE = Sizes(512, 4, 32_000, 2, 512, 12)
SMALL = Sizes(32, 2, WORDS, 2, 16, 3, is_llama=False)


@dataclass(frozen=True)
class Training:
    """How the model is trained.

    Args:
        options: of `zgraph.compile`; None trains eagerly.
        optimizer: options of `zgraph.optim.AdamW`; None takes torch's.
        dropout: of attention.
        has_micro_steps: whether a step has two, the first without sync.
    """

    options: dict[str, Any] | None = None
    optimizer: dict[str, Any] | None = None
    dropout: float = 0.0
    has_micro_steps: bool = False

    @property
    def dtype(self) -> torch.dtype | None:
        return (self.options or {}).get("param_dtype")


@dataclass
class Trained:
    """Losses, and the bytes of the last step.

    Args:
        losses: of each call.
        peak_bytes: the most bytes alive, of what the training itself has.
        predicted_bytes: the same as zgraph said before.
        num_moved: values that were moved to the host.
        num_again: values that were computed again.
    """

    losses: list[float] = field(default_factory=list)
    peak_bytes: int = 0
    predicted_bytes: int = 0
    num_moved: int = 0
    num_again: int = 0


BF16 = {"param_dtype": torch.bfloat16}


def trainings() -> Iterator[tuple[str, Training]]:
    """Those that compile quickly, by name."""
    yield "aten", Training({})
    yield "aten bf16", Training({**BF16})
    for what in ("optimizer", "parameters"):
        yield f"offload {what}", Training({"offload": what})
        yield f"offload {what} bf16", Training({"offload": what, **BF16})
    yield "offload all, recompute", Training({"offload": ("activations", "parameters"), "recompute": True})
    yield "no_sync", Training({}, has_micro_steps=True)
    yield "own AdamW", Training({}, {})
    for state in ("host", "disk"):
        yield f"AdamW's states on the {state}", Training({}, {"state": state})


def tuned(small: bool) -> Iterator[tuple[str, Training]]:
    """Those whose first call compiles kernels. An emulated device runs no code of Inductor's."""
    for kernels in ("triton",) if small else ("inductor", "triton", "auto"):
        optimizer = {"kernels": "triton"} if kernels == "triton" else None
        yield f"{kernels} bf16", Training({"kernels": kernels, **BF16}, optimizer)
        yield kernels, Training({"kernels": kernels}, optimizer)


def run(emit: Emit, small: bool) -> None:
    """Each training is a result, and its peak another."""
    sizes = SMALL if small else LARGE
    wanted = cache(lambda has_micro_steps: trained(Training(has_micro_steps=has_micro_steps), sizes, emit))
    emit("eager", wanted(False).losses[-1], "loss", peak_bytes=wanted(False).peak_bytes)

    def tried(trainings: Iterator[tuple[str, Training]]) -> None:
        for name, training in trainings:
            if _is_wanted(emit, name, small):
                with emit.trying(name):
                    _compare(emit, name, trained(training, sizes, emit), wanted(training.has_micro_steps), training)

    tried(trainings())
    if _is_wanted(emit, "in a budget", small):
        with emit.trying("in a budget"):
            _in_budget(emit, sizes, wanted(False))
    if not small and _is_wanted(emit, "dropout", small):
        with emit.trying("dropout"):
            one, other = (trained(Training({}, dropout=0.1), sizes, emit) for _ in range(2))
            is_same = one.losses == other.losses != wanted(False).losses
            emit("dropout", one.losses[-1], "loss", ok=is_same and all(map(math.isfinite, one.losses)))
    tried(tuned(small))


def _is_wanted(emit: Emit, name: str, small: bool) -> bool:
    """Whether a training is to run, and there is time for it."""
    if name in emit.done or (small and REHEARSED is not None and name not in REHEARSED):
        return False
    if emit.left_s > LAST_S:
        return True
    emit(name, note="left out: the time is over")
    return False


def _in_budget(emit: Emit, sizes: Sizes, wanted: Trained) -> None:
    """In a part of what the same training takes without a budget, whatever that needs to be moved or computed again."""
    at_first = trained(Training({"recompute": False}), sizes, emit)
    budget = int(BUDGET * (at_first.predicted_bytes - _static(sizes)) + _static(sizes))
    found = trained(Training({"memory_budget": budget}), sizes, emit)
    _compare(emit, "in a budget", found, wanted, Training({}), budget_bytes=budget)
    emit("in a budget, obeyed", found.peak_bytes / budget, "of it", ok=found.peak_bytes <= PEAK_LIMIT * budget)


def _static(sizes: Sizes) -> int:
    """Bytes of parameters and AdamW's moments, which are there all the time, and of gradients."""
    with torch.device("meta"):
        return 4 * 4 * sum(p.numel() for p in _model(sizes, 0.0).parameters())


def _compare(emit: Emit, name: str, found: Trained, wanted: Trained, training: Training, **more: Any) -> None:
    pairs = zip(found.losses, wanted.losses, strict=True)
    distance = max(abs(a - b) / abs(b) if math.isfinite(a) else math.inf for a, b in pairs)
    first = abs(found.losses[0] - wanted.losses[0]) / abs(wanted.losses[0])
    counts = {"first": first, "moved": found.num_moved, "again": found.num_again, "loss": found.losses[-1]}
    emit(name, distance, "of eager's loss", ok=distance <= LIMITS[training.dtype], **counts, **more)
    ratio = found.peak_bytes / found.predicted_bytes
    is_promised = training.optimizer is None and not training.has_micro_steps
    emit(
        f"{name}, peak",
        ratio,
        "of the predicted",
        ok=ratio <= PEAK_LIMIT if is_promised else None,
        peak_bytes=found.peak_bytes,
        predicted_bytes=found.predicted_bytes,
    )


# --- training --------------------------------------------------------------------------------------------------------


def trained(training: Training, sizes: Sizes, emit: Emit) -> Trained:
    """Train from the same numbers as always."""
    torch.compiler.reset()
    gc.collect()
    torch.cuda.empty_cache()
    getattr(torch._C, "_cuda_clearCublasWorkspaces", lambda: None)()  # which the prediction counts
    before = torch.cuda.memory_allocated()
    found = Trained()
    torch.manual_seed(0)
    model: Any = _model(sizes, training.dropout).to("cuda")
    if training.options is not None:
        model = zgraph.compile(model, **{"kernels": "aten", **training.options})
    optimizer = _optimizer(training, model, emit)
    num_micro = NUM_MICRO_STEPS if training.has_micro_steps else 1
    losses: list[Tensor] = []
    for step in range(sizes.num_steps):
        torch.manual_seed(step)
        if step + 1 == sizes.num_steps:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        for micro in range(num_micro):
            ids = _ids(sizes, 100 * step + micro)
            with _unsynced(training, model, micro + 1 < num_micro):
                loss = model(ids) / num_micro
                loss.backward()
                losses.append(loss.detach())
                del loss
        optimizer.step()
        optimizer.zero_grad()
    torch.cuda.synchronize()
    found.peak_bytes = torch.cuda.max_memory_allocated() - before
    found.losses = [float(loss) for loss in losses]
    if training.options is not None:
        report = zgraph.report(model)
        nodes = [node for entry in report.entries for node in entry.plan.graph.nodes]
        found.predicted_bytes = report.peak_bytes
        found.num_moved = sum(node.op == "offload_start" for node in nodes)
        found.num_again = sum("recompute" in node.origin.made_by for node in nodes)
    return found


def _model(sizes: Sizes, dropout: float) -> nn.Module:
    """A model whose result is its loss."""
    if not sizes.is_llama:
        return Attending(sizes.width, sizes.num_layers)
    config = LlamaConfig(
        hidden_size=sizes.width,
        intermediate_size=3 * sizes.width,
        num_hidden_layers=sizes.num_layers,
        num_attention_heads=max(sizes.width // 64, 4),
        num_key_value_heads=2,
        vocab_size=sizes.num_words,
        max_position_embeddings=sizes.tokens,
        use_cache=False,
        attention_dropout=dropout,
        bos_token_id=None,
        eos_token_id=None,
    )
    return LossOnly(config).train()


def _ids(sizes: Sizes, seed: int) -> Tensor:
    dice = torch.Generator().manual_seed(seed)
    return torch.randint(sizes.num_words, (sizes.batch, sizes.tokens), generator=dice).to("cuda")


def _unsynced(training: Training, model: Any, applies: bool) -> AbstractContextManager[Any]:
    if training.options is None or not applies:
        return nullcontext()
    made: AbstractContextManager[Any] = zgraph.no_sync(model)
    return made


def _optimizer(training: Training, model: nn.Module, emit: Emit) -> torch.optim.Optimizer:
    if training.optimizer is None:
        return torch.optim.AdamW(model.parameters(), lr=RATE)
    options = dict(training.optimizer)
    if options.get("state") == "disk":
        options["folder"] = emit.folder / "states"
    return zgraph.optim.AdamW(model.parameters(), lr=RATE, **options)
