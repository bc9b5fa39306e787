"""Reports of an engine while it trains: a line every so many steps, tables, and events for tools that draw curves."""

from __future__ import annotations

import atexit
import logging
import resource
import sys
import time
import weakref
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, SupportsFloat

import torch
from rich.console import RenderableType
from torch import nn
from torch.utils import _pytree as pytree

from zgraph.compiler.compiled_model import compiled_model
from zgraph.compiler.report import Entry, mebibytes
from zgraph.engine.config.keys import EngineConfig
from zgraph.engine.config.read import Config
from zgraph.engine.monitor.comms import CollectiveTimes
from zgraph.engine.monitor.flops import flop_tables, useful_flop
from zgraph.engine.monitor.writers import Event, writers
from zgraph.engine.undecided import Later
from zgraph.viz import as_text

if TYPE_CHECKING:
    from zgraph.engine.protocol import Trains

log = logging.getLogger("zgraph")

STEPS_PER_PRINT = 10
"""Steps between prints where something is to be printed and `steps_per_print` does not say when."""


class Monitoring:
    """Looks on while an engine trains. Nothing waits for the device but what prints, writes or takes times.

    Losses, memory and times are those of the first rank; rates are of all ranks, taken to be as fast as the first. The
    first step, which compiles, is in none of them.

    Args:
        config: the engine's.
        model: the compiled model.
    """

    def __init__(self, config: Config, model: nn.Module) -> None:
        self.keys, self.model = config.keys, model
        self.compiled = compiled_model(model)
        self.session = self.compiled.session
        self.tells = self.session.store.rank == 0
        self.every = _steps_per_print(self.keys)
        self.writers = writers(self.keys) if self.tells else []
        self.collectives = CollectiveTimes(self.session)
        self.losses: list[torch.Tensor] = []
        self._unwritten: list[tuple[str, SupportsFloat, int]] = []
        if self.writers:
            atexit.register(_write_rest, weakref.ref(self))
        self.num_steps = 0
        self._reset()

    def _reset(self) -> None:
        """From here on steps are counted and times are taken."""
        self.counts: Counter[str] = Counter()
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.began = time.perf_counter()

    # --- what the engine calls ---------------------------------------------------------------------------------------

    def forward(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> AbstractContextManager[None]:
        """Around a forward with these inputs."""
        if not self.model.training:
            return nullcontext()
        tensors = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor) and t.dim()]
        words = next((t for t in tensors if t.dim() == 2 and t.dtype in (torch.int64, torch.int32)), None)
        self.counts["calls"] += 1
        self.counts["rows"] += len(tensors[0]) if tensors else 0
        self.counts["tokens"] += words.numel() if words is not None else 0
        return self.timed("forward")

    def backward(self, loss: torch.Tensor) -> AbstractContextManager[None]:
        """Around the backward of this loss."""
        self.losses.append(loss.detach())
        return self.timed("backward")

    @contextmanager
    def timed(self, what: str) -> Iterator[None]:
        """Take the time, if there is to be a breakdown."""
        if not self.keys.wall_clock_breakdown:
            yield
            return
        self._synchronize()
        began = time.perf_counter()
        yield
        self._synchronize()
        self.seconds[what] += time.perf_counter() - began

    def after_step(self, engine: Trains) -> None:
        """At the end of a step, on all ranks."""
        losses, self.losses = self.losses, []
        self.num_steps += 1
        self.counts["steps"] += 1
        if self.writers:
            self.write_rest()
            self._unwritten = self._events(engine, losses)
            if self.session.device.type == "cpu":
                self.write_rest()
        if self.keys.flops_profiler.enabled and engine.global_steps == self.keys.flops_profiler.profile_step:
            self._tell_flops()
        prints = self.every > 0 and engine.global_steps % self.every == 0
        if prints:
            self._print(engine, losses)
        if prints or self.num_steps == 1:
            self._reset()

    # --- what is told ------------------------------------------------------------------------------------------------

    def write_rest(self) -> None:
        """Write what is not written yet: the numbers of the last step, which its device need not have then."""
        events, self._unwritten = [Event(n, float(value), rows) for n, value, rows in self._unwritten], []
        for writer in self.writers if events else ():
            writer.write(events)

    def _events(self, engine: Trains, losses: list[torch.Tensor]) -> list[tuple[str, SupportsFloat, int]]:
        found: dict[str, SupportsFloat] = {"lr": engine.get_lr()[0]}
        if losses:
            found["train_loss"] = Later(_mean(losses))
        if engine.fp16_enabled():
            found["loss_scale"] = engine.cur_scale
        return [(f"Train/Samples/{name}", value, engine.global_samples) for name, value in found.items()]

    def _print(self, engine: Trains, losses: list[torch.Tensor]) -> None:
        if self.tells:
            say(f"step {engine.global_steps}: {', '.join(self._line(engine, losses))}")
        entry = self._entry()
        if self.keys.comms_logger.enabled and entry is not None and entry.plan.collectives:
            self.collectives.measure(entry.plan)
            if self.tells:
                say(self.collectives.table(entry.plan))

    def _line(self, engine: Trains, losses: list[torch.Tensor]) -> Iterator[str]:
        if losses:
            yield f"loss {float(_mean(losses)):.4f}"
        self._synchronize()
        seconds, steps = time.perf_counter() - self.began, self.counts["steps"]
        if (norm := engine.get_global_grad_norm()) is not None:
            yield f"grad norm {norm:.4f}"
        yield f"lr {engine.get_lr()[0]:.3e}"
        if engine.fp16_enabled():
            yield f"loss scale {engine.cur_scale:,.0f}"
        if self.num_steps > 1:
            unit = "tokens" if self.counts["tokens"] else "rows"
            yield f"{self.counts[unit] * self.session.num_ranks / seconds:,.0f} {unit}/s"
        yield f"memory {mebibytes(_memory_bytes(self.session.device))}"
        if (entry := self._entry()) is not None:
            rate = self._peak_flops()
            if rate is not None and self.num_steps > 1:
                yield f"MFU {self.counts['calls'] * useful_flop(entry) / seconds / rate:.1%}"
            if self.session.num_ranks > 1:
                yield f"communication exposed {entry.timeline.exposed_us / 1e3:.2f} ms a micro-batch (predicted)"
                if found := self.session.peers.slowest():
                    yield found
        for what, taken in self.seconds.items():
            yield f"{what} {1e3 * taken / steps:.2f} ms"

    def _tell_flops(self) -> None:
        entry, keys = self._entry(), self.keys.flops_profiler
        if not self.tells:
            return
        if entry is None:
            say("flops_profiler: there is no graph to count in, as the model is not captured (fullgraph=False)")
            return
        tables = flop_tables(entry, type(self.model).__name__, keys)
        if keys.output_file is None:
            say(tables)
        else:
            keys.output_file.parent.mkdir(parents=True, exist_ok=True)
            keys.output_file.write_text(as_text(tables, width=110))

    def _entry(self) -> Entry | None:
        """The first training graph that was captured."""
        return next((e for e in self.compiled.entries if e.plan.backward is not None), None)

    def _peak_flops(self) -> float | None:
        """The data sheet's rate of the device, where the profile is one of it: found by its name, or by the user."""
        hardware = self.compiled.context.costs.hardware
        on_gpu = self.session.device.type != "cpu"
        stem = hardware.name.split("-")[0]
        is_found = on_gpu and stem in torch.cuda.get_device_name(self.session.device).lower()
        if not is_found and self.keys.zgraph.hardware is None:
            return None
        rates = hardware.device.peak_flops
        dtype = "f16" if self.keys.fp16.enabled else "bf16" if self.keys.bf16.enabled else "f32"
        if dtype == "f32" and on_gpu and torch.get_float32_matmul_precision() != "highest":
            dtype = "tf32"
        return rates.get(dtype) or rates.get("bf16" if dtype == "f16" else "f32")

    def _synchronize(self) -> None:
        if self.session.device.type != "cpu":
            torch.cuda.synchronize(self.session.device)


def _write_rest(monitoring: weakref.ref[Monitoring]) -> None:
    if (found := monitoring()) is not None:
        found.write_rest()


def _steps_per_print(keys: EngineConfig) -> int:
    if keys.steps_per_print is not None:
        return keys.steps_per_print
    return STEPS_PER_PRINT if keys.wall_clock_breakdown or keys.comms_logger.enabled else 0


def say(what: str | RenderableType) -> None:
    """Tell the logger `zgraph`; where it takes no such messages, standard error."""
    text = what if isinstance(what, str) else "\n" + as_text(what, width=110)
    if log.isEnabledFor(logging.INFO) and log.hasHandlers():
        log.info(text)
    else:
        print(text, file=sys.stderr)


def _mean(losses: list[torch.Tensor]) -> torch.Tensor:
    return torch.stack([loss.float().reshape(()) for loss in losses]).mean()


def _memory_bytes(device: torch.device) -> int:
    """The most that this process had at once: of the device's memory, or on processors of any."""
    if device.type != "cpu":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
