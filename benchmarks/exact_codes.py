"""Bytes of exact codes of parameters beside the entropy of what changes: python -m benchmarks.exact_codes --json e.json

A model at stage 2 on two ranks over gloo, computed in bf16 with masters in fp32: a small Llama from scratch, or
SmolLM2-135M fine-tuned (`--gguf`, its file) on Python's manual, at one learning rate after the other. Bytes are those
of the codes that the first rank sends in a step, as counted where they are sent. The bound is the entropy of the
differences of this rank's bit patterns from one step to the next, each difference drawn by itself.
"""

from __future__ import annotations

import json
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing
import typer
from rich.console import Console
from rich.table import Table

import zgraph
from benchmarks.eight_bit import VOCAB_SIZE, llama
from benchmarks.results import write
from examples.smollm2 import SmolLM2
from examples.text import load_corpus, manual, sample_batch
from zgraph.compiler.compiled_model import compiled_model

NUM_RANKS = 2
RATES = [1e-3]


@dataclass(frozen=True)
class Step:
    """One step.

    rate: learning rate of the update that made what this step sends; 0 before the first.
    step: from 0.
    loss: on the first rank.
    number_bytes: of this rank's parameters in bf16.
    code_bytes: sent in their place.
    bound_bytes: entropy of what changed in them.
    unchanged: share of parameters that did not.
    seconds: of the step.
    """

    rate: float
    step: int
    loss: float
    number_bytes: int
    code_bytes: int
    bound_bytes: float
    unchanged: float
    seconds: float

    @property
    def times_fewer(self) -> float:
        """How many times fewer bytes are sent."""
        return self.number_bytes / self.code_bytes


def rank_main(
    rank: int, gguf: Path | None, rates: list[float], num_steps: int, length: int, tokens: torch.Tensor, folder: str
) -> None:
    """One rank; the first writes what came of it."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", NUM_RANKS), rank=rank, world_size=NUM_RANKS)
    torch.manual_seed(0)
    model: Any = SmolLM2(gguf).model() if gguf is not None else llama()
    model.config.use_cache = False
    found = trained(model, rates, num_steps, length, tokens)
    if rank == 0:
        Path(folder, "steps.json").write_text(json.dumps([asdict(step) for step in found]))
    dist.destroy_process_group()


def trained(model: Any, rates: list[float], num_steps: int, length: int, tokens: torch.Tensor) -> list[Step]:
    """Train at one rate after the other."""
    model = zgraph.compile(model, stage=2, param_dtype=torch.bfloat16, compress="delta")
    optimizer = zgraph.optim.AdamW(model.parameters(), lr=rates[0])
    found, sent, before, rate_before = list[Step](), list[int](), None, 0.0
    count_codes(compiled_model(model).session.lane, sent)
    for rate in rates:
        optimizer.param_groups[0]["lr"] = rate
        for _ in range(num_steps):
            began = time.perf_counter()
            ids = sample_batch(tokens, 1, length, step=len(found), rank=dist.get_rank())
            now, number_bytes = patterns(model), sum(p.to_local().numel() for p in model.parameters()) * 2
            sent.clear()
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            code_bytes = sum(sent)
            optimizer.step()
            optimizer.zero_grad()
            bound, unchanged = entropy_bytes(before, now) if before is not None else (float(number_bytes), 0.0)
            took, loss = time.perf_counter() - began, float(loss.detach())
            found.append(Step(rate_before, len(found), loss, number_bytes, code_bytes, bound, unchanged, took))
            before, rate_before = now, rate
            if dist.get_rank() == 0:
                print(found[-1], flush=True)
    return found


def patterns(model: Any) -> np.ndarray[Any, np.dtype[np.int16]]:
    """Bit patterns of this rank's parameters in bf16, as integers in the order of the numbers."""
    numbers = torch.cat([p.to_local().detach().reshape(-1).bfloat16() for p in model.parameters()])
    signed: np.ndarray[Any, np.dtype[np.int16]] = numbers.view(torch.int16).numpy()
    return signed ^ ((signed >> 15) & 0x7FFF)


def entropy_bytes(
    before: np.ndarray[Any, np.dtype[np.int16]], now: np.ndarray[Any, np.dtype[np.int16]]
) -> tuple[float, float]:
    """Bytes that no code of one difference at a time goes below, and the share of those that are 0."""
    counts = np.bincount((now - before).view(np.uint16), minlength=1 << 16)
    shares = counts[counts > 0] / len(now)
    return float(-(shares * np.log2(shares)).sum() * len(now) / 8), float(counts[0] / len(now))


def count_codes(lane: Any, sent: list[int]) -> None:
    """Have a lane note the bytes of each message that is of codes."""
    post = lane._exchange

    def counting(number: int, receive: Any, send: Any) -> Any:
        sent.extend(tensor.nbytes for tensor, _, _ in send if tensor.dtype == torch.uint8)
        return post(number, receive, send)

    lane._exchange = counting


def main(
    gguf: Annotated[Path | None, typer.Option(help="SmolLM2's file; without one a small Llama from scratch.")] = None,
    rates: Annotated[list[float], typer.Option("--rate", help="Learning rates, one after the other.")] = RATES,
    steps: Annotated[int, typer.Option(min=2, help="At each rate.")] = 20,
    length: Annotated[int, typer.Option(min=8, help="Tokens of a step on a rank.")] = 64,
    json_file: Annotated[Path | None, typer.Option("--json", help="Where to write the results.")] = None,
) -> None:
    """Train, and count the bytes of exact codes."""
    tokens = SmolLM2(gguf).tokens("\n\n".join(manual()[:20])) if gguf is not None else load_corpus(VOCAB_SIZE).tokens
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(rank_main, (gguf, rates, steps, length, tokens, folder), NUM_RANKS)
        found = [Step(**row) for row in json.loads(Path(folder, "steps.json").read_text())]
    table = Table("rate", "step", "numbers", "codes", "bound", "over the bound", "times fewer", "unchanged")
    for one in found:
        table.add_row(
            f"{one.rate:g}",
            str(one.step),
            f"{one.number_bytes:,}",
            f"{one.code_bytes:,}",
            f"{one.bound_bytes:,.0f}",
            f"{one.code_bytes / one.bound_bytes:.3f}",
            f"{one.times_fewer:.2f}",
            f"{one.unchanged:.1%}",
        )
    Console(width=110).print(table)
    write(json_file, rows=[asdict(one) for one in found])


if __name__ == "__main__":
    typer.run(main)
