"""Training with codes of gradients beside training with the gradients: python -m benchmarks.compression --json c.json

A small Llama on the text of the demo, on two ranks or more over gloo, from one seed for each codec. Bytes are those
that a rank sends in a step, as counted where they are sent, beside those that the report predicts. Losses are means
over the last tenth of the steps.
"""

from __future__ import annotations

import json
import tempfile
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

import zgraph
from benchmarks.eight_bit import LEARNING_RATE, VOCAB_SIZE, llama, loss_of
from benchmarks.results import write
from examples.text import load_corpus
from zgraph.compiler.compiled_model import compiled_model

NONE = "none"
CODECS = ["q8", "q4", "sign", "topk(1%)"]


@dataclass(frozen=True)
class Trained:
    """One run.

    codec: of gradients; "none" sends their numbers.
    sent_bytes, predicted_bytes: of one rank in one step.
    loss: mean over the last tenth of the steps, on the first rank.
    losses: of every tenth step.
    """

    codec: str
    stage: int
    num_ranks: int
    num_steps: int
    sent_bytes: int
    predicted_bytes: int
    loss: float
    losses: list[float]


def rank_main(rank: int, codec: str, stage: int, num_ranks: int, num_steps: int, folder: str) -> None:
    """One rank of one run; the first writes what came of it."""
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", num_ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=num_ranks)
    found = trained(codec, stage, num_steps)
    if rank == 0:
        Path(folder, "run.json").write_text(json.dumps(asdict(found)))
    dist.destroy_process_group()


def trained(codec: str, stage: int, num_steps: int) -> Trained:
    """Train from one seed, and count what the last step sends."""
    tokens = load_corpus(VOCAB_SIZE).tokens
    torch.manual_seed(0)
    model = zgraph.compile(llama(), stage=stage, compress=None if codec == NONE else codec)
    optimizer = zgraph.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    losses, sent = list[float](), list[int]()
    for step in range(num_steps):
        if step == num_steps - 1:
            count(compiled_model(model).session.lane, sent)
        loss = loss_of(model, tokens, step)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    last = fmean(losses[-max(num_steps // 10, 1) :])
    predicted = zgraph.report(model).sent_bytes
    return Trained(codec, stage, dist.get_world_size(), num_steps, sum(sent), predicted, last, losses[::10])


def count(lane: Any, sent: list[int]) -> None:
    """Have a lane note the bytes of each message that it sends."""
    post = lane._exchange

    def counting(number: int, receive: Any, send: Any) -> Any:
        sent.extend(tensor.nbytes for tensor, _, _ in send)
        return post(number, receive, send)

    lane._exchange = counting


def run(codec: str, stage: int, num_ranks: int, num_steps: int) -> Trained:
    """One run in processes of its own."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = (codec, stage, num_ranks, num_steps, folder)
        torch.multiprocessing.spawn(rank_main, arguments, num_ranks)
        return Trained(**json.loads(Path(folder, "run.json").read_text()))


def main(
    codecs: Annotated[list[str], typer.Option("--codec", help="May be given several times.")] = CODECS,
    stage: Annotated[int, typer.Option(help="ZeRO stage.")] = 2,
    ranks: Annotated[int, typer.Option(min=2, help="Processes.")] = 2,
    steps: Annotated[int, typer.Option(min=2, help="Of each run.")] = 300,
    json_file: Annotated[Path | None, typer.Option("--json", help="Where to write the results.")] = None,
) -> None:
    """Train with each codec."""
    found = [run(codec, stage, ranks, steps) for codec in (NONE, *codecs)]
    table = Table("codec", "sent a step", "predicted", "times fewer", "loss")
    for one in found:
        times = f"{found[0].sent_bytes / one.sent_bytes:.2f}" if one.sent_bytes else ""
        table.add_row(one.codec, f"{one.sent_bytes:,}", f"{one.predicted_bytes:,}", times, f"{one.loss:.3f}")
    Console(width=100).print(table)
    write(json_file, rows=[asdict(one) for one in found])


if __name__ == "__main__":
    typer.run(main)
