"""Hugging Face's Trainer for a student and a teacher."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import nn
from transformers.utils import SAFE_WEIGHTS_NAME

from zgraph.distillation import Distillation
from zgraph.engine.checkpoint.tensors import whole_state_dict
from zgraph.errors import UsageError
from zgraph.hf.trainer import Trainer

_STUDENT = "student."


class DistillationTrainer(Trainer):  # type: ignore[misc]
    """Trainer whose loss is that of `zgraph.distill`. Its checkpoints have the student alone, which
    `from_pretrained` loads.

    Args:
        model: the student.
        teacher: frozen; it is sharded like the student.
        distillation: options of `zgraph.distill`, such as `{"temperature": 2.0, "alpha": 0.3}`.
        args, kwargs: as `zgraph.hf.Trainer` takes them.

    Raises:
        UsageError: the models do not fit each other or the options, or metrics of logits are asked for.
    """

    model: Any
    _signature_columns: list[str] | None

    def __init__(
        self,
        model: nn.Module,
        teacher: nn.Module,
        *args: Any,
        distillation: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if kwargs.get("compute_metrics") is not None:
            raise UsageError("compute_metrics reads logits, which distillation never makes: evaluate the student alone")
        super().__init__(Distillation(model, teacher, **(distillation or {})), *args, **kwargs)
        self.model_accepts_loss_kwargs = False

    def _set_signature_columns_if_needed(self) -> None:
        if self._signature_columns is None:
            self._signature_columns = [*inspect.signature(self.model.student.forward).parameters, "labels"]

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        whole = whole_state_dict(self.model, keep=self.args.should_save) if state_dict is None else state_dict
        both = self.model
        try:
            self.model = both.student
            super()._save(output_dir, {n.removeprefix(_STUDENT): v for n, v in whole.items() if _is_students(n)})
        finally:
            self.model = both

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        file = Path(resume_from_checkpoint) / SAFE_WEIGHTS_NAME
        if not file.is_file():
            raise UsageError(f"{resume_from_checkpoint} has no {SAFE_WEIGHTS_NAME} of a student")
        found = {f"{_STUDENT}{name}": value for name, value in load_file(file).items()}
        known = {name for name in self.model.state_dict() if _is_students(name)}
        tied = {f"{_STUDENT}{name}" for name in getattr(self.model.student, "all_tied_weights_keys", ())}
        if wrong := sorted((found.keys() ^ known) - tied):
            raise UsageError(f"{file} is of another student: {wrong[0].removeprefix(_STUDENT)} is in one of them only")
        self.model.load_state_dict(found, strict=False)


def _is_students(name: str) -> bool:
    return name.startswith(_STUDENT)
