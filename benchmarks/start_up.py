"""Start-up of a job with kept plans: python -m benchmarks.start_up

GPT-2, a Llama of 29.9 M parameters, and one of 80 narrow layers, on several ranks at stage 3, each rank with a folder
of plans of its own. Every run is a job of new processes:

    apart     plans are off: each rank traces its graph and runs the passes
    cold      no rank has a plan: the first one runs the passes, the others are given its plan
    warm      every rank has it, and its trace
    missing   the last rank has lost its folder; not on one rank

Each rank captures its model with Dynamo in every run. Told are how often AOTAutograd traced and how often the passes
ran in the whole job; from `zgraph.compile` to the end of the first step the seconds of the slowest rank and the CPU
seconds of all ranks; and whether the losses of all steps are those of the run apart. The ranks share the processors of
one machine.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.distributed as dist
import transformers as hf
import typer
from rich.console import Console
from rich.table import Table
from torch import nn

import zgraph
from benchmarks.results import write
from zgraph.compiler.compiled_model import compiled_model

BATCH, LENGTH, STEPS = 2, 32, 3

RUNS = ("apart", "cold", "warm", "missing")


def llama(vocabulary: int, hidden: int, inner: int, layers: int, heads: int) -> nn.Module:
    """A Llama of these sizes."""
    config = hf.LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        tie_word_embeddings=False,
    )
    return hf.LlamaForCausalLM(config)


def gpt2(layers: int) -> nn.Module:
    """GPT-2 of 124 M parameters, where it has its 12 layers."""
    return hf.GPT2LMHeadModel(hf.GPT2Config(n_layer=layers))


MODELS = {
    "gpt2": lambda: gpt2(12),
    "llama-29.9M": lambda: llama(4096, 512, 1408, 8, 8),
    "llama-80-layers": lambda: llama(256, 64, 128, 80, 4),
}


@dataclass(frozen=True)
class Row:
    """One run of one model.

    traced: how often AOTAutograd traced, one number a rank.
    passes: how often they ran, one number a rank.
    sources: where plans came from, one text a rank.
    passes_s: what the passes took where they ran, on the slowest rank.
    first_step_s: of the slowest rank.
    cpu_s: of all ranks together.
    ratio, ratio_cpu: these in those of the run apart.
    losses_equal: whether every loss of every rank is that of the run apart to the last bit.
    load: processes that waited for the machine's processors, on average of a minute, before the run.
    """

    model: str
    parameters: int
    run: str
    traced: list[int]
    passes: list[int]
    sources: list[str]
    passes_s: float
    first_step_s: float
    cpu_s: float
    ratio: float
    ratio_cpu: float
    losses_equal: bool
    losses: list[list[str]]
    load: float


def rank_main(model: str, folder: str) -> None:
    """One rank: trains, and prints what it found as JSON."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    torch.manual_seed(0)
    built = MODELS[model]()
    parameters = sum(p.numel() for p in built.parameters())
    torch.manual_seed(1 + rank)
    ids = torch.randint(256, (BATCH, LENGTH))
    dist.barrier()
    began, began_cpu = time.perf_counter(), time.process_time()
    os.environ["ZGRAPH_PLANS"] = f"{folder}/rank{rank}" if folder else "0"
    compiled = zgraph.compile(built, stage=3)
    optimizer = torch.optim.AdamW(compiled.parameters(), lr=1e-3)
    losses, first = [], (0.0, 0.0)
    for step in range(STEPS):
        loss = compiled(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item().hex())
        if step == 0:
            first = time.perf_counter() - began, time.process_time() - began_cpu
    state = compiled_model(compiled)
    assert state.plans is not None
    ran = len(state.entries) - state.plans.counts.total()
    passes_s = sum(step.seconds for entry in state.entries for step in entry.steps) if ran else 0.0
    traced = len(state.entries) - state.traces.counts["reused"]
    found = {
        "parameters": parameters,
        "traced": traced,
        "passes": ran,
        "passes_s": passes_s,
        "first": first,
        "losses": losses,
    }
    print("FOUND", json.dumps({**found, "source": str(state.plans) or "the passes"}))
    dist.barrier()
    dist.destroy_process_group()


def run_job(model: str, folder: str, ranks: int) -> list[dict[str, Any]]:
    """One job: what each rank has found."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(ranks), "OMP_NUM_THREADS": "1"}
    shared["ZGRAPH_LOGS"] = "none"
    command = [sys.executable, "-m", "benchmarks.start_up", "--rank-of", model, "--folder", folder]
    started = [
        subprocess.Popen(
            command,
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(ranks)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(ranks)
    ]
    try:
        found = []
        for process in started:
            out, _ = process.communicate()
            line = next((line for line in out.splitlines() if line.startswith("FOUND ")), None)
            if process.returncode or line is None:
                raise SystemExit(f"a rank of {model} ended with {process.returncode}; its error is above")
            found.append(json.loads(line.removeprefix("FOUND ")))
        return found
    finally:
        for process in started:
            process.kill()


def measured(model: str, ranks: int) -> list[Row]:
    """The runs of one model."""
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="zgraph-start-up-") as name:
        for run in RUNS if ranks > 1 else RUNS[:-1]:
            if run == "missing":
                shutil.rmtree(Path(name, f"rank{ranks - 1}"))
            load = os.getloadavg()[0]
            found = run_job(model, "" if run == "apart" else name, ranks)
            losses = [rank["losses"] for rank in found]
            seconds, cpu = max(rank["first"][0] for rank in found), sum(rank["first"][1] for rank in found)
            apart = rows[0] if rows else None
            rows.append(
                Row(
                    model,
                    found[0]["parameters"],
                    run,
                    [rank["traced"] for rank in found],
                    [rank["passes"] for rank in found],
                    [rank["source"] for rank in found],
                    max(rank["passes_s"] for rank in found),
                    seconds,
                    cpu,
                    seconds / apart.first_step_s if apart else 1.0,
                    cpu / apart.cpu_s if apart else 1.0,
                    losses == (apart.losses if apart else losses),
                    losses,
                    load,
                )
            )
    return rows


def main(
    ranks: Annotated[int, typer.Option(min=1, help="Ranks of each job.")] = 4,
    only: Annotated[str, typer.Option(help="One of the models.")] = "",
    json_file: Annotated[Path | None, typer.Option("--json", help="File to write the results to.")] = None,
    rank_of: Annotated[str, typer.Option(hidden=True)] = "",
    folder: Annotated[str, typer.Option(hidden=True)] = "",
) -> None:
    """Run the jobs, and print what each took."""
    if rank_of:
        rank_main(rank_of, folder)
        return
    table = Table(title=f"first step on {ranks} ranks", title_justify="left")
    for column in (
        "model",
        "run",
        "traced",
        "passes ran",
        "passes s",
        "first step s",
        "CPU s",
        "ratio",
        "of CPU",
        "losses",
    ):
        table.add_column(column, justify="left" if column in ("model", "run", "losses") else "right")
    rows: list[Row] = []
    for model in (model for model in MODELS if only in ("", model)):
        for row in measured(model, ranks):
            rows.append(row)
            times = f"{row.passes_s:.1f}", f"{row.first_step_s:.1f}", f"{row.cpu_s:.1f}"
            times += f"{row.ratio:.2f}", f"{row.ratio_cpu:.2f}"
            table.add_row(
                model,
                row.run,
                str(sum(row.traced)),
                str(sum(row.passes)),
                *times,
                "same" if row.losses_equal else "DIFFERENT",
            )
        write(json_file, ranks=ranks, batch=BATCH, length=LENGTH, rows=[asdict(row) for row in rows])
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
