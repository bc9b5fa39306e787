"""A teacher that runs once: what is kept of it trains as it would itself, and files are not trusted."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import DataLoader

import small
import zgraph
from tests.single.test_distillation import batch, models
from zgraph.errors import UsageError


def kept(folder: Path, teacher: nn.Module, top_k: int) -> Any:
    batches = [batch(step, teacher.config.vocab_size) for step in range(3)]
    batches[2]["labels"] = batches[2]["input_ids"]
    assert zgraph.keep_logits(teacher, batches, folder, top_k=top_k) == 3
    return zgraph.KeptLogits(folder)


@pytest.mark.parametrize("logits", ["blocks", "whole"])
def test_with_all_words_kept_the_losses_are_those_of_the_teacher(logits: str, tmp_path: Path) -> None:
    student, teacher = models()
    teacher.train()
    rows = kept(tmp_path, teacher, teacher.config.vocab_size)
    assert teacher.training
    assert len(rows) == 6
    other = copy.deepcopy(student)
    alone = zgraph.distill(student, None, temperature=2.0, alpha=0.3, logits=logits)
    beside = zgraph.distill(other, teacher, temperature=2.0, alpha=0.3, logits=logits)
    optimizers = [torch.optim.SGD(m.student.parameters(), lr=1e-2) for m in (alone, beside)]
    for given in DataLoader(rows, batch_size=2):
        loss = alone(**given).loss
        wanted = beside(input_ids=given["input_ids"], labels=given["labels"]).loss
        assert loss.item() == pytest.approx(wanted.item(), rel=2e-3)  # logits are kept in bf16
        loss.backward()
        wanted.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()


def test_rows_are_those_of_the_batches_and_words_the_most_likely(tmp_path: Path) -> None:
    teacher = small.llama(num_layers=1).eval()
    rows = kept(tmp_path, teacher, 4)
    given = batch(1, teacher.config.vocab_size)
    with torch.no_grad():
        values, words = teacher(input_ids=given["input_ids"]).logits.topk(4)
    for place in (0, 1):
        for row in (rows[2 + place], rows[2 + place - len(rows)]):
            assert torch.equal(row["labels"], given["labels"][place])
            assert torch.equal(row["teacher_words"], words[place].int())
            assert torch.equal(row["teacher_logits"], values[place].bfloat16())
    for index in (6, -7):
        with pytest.raises(IndexError):
            rows[index]


def test_what_is_used_wrongly(tmp_path: Path) -> None:
    student, teacher = models()
    rows = kept(tmp_path / "kept", teacher, 4)
    (given,) = DataLoader(rows, batch_size=6)
    plain = {name: given[name] for name in ("input_ids", "labels")}
    with pytest.raises(UsageError, match='without a teacher loss must be "forward_kl"'):
        zgraph.distill(student, None, loss="jsd")
    with pytest.raises(UsageError, match="the batch has no teacher_logits: take it from"):
        zgraph.distill(copy.deepcopy(student), None)(**plain)
    with pytest.raises(UsageError, match="the batch brings teacher_logits, but the model has a teacher"):
        zgraph.distill(copy.deepcopy(student), copy.deepcopy(teacher))(**given)
    with pytest.raises(UsageError, match="has logits of a teacher already"):
        zgraph.keep_logits(teacher, [plain], tmp_path / "kept")
    with pytest.raises(UsageError, match="top_k=10000, but the teacher has"):
        zgraph.keep_logits(teacher, [plain], tmp_path / "more", top_k=10_000)
    with pytest.raises(UsageError, match="a batch has teacher_logits already"):
        zgraph.keep_logits(teacher, [given], tmp_path / "other")
    with pytest.raises(UsageError, match=r"has no logits of a teacher: zgraph\.keep_logits writes them"):
        zgraph.KeptLogits(tmp_path / "nothing")


@pytest.mark.parametrize("change", ["cut", "without", "rows", "shapes"])
def test_files_that_are_no_batch(change: str, tmp_path: Path) -> None:
    path = tmp_path / "rank0-00000001.safetensors"
    good = {"teacher_logits": torch.zeros(2, 3, 4), "teacher_words": torch.zeros(2, 3, 4, dtype=torch.int32)}
    changed = {
        "cut": good,
        "without": {"teacher_logits": good["teacher_logits"]},
        "rows": {**good, "labels": torch.zeros(3, 3)},
        "shapes": {**good, "teacher_words": torch.zeros(2, 3, 5)},
    }
    save_file(changed[change], path)
    if change == "cut":
        path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(UsageError, match=r"cannot be read|has no batch with logits"):
        zgraph.KeptLogits(tmp_path)
