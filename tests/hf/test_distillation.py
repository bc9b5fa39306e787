"""A Trainer of a student and a teacher: the losses of a plain loop, and checkpoints of the student alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import small
import zgraph
from tests.hf.training import WORDS, Rows, arguments, history, llama, same
from zgraph.distillation.model import divergence
from zgraph.errors import UsageError
from zgraph.hf import DistillationTrainer


def teacher() -> Any:
    torch.manual_seed(1)
    return small.llama(48, 2, WORDS, max_position_embeddings=32)


class Plain(transformers.Trainer):
    """A Trainer as anyone would write it."""

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **_: Any) -> Any:
        own = model(**inputs)
        with torch.no_grad():
            taught = self.teacher(input_ids=inputs["input_ids"]).logits
        each = divergence(own.logits[:, :-1], taught[:, :-1], "reverse_kl", 2.0, 0.5)
        loss = 0.3 * own.loss + 0.7 * 4.0 * each[inputs["labels"][:, 1:] != -100].mean()
        return (loss, own) if return_outputs else loss


OPTIONS = {"loss": "reverse_kl", "temperature": 2.0, "alpha": 0.3}


def made(folder: Path, **options: Any) -> Any:
    rows = {"train_dataset": Rows(), "eval_dataset": Rows(6)}
    return DistillationTrainer(
        llama(),
        teacher(),
        arguments(folder, save_strategy="steps", save_steps=3, **options),
        distillation=OPTIONS,
        **rows,
    )


def test_losses_are_those_of_a_plain_trainer_and_go_on_from_a_checkpoint(tmp_path: Path) -> None:
    taught = teacher().eval()  # before the Trainer seeds what shuffles the rows
    plain = Plain(llama(), arguments(tmp_path / "plain"), train_dataset=Rows(), eval_dataset=Rows(6))
    plain.teacher, plain.model_accepts_loss_kwargs = taught, False
    plain.train()
    ours = made(tmp_path / "ours")
    ours.train()
    same(history(ours, "loss", "grad_norm"), history(plain, "loss", "grad_norm"))
    assert ours.evaluate()["eval_loss"] == pytest.approx(plain.evaluate()["eval_loss"], rel=1e-4)

    kept = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours" / "checkpoint-6")
    for (name, weight), other in zip(kept.state_dict().items(), ours.model.student.state_dict().values(), strict=True):
        torch.testing.assert_close(weight, other, msg=name)

    again = made(tmp_path / "ours")
    again.train(resume_from_checkpoint=str(tmp_path / "ours" / "checkpoint-3"))
    same(history(again, "loss", "grad_norm"), history(ours, "loss", "grad_norm"))


def test_metrics_of_logits_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="evaluate the student alone"):
        DistillationTrainer(llama(), teacher(), arguments(tmp_path), compute_metrics=lambda found: {})


def test_a_checkpoint_of_another_student_is_refused(tmp_path: Path) -> None:
    small.llama(32, 2, WORDS).save_pretrained(tmp_path / "checkpoint-1")
    with pytest.raises(UsageError, match=r"of another student: model\.layers\.1"):
        made(tmp_path)._load_from_checkpoint(str(tmp_path / "checkpoint-1"))


def test_what_brings_hidden_states_to_the_teachers_width_is_resumed_and_the_best_student_kept(tmp_path: Path) -> None:
    def one() -> Any:
        return DistillationTrainer(
            llama(),
            teacher(),
            arguments(
                tmp_path,
                save_strategy="steps",
                save_steps=3,
                eval_strategy="steps",
                eval_steps=3,
                load_best_model_at_end=True,
            ),
            distillation={**OPTIONS, "hidden": {1: 2}},
            train_dataset=Rows(),
            eval_dataset=Rows(6),
        )

    ours = one()
    ours.train()
    best = transformers.AutoModelForCausalLM.from_pretrained(ours.state.best_model_checkpoint).state_dict()
    for name, weight in ours.model.student.state_dict().items():
        torch.testing.assert_close(weight, best[name], msg=name)
    again = one()
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    same(history(again, "loss", "grad_norm"), history(ours, "loss", "grad_norm"))


@pytest.mark.parametrize(
    ("options", "given", "message"),
    [
        ({"teacher_stage": 0}, {}, "no 'teacher_stage'; its options are alpha"),
        ({}, {"label_smoothing_factor": 0.1}, "loss"),
    ],
)
def test_options_that_are_none_are_refused(tmp_path: Path, options: Any, given: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        DistillationTrainer(llama(), teacher(), arguments(tmp_path, **given), distillation=options)


def test_the_names_are_there() -> None:
    assert zgraph.hf.DistillationTrainer is DistillationTrainer
