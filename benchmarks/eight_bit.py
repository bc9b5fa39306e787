"""Training in few bytes beside full AdamW: python -m benchmarks.eight_bit --json eight-bit.json

A small Llama at stage 3 on the text of the demo, with seeds for weights and batches: parameters in fp32 with AdamW, and
parameters in bfloat16 without masters with CompactAdamW, whose moments are in 8 bits. Both compute in fp32, so that
what differs is what lies at rest. Losses in the end are of batches that nobody was trained on.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any

import torch
import torch.distributed as dist
import torch.multiprocessing
import typer
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import zgraph
from benchmarks.results import write
from examples.text import load_corpus, sample_batch
from examples.training import live_bytes
from zgraph.optim import AdamW, CompactAdamW

VOCAB_SIZE, WIDTH, NUM_LAYERS, BATCH, LENGTH = 1024, 128, 2, 4, 64
LEARNING_RATE = 2e-3
HELD_OUT_SHARE, NUM_HELD_OUT = 0.05, 16

FULL, COMPACT = "AdamW, fp32", "CompactAdamW, bf16"
OPTIMIZERS: dict[str, tuple[torch.dtype, Callable[..., torch.optim.Optimizer]]] = {
    FULL: (torch.float32, AdamW),
    COMPACT: (torch.bfloat16, CompactAdamW),
}


@dataclass(frozen=True)
class Options:
    """What is trained, on how many ranks."""

    num_ranks: int
    num_steps: int
    num_seeds: int


@dataclass(frozen=True)
class Trained:
    """One run.

    loss: of the batches held out, in the end, mean over ranks.
    bytes_per_parameter: of parameters, gradients and optimizer state on the rank that holds most, over its share of
        the parameters.
    losses: of every 50th step, on the first rank.
    """

    optimizer: str
    seed: int
    loss: float
    bytes_per_parameter: float
    losses: list[float]


def rank_main(rank: int, name: str, seed: int, options: Options, tokens: torch.Tensor, folder: str) -> None:
    """One rank of one run; the first writes what came of it."""
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", options.num_ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=options.num_ranks)
    found = trained(name, seed, options, tokens)
    if rank == 0:
        Path(folder, "run.json").write_text(json.dumps(asdict(found)))
    dist.destroy_process_group()


def trained(name: str, seed: int, options: Options, tokens: torch.Tensor) -> Trained:
    """Train from this seed, then look at what was held out."""
    dtype, make = OPTIMIZERS[name]
    torch.manual_seed(seed)
    model = zgraph.compile(llama().to(dtype), stage=3, param_dtype=torch.float32)
    optimizer = make(model.parameters(), lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=options.num_steps)
    known = tokens[: int(len(tokens) * (1 - HELD_OUT_SHARE))]
    losses, num_bytes = [], 0
    for step in range(options.num_steps):
        loss = loss_of(model, known, 1_000_000 * seed + step)
        loss.backward()  # type: ignore[no-untyped-call]
        num_bytes = bytes_at_rest(model, optimizer)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 50 == 0:
            losses.append(loss.item())
    num_parameters = sum(p.numel() for p in model.parameters())
    return Trained(
        name, seed, held_out(model, tokens[len(known) :]), num_bytes * options.num_ranks / num_parameters, losses
    )


def llama() -> nn.Module:
    """0.7 M parameters, the embedding not tied."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB_SIZE,
            hidden_size=WIDTH,
            intermediate_size=344,
            num_hidden_layers=NUM_LAYERS,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=LENGTH,
            use_cache=False,
            bos_token_id=None,
            eos_token_id=None,
        )
    )


def loss_of(model: nn.Module, tokens: torch.Tensor, step: int) -> torch.Tensor:
    """Of this rank's batch of that number."""
    ids = sample_batch(tokens, BATCH, LENGTH, step=step, rank=dist.get_rank())
    loss: torch.Tensor = model(input_ids=ids, labels=ids).loss
    return loss


def held_out(model: nn.Module, tokens: torch.Tensor) -> float:
    """The mean loss of batches of all ranks."""
    with torch.no_grad():
        total = sum((loss_of(model, tokens, step) for step in range(NUM_HELD_OUT)), torch.zeros(()))
    dist.all_reduce(total)
    return float(total) / NUM_HELD_OUT / dist.get_world_size()


def bytes_at_rest(model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Bytes of parameters, gradients and optimizer state on the rank that holds most."""
    states = [s for state in optimizer.state.values() for s in state.values() if isinstance(s, torch.Tensor)]
    parameters = [*model.parameters()]
    found = torch.tensor(live_bytes([*parameters, *(p.grad for p in parameters), *states]))
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return int(found)


def measure(options: Options, num_at_once: int) -> list[Trained]:
    """All runs, each in processes of its own."""
    tokens = load_corpus(VOCAB_SIZE).tokens

    def one(name: str, seed: int) -> Trained:
        with tempfile.TemporaryDirectory() as folder:
            torch.multiprocessing.spawn(rank_main, (name, seed, options, tokens, folder), options.num_ranks)
            found = Trained(**json.loads(Path(folder, "run.json").read_text()))
        typer.echo(f"{name}, seed {seed}: {found.loss:.4f}", err=True)
        return found

    cases = [(name, seed) for seed in range(options.num_seeds) for name in OPTIMIZERS]
    with ThreadPoolExecutor(num_at_once) as threads:
        return [*threads.map(lambda case: one(*case), cases)]


def summary(runs: list[Trained]) -> dict[str, Any]:
    """The spread of full AdamW over seeds, and where the mean of the other is."""
    full, compact = ([run.loss for run in runs if run.optimizer == name] for name in (FULL, COMPACT))
    mean = fmean(compact)
    return {
        "full_lowest": min(full),
        "full_highest": max(full),
        "full_mean": fmean(full),
        "compact_mean": mean,
        "is_within_spread": min(full) <= mean <= max(full),
        "largest_difference_of_a_seed": max(abs(a - b) for a, b in zip(full, compact, strict=True)),
    }


def main(
    num_ranks: Annotated[int, typer.Option("--ranks", min=1, help="With one thread each.")] = 2,
    num_steps: Annotated[int, typer.Option("--steps", min=4, help="Steps of each run.")] = 500,
    num_seeds: Annotated[int, typer.Option("--seeds", min=2, help="Runs of each optimizer.")] = 3,
    num_at_once: Annotated[int, typer.Option("--at-once", min=1, help="Runs beside each other.")] = 1,
    json_file: Annotated[Path | None, typer.Option("--json", help="File to write the results to.")] = None,
) -> None:
    """Train with both optimizers from several seeds, and print losses and bytes."""
    options = Options(num_ranks, num_steps, num_seeds)
    runs = measure(options, num_at_once)
    table = Table("optimizer", title=f"{num_steps} steps on {num_ranks} ranks", title_justify="left")
    for column in ("seed", "loss held out", "bytes a parameter"):
        table.add_column(column, justify="right")
    for run in sorted(runs, key=lambda run: run.optimizer):
        table.add_row(run.optimizer, str(run.seed), f"{run.loss:.4f}", f"{run.bytes_per_parameter:.2f}")
    Console().print(table, summary(runs))
    write(json_file, options=asdict(options), summary=summary(runs), rows=[asdict(run) for run in runs])


if __name__ == "__main__":
    typer.run(main)
