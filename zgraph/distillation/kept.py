"""Logits of a teacher, kept on disk: for each token those of the words that it finds most likely.

    zgraph.keep_logits(teacher, batches, "teacher/", top_k=64)
    model = zgraph.distill(student, None, temperature=2.0, stage=3)
    for batch in DataLoader(zgraph.KeptLogits("teacher/"), batch_size=8, shuffle=True):
        model(**batch).loss.backward()

The teacher runs once, and is gone while its students are trained.
"""

from __future__ import annotations

import os
import re
from bisect import bisect_right
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import Dataset

from zgraph.errors import UsageError

KEPT = frozenset({"teacher_logits", "teacher_words"})
"""Names of what batches bring of a teacher: logits and words, [B, S, K], from the most likely on."""

_FILE = re.compile(r"rank\d+-\d+\.safetensors")


def keep_logits(
    teacher: nn.Module,
    batches: Iterable[Mapping[str, torch.Tensor]],
    folder: str | os.PathLike[str],
    *,
    top_k: int = 64,
) -> int:
    """Run a teacher over batches, and keep of each token the most likely words.

    Each rank writes its own batches. Logits are kept in bf16, words in 4 bytes: 384 bytes a token of 64 words.

    Args:
        teacher: its forward returns `logits` [B, S, V]; a plain model or one that `zgraph.compile` made. Run in eval
            mode.
        batches: tensors of equal first dims, [B, ...], by the names that the teacher's forward has; `labels` are kept,
            and not given to it.
        folder: is made; it must have none of these files yet.
        top_k: words of a token, K.

    Returns:
        The number of batches that this rank wrote.

    Raises:
        UsageError: the folder has such files, the teacher has fewer words, or a batch has names of its own for these.
    """
    to, rank = Path(folder), _rank()
    to.mkdir(parents=True, exist_ok=True)
    if any(to.glob(f"rank{rank}-*.safetensors")):
        raise UsageError(f"{to} has logits of a teacher already: remove them, or take another folder")
    was_training, number = teacher.training, 0
    teacher.eval()
    try:
        for number, batch in enumerate(batches, start=1):
            if both := KEPT & batch.keys():
                raise UsageError(f"a batch has {min(both)} already")
            with torch.no_grad():
                logits = teacher(**{name: value for name, value in batch.items() if name != "labels"}).logits
            if logits.shape[-1] < top_k:
                raise UsageError(f"top_k={top_k}, but the teacher has {logits.shape[-1]} words")
            values, words = logits.topk(top_k, dim=-1)
            kept = {**batch, "teacher_logits": values.bfloat16(), "teacher_words": words.int()}
            whole = {name: value.detach().cpu().contiguous().clone() for name, value in kept.items()}  # none shared
            draft = to / f"rank{rank}-{number:08}.draft"
            save_file(whole, draft)
            draft.rename(draft.with_suffix(".safetensors"))
    finally:
        teacher.train(was_training)
    return number


class KeptLogits(Dataset[dict[str, torch.Tensor]]):
    """The rows of all batches that `keep_logits` kept, with what it kept of the teacher.

    Args:
        folder: as `keep_logits` was given it.

    Raises:
        UsageError: the folder has none, or what a file has is no batch.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.paths = sorted(path for path in Path(folder).glob("rank*.safetensors") if _FILE.fullmatch(path.name))
        if not self.paths:
            raise UsageError(f"{folder} has no logits of a teacher: zgraph.keep_logits writes them")
        self.ends = list(accumulate(_num_rows(path) for path in self.paths))

    def __len__(self) -> int:
        return self.ends[-1]

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """A row: tensors [S, ...] by name, with `teacher_logits` and `teacher_words` [S, K].

        Raises:
            IndexError: there is no such row.
        """
        if not -len(self) <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        index %= len(self)
        number = bisect_right(self.ends, index)
        row = index - (self.ends[number - 1] if number else 0)
        with safe_open(self.paths[number], "pt") as file:
            return {name: file.get_slice(name)[row] for name in file.keys()}  # noqa: SIM118 - no mapping


def _num_rows(path: Path) -> int:
    with ExitStack() as stack:
        try:
            file = stack.enter_context(safe_open(path, "pt"))
        except (SafetensorError, OSError) as error:
            raise UsageError(f"{path} cannot be read: {error}; zgraph.keep_logits writes it anew") from None
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    rows = {shape[0] if shape else 0 for shape in shapes.values()}
    if len(rows) != 1 or not shapes.keys() >= KEPT or len({tuple(shapes[name]) for name in KEPT}) != 1:
        raise UsageError(f"{path} has no batch with logits of a teacher; zgraph.keep_logits writes it anew")
    return int(rows.pop())


def check_kept(has_teacher: bool, inputs: Mapping[str, Any]) -> None:
    """Check that a batch brings what was kept of a teacher, where there is none beside it.

    Raises:
        UsageError: it does not, or there is one.
    """
    if has_teacher:
        raise UsageError(
            f"the batch brings {min(KEPT & inputs.keys())}, but the model has a teacher: pass zgraph.distill(student, "
            "None), or leave it out"
        )
    if missing := KEPT - inputs.keys():
        raise UsageError(
            f"the batch has no {min(missing)}: take it from zgraph.KeptLogits, or give zgraph.distill a teacher"
        )


def _rank() -> int:
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
