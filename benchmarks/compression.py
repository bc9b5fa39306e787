"""Training with codes of gradients beside training with the gradients: python -m benchmarks.compression --json c.json

A small Llama on the text of the demo, on two ranks or more over gloo, with each codec. Bytes are those
that a rank sends in a step, as counted where they are sent, beside those that the report predicts. Losses in the end
are of text that nobody was trained on; numbers themselves are sent with several seeds, whose losses show the spread.
"sign and q4" is a codec of gradients and one of parameters. "local q4 50" trains each rank apart, and averages in q4
after 50 steps; "local q4 50 0.7 0.9" takes a step of Nesterov's at this rate and momentum instead of the mean.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.distributed as dist
import torch.multiprocessing
import typer
from rich.console import Console
from rich.table import Table
from torch.distributed.device_mesh import init_device_mesh

import zgraph
from benchmarks.eight_bit import HELD_OUT_SHARE, LEARNING_RATE, VOCAB_SIZE, held_out, llama, loss_of
from benchmarks.results import write
from examples.text import load_corpus
from zgraph.compiler.compiled_model import compiled_model
from zgraph.ir import DType
from zgraph.ir.codecs import parse_codec

NONE = "none"
Tokens = tuple[torch.Tensor, torch.Tensor]
"""Text to train on, and text that is held out."""

LOCAL = "local"
BOTH = " and "
"""Between the codec of gradients and that of parameters."""

CODECS = [
    "q8",
    "q4",
    "q4 and q4",
    "q2 and q2",
    "sign and q4",
    "topk(1%) and q4",
    "sign and sign",
    "local q4 2",
    "local q4 13",
]


@dataclass(frozen=True)
class Trained:
    """One run.

    codec: of gradients, and of parameters; "none" sends their numbers. Behind "local", that of outer gradients, and the
        steps between.
    sent_bytes, predicted_bytes: of one rank in one step; of local steps the mean of all.
    seed: of weights.
    loss: of batches held out, in the end, mean over ranks.
    losses: of every tenth step, on the first rank.
    """

    codec: str
    stage: int
    num_ranks: int
    num_steps: int
    seed: int
    sent_bytes: int
    predicted_bytes: int
    loss: float
    losses: list[float]


def rank_main(
    rank: int, codec: str, stage: int, num_ranks: int, num_steps: int, seed: int, tokens: Tokens, folder: str
) -> None:
    """One rank of one run; the first writes what came of it."""
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", num_ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=num_ranks)
    train = trained_apart if codec.startswith(LOCAL) else trained
    found = train(codec, stage, num_steps, seed, tokens)
    if rank == 0:
        Path(folder, "run.json").write_text(json.dumps(asdict(found)))
    dist.destroy_process_group()


def trained(codec: str, stage: int, num_steps: int, seed: int, tokens: Tokens) -> Trained:
    """Train from one seed, and count what the last step sends."""
    train, kept = tokens
    torch.manual_seed(seed)
    gradients, _, parameters = codec.partition(BOTH)
    codecs = {"gradients": gradients} | ({"parameters": parameters} if parameters else {})
    model = zgraph.compile(llama(), stage=stage, compress=None if codec == NONE else codecs)
    optimizer = zgraph.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    losses, sent = list[float](), list[int]()
    for step in range(num_steps):
        if step == num_steps - 1:
            count(compiled_model(model).session.lane, sent)
        loss = loss_of(model, train, step)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    total = sum(sent)
    last = held_out(model, kept)
    predicted = zgraph.report(model).sent_bytes
    return Trained(codec, stage, dist.get_world_size(), num_steps, seed, total, predicted, last, losses[::10])


def trained_apart(codec: str, stage: int, num_steps: int, seed: int, tokens: Tokens) -> Trained:
    """Train each rank apart, with outer steps in between."""
    _, name, every, *rates = codec.split()
    nesterov = zgraph.optim.Nesterov(*map(float, rates or (1, 0)))
    train, kept = tokens
    torch.manual_seed(seed)
    model = llama()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    ranks = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("outer",))
    outer = zgraph.local_steps(model, optimizer, ranks, every=int(every), codec=name, outer=nesterov)
    losses = list[float]()
    for step in range(num_steps):
        loss = loss_of(model, train, step)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    outer.synchronise()
    last = held_out(model, kept)
    size, numel = ranks.size(), sum(p.numel() for p in model.parameters())
    code = parse_codec(name).num_bytes(-(-numel // size), DType.f32)
    predicted = 2 * (size - 1) * code * -(-num_steps // int(every)) // num_steps
    return Trained(codec, stage, size, num_steps, seed, outer.sent_bytes // num_steps, predicted, last, losses[::10])


def split() -> Tokens:
    """The text to train on, and what is held out."""
    tokens = load_corpus(VOCAB_SIZE).tokens
    at = int(len(tokens) * (1 - HELD_OUT_SHARE))
    return tokens[:at], tokens[at:]


def count(lane: Any, sent: list[int]) -> None:
    """Have a lane note the bytes of each message that it sends."""
    post = lane._exchange

    def counting(number: int, receive: Any, send: Any) -> Any:
        sent.extend(tensor.nbytes for tensor, _, _ in send)
        return post(number, receive, send)

    lane._exchange = counting


def run(codec: str, stage: int, num_ranks: int, num_steps: int, tokens: Tokens, seed: int = 0) -> Trained:
    """One run in processes of its own."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = (codec, stage, num_ranks, num_steps, seed, tokens, folder)
        torch.multiprocessing.spawn(rank_main, arguments, num_ranks)
        found = Trained(**json.loads(Path(folder, "run.json").read_text()))
    typer.echo(f"{codec}, seed {seed}: {found.sent_bytes:,} bytes a step, loss {found.loss:.3f}", err=True)
    return found


def draw(found: list[Trained], path: Path) -> None:
    """One picture of the losses of training, each the mean of 50 steps. It takes matplotlib."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    most = next((one.sent_bytes for one in found if one.codec == NONE), 0)
    for one in found:
        means = [sum(one.losses[at : at + 5]) / 5 for at in range(0, len(one.losses) - 4, 5)]
        fewer = f", {most / one.sent_bytes:.0f} times fewer" if most else ""
        name = f"numbers, seed {one.seed}" if one.codec == NONE else f"{one.codec}{fewer}"
        style = {"color": "black", "linewidth": 1.0} if one.codec == NONE else {}
        axes.plot(range(50, 50 * len(means) + 1, 50), means, label=name, **style)
    axes.set(xlabel="step", ylabel="loss of training")
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=140, metadata={"Software": None})


def main(
    codecs: Annotated[list[str], typer.Option("--codec", help="May be given several times.")] = CODECS,
    stage: Annotated[int, typer.Option(help="ZeRO stage.")] = 2,
    ranks: Annotated[int, typer.Option(min=2, help="Processes.")] = 2,
    steps: Annotated[int, typer.Option(min=2, help="Of each run.")] = 300,
    seeds: Annotated[int, typer.Option(min=0, help="Runs that send the numbers themselves.")] = 3,
    json_file: Annotated[Path | None, typer.Option("--json", help="Where to write the results.")] = None,
    png: Annotated[Path | None, typer.Option(help="Where to draw the losses.")] = None,
) -> None:
    """Train with each codec."""
    tokens = split()
    found = [run(NONE, stage, ranks, steps, tokens, seed) for seed in range(seeds)]
    found += [run(codec, stage, ranks, steps, tokens) for codec in codecs]
    table = Table("codec", "sent a step", "predicted", "times fewer", "loss")
    most = next((one.sent_bytes for one in found if one.codec == NONE), 0)
    for one in found:
        times = f"{most / one.sent_bytes:.2f}" if most and one.sent_bytes else ""
        table.add_row(one.codec, f"{one.sent_bytes:,}", f"{one.predicted_bytes:,}", times, f"{one.loss:.3f}")
    Console(width=100).print(table)
    write(json_file, rows=[asdict(one) for one in found])
    if png is not None:
        draw(found, png)


if __name__ == "__main__":
    typer.run(main)
