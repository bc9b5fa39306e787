"""Short jobs for tests of the device itself, and of what else runs on it."""

from __future__ import annotations

import threading
from collections import Counter
from typing import Any
from unittest.mock import patch

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

import zgraph
from tests.emulated import cuda
from tests.emulated.case import Case
from tests.emulated.cuda import Entry
from tests.emulated.nets import batch, build
from tests.emulated.races import races
from tests.emulated.training import waiting, without_each_wait
from zgraph.bridge.target import device_budget
from zgraph.capture import fake


def host_waits(log: list[Entry]) -> dict[str, int]:
    """How often the host waited, by place."""
    return dict(Counter(f"{e.name} {e.site}".strip() for e in log if e.holds_host))


def clipped(stage: int) -> dict[str, int]:
    """The waits of the host in a step with clipping, after one that compiles."""
    model: Any = build("residual").to("cuda")
    inputs = [t.to("cuda") for t in batch("residual", model, 0, 8)]
    compiled = zgraph.compile(model, stage=stage)
    optimizer = torch.optim.AdamW(compiled.parameters())
    logs = []
    for _ in range(2):
        with cuda.recorded() as log:
            compiled(*inputs).backward()
            nn.utils.clip_grad_norm_(compiled.parameters(), 0.5)
            optimizer.step()
            optimizer.zero_grad()
        logs.append(log)
    return host_waits(logs[-1])


def engine_steps(limit: float) -> dict[str, int]:
    """The waits of the host in a step of the engine, after one that compiles."""
    model: Any = build("residual")
    config = {
        "train_batch_size": 4,
        "zero_optimization": {"stage": 3},
        "optimizer": {"type": "AdamW"},
        "gradient_clipping": limit,
    }
    engine, *_ = zgraph.initialize_engine(model=model, config=config)
    inputs = [t.to("cuda") for t in batch("residual", model, 0, 8)]
    logs = []
    for _ in range(3):
        with cuda.recorded() as log:
            engine.backward(engine(*inputs))
            engine.step()
        logs.append(log)
    return host_waits(logs[-1])


class TwoHeads(nn.Module):
    """A trunk and two heads, whose results are two losses."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.one, self.other = nn.Linear(16, 32), nn.Linear(32, 8), nn.Linear(32, 8)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        hidden = torch.tanh(self.trunk(x))
        return self.one(hidden).square().mean(), self.other(hidden).square().mean()


def two_heads() -> tuple[list[str], dict[str, int], set[str]]:
    """Races of steps that differentiate one head alone, those without each wait, and who waits."""
    torch.manual_seed(0)
    compiled: Any = zgraph.compile(TwoHeads().to("cuda"))
    optimizer = torch.optim.AdamW(compiled.parameters())
    inputs = torch.randn(8, 16, device="cuda")
    with cuda.recorded() as log:
        for head in (0, 1, 0):
            compiled(inputs)[head].backward()
            optimizer.step()
            optimizer.zero_grad()
    return [str(race) for race in races(log)], without_each_wait(log), waiting(log)


def muon() -> tuple[list[str], dict[str, int], set[str]]:
    """Races of steps of Muon, whose matrices travel in many rounds, those without each wait, and who waits."""
    model: Any = build("deep").to("cuda")
    inputs = [t.to("cuda") for t in batch("deep", model, 0, 8)]
    compiled = zgraph.compile(model)
    optimizer = zgraph.optim.Muon(compiled.parameters(), bucket_bytes=20_000)
    with cuda.recorded() as log:
        for _ in range(3):
            compiled(*inputs).backward()
            optimizer.step()
            optimizer.zero_grad()
    return [str(race) for race in races(log)], without_each_wait(log), waiting(log)


# --- the device -------------------------------------------------------------------------------------------------


def two_streams(*, waits: bool) -> int:
    """Races of a product on one stream that another reads."""
    side = torch.cuda.Stream()
    with cuda.recorded() as log:
        made = torch.ones(64, 64, device="cuda")
        if waits:
            side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            read = made @ made
        torch.cuda.current_stream().wait_stream(side)
        del made, read
    return len(races(log))


def freed_while_read(*, waits: bool) -> int:
    """Races of memory that is freed, and taken by the next, while another stream reads it."""
    side = torch.cuda.Stream()
    with cuda.recorded() as log:
        made = torch.ones(1000, device="cuda")
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            read = made + 1
        if waits:
            torch.cuda.current_stream().wait_stream(side)
        del made
        torch.zeros(1000, device="cuda")
    del read
    return len(races(log))


def parts_of_one_memory(*, overlap: bool) -> int:
    """Races of two streams that write to parts of one tensor."""
    side, memory = torch.cuda.Stream(), torch.zeros(1000, device="cuda")
    with cuda.recorded() as log:
        memory[:500].fill_(1)
        with torch.cuda.stream(side):
            memory[499 if overlap else 500 :].fill_(2)
    return len(races(log))


def read_by_the_host(*, waits: bool) -> int:
    """Races of the host, which reads what is copied to it."""
    on_host = torch.empty(1000, pin_memory=True)
    with cuda.recorded() as log:
        on_host.copy_(torch.ones(1000, device="cuda"), non_blocking=True)
        if waits:
            torch.cuda.current_stream().synchronize()
        on_host.add_(1)
    return len(races(log))


def waits_of(what: str) -> int:
    """How often the host waits where torch has it wait on a GPU."""
    made = torch.ones(8, device="cuda")
    with cuda.recorded() as log:
        if what == "item":
            made.sum().item()
        elif what == "cpu":
            made.cpu()
        elif what == "mask":
            made[made > 0]
        elif what == "pageable":
            torch.empty(8).copy_(made, non_blocking=True)
        elif what == "pinned":
            torch.empty(8, pin_memory=True).copy_(made, non_blocking=True)
        else:
            made.add_(1)
    return sum(entry.holds_host for entry in log)


def out_of_memory() -> tuple[str, int, int]:
    """The error of an allocation above the limit; bytes in use after it, and before."""
    before = torch.cuda.memory_allocated()
    with cuda.limited(before + 10_000):
        small = torch.empty(1000, device="cuda")
        del small
        try:
            torch.empty(100_000, device="cuda")
        except torch.OutOfMemoryError as error:
            return str(error), torch.cuda.memory_allocated(), before
    return "", 0, 0


def out_of_memory_in_the_first_step(num_allocations: int) -> tuple[str, list[float], list[float]]:
    """The error of a first call in which one allocation fails; losses of steps after it, and of a model unharmed."""
    losses: list[list[float]] = []
    raised = ""
    for fails in (True, False):
        torch.compiler.reset()
        model: Any = build("residual").to("cuda")
        inputs = [t.to("cuda") for t in batch("residual", model, 0, 8)]
        compiled = zgraph.compile(model)
        optimizer = torch.optim.AdamW(compiled.parameters())
        if fails:
            try:
                with cuda.failing_after(num_allocations):
                    compiled(*inputs).backward()
            except torch.OutOfMemoryError as error:
                raised = str(error)
            optimizer.zero_grad()
        losses.append([])
        for _ in range(2):
            loss = compiled(*inputs)
            loss.backward()
            losses[-1].append(float(loss.detach()))
            optimizer.step()
            optimizer.zero_grad()
    return raised, losses[0], losses[1]


# --- defaults of a GPU --------------------------------------------------------------------------------------------


def defaults(total_bytes: int) -> dict[str, Any]:
    """What zgraph decides by itself on a device of this size, and the losses that follow."""
    properties = torch.cuda.get_device_properties(0)
    before, properties.total_memory = properties.total_memory, total_bytes
    try:
        model: Any = build("deep").to("cuda")
        batches = [batch("deep", model, Case.seed(step, 0), 1024)[0].to("cuda") for step in range(2)]
        compiled = zgraph.compile(model, mesh=DeviceMesh("cuda", list(range(4))))
        optimizer = zgraph.optim.AdamW(compiled.parameters(), lr=1e-2)
        threads: set[int] = set()
        for parameter in compiled.parameters():
            parameter.register_post_accumulate_grad_hook(lambda _: threads.add(threading.get_ident()))
        losses = []
        with cuda.recorded() as log:
            for inputs in batches:
                loss = compiled(inputs)
                loss.backward()
                losses.append(loss.detach())
                optimizer.step()
                optimizer.zero_grad()
        report = zgraph.report(compiled)
        nodes = report.entries[0].plan.graph.nodes
        return {
            "losses": [float(loss) for loss in losses],
            "races": [str(race) for race in races(log)],
            "ops": dict(Counter(node.op for node in nodes)),
            "has its thread": threading.get_ident() not in threads,
            "budget": device_budget(torch.device("cuda")),
        }
    finally:
        properties.total_memory = before


# --- capture ------------------------------------------------------------------------------------------------------


class Asking(nn.Module):
    """Attention by torch's own function."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(64, 192)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        query, key, value = self.project(x).view(*x.shape[:2], 3, 2, 32).permute(2, 0, 3, 1, 4)
        return nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True).sum()


def captured_ops() -> list[str]:
    """The ops of a net with attention, captured under fake tensors of the device."""
    own = fake._fake

    def on_device(tensor: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
        made = own(tensor, dtype)
        moved = torch.empty_strided(made.size(), made.stride(), dtype=made.dtype, device="cuda")
        is_parameter = isinstance(made, nn.Parameter)
        return nn.Parameter(moved, made.requires_grad) if is_parameter else moved.requires_grad_(made.requires_grad)

    with patch.object(fake, "_fake", on_device):
        graph = zgraph.trace(Asking(), torch.empty(2, 16, 64), param_dtype=torch.bfloat16)
    return [node.op for node in graph.nodes]
