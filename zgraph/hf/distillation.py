"""Hugging Face's Trainer for a student and a teacher."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import nn

from zgraph.distillation import Distillation
from zgraph.distillation.kept import KEPT
from zgraph.engine.checkpoint.tensors import whole_state_dict
from zgraph.errors import UsageError
from zgraph.hf.trainer import Trainer

PROJECTIONS = "projections.safetensors"
"""Beside the student's weights in a checkpoint: what brings its hidden states to the teacher's width."""
_STUDENT = "student."
_OPTIONS = set(inspect.signature(Distillation).parameters) - {"student", "teacher"}


class DistillationTrainer(Trainer):  # type: ignore[misc]
    """Trainer whose loss is that of `zgraph.distill`. Its checkpoints have the student alone, which
    `from_pretrained` loads.

    Args:
        model: the student.
        teacher: frozen; it is sharded like the student. None where rows bring what `zgraph.keep_logits` kept of one.
        distillation: options of `zgraph.distill`, such as `{"temperature": 2.0, "alpha": 0.3}`; the stage is that of
            the Trainer's configuration.
        args, kwargs: as `zgraph.hf.Trainer` takes them.

    Raises:
        UsageError: the models do not fit each other, an option does not fit them or is none, or another loss or metrics
            of logits are asked for.
    """

    model: Any
    _signature_columns: list[str] | None

    def __init__(
        self,
        model: nn.Module,
        teacher: nn.Module | None,
        *args: Any,
        distillation: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        options = dict(distillation or {})
        if unknown := options.keys() - _OPTIONS:
            raise UsageError(f"distillation has no {min(unknown)!r}; its options are {', '.join(sorted(_OPTIONS))}")
        super().__init__(Distillation(model, teacher, **options), *args, **kwargs)
        self.model_accepts_loss_kwargs = False
        if self.compute_metrics is not None:
            raise UsageError("compute_metrics reads logits, which are not returned here: evaluate the student alone")
        if self.compute_loss_func is not None or self.args.label_smoothing_factor:
            raise UsageError("the loss is that of distillation: leave compute_loss_func and label_smoothing_factor out")

    def _set_signature_columns_if_needed(self) -> None:
        if self._signature_columns is None:
            kept = sorted(KEPT) if self.model.teacher is None else []
            self._signature_columns = [*inspect.signature(self.model.student.forward).parameters, "labels", *kept]

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        whole = whole_state_dict(self.model, keep=self.args.should_save) if state_dict is None else state_dict
        both = self.model
        try:
            self.model = both.student
            super()._save(output_dir, {n.removeprefix(_STUDENT): v for n, v in whole.items() if _is_students(n)})
        finally:
            self.model = both
        beside = {n: v.contiguous() for n, v in whole.items() if n.startswith("projections.")}
        if beside and self.args.should_save:
            save_file(beside, Path(output_dir or self.args.output_dir) / PROJECTIONS)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        folder = Path(resume_from_checkpoint)
        parts = [load_file(file) for file in sorted(folder.glob("model*.safetensors"))]
        found = {f"{_STUDENT}{name}": value for part in parts for name, value in part.items()}
        if not found:
            raise UsageError(f"{folder} has no model.safetensors of a student")
        if (folder / PROJECTIONS).is_file():
            found |= load_file(folder / PROJECTIONS)
        known = {name for name in self.model.state_dict() if not name.startswith("teacher.")}
        tied = {f"{_STUDENT}{name}" for name in getattr(self.model.student, "all_tied_weights_keys", None) or ()}
        if wrong := sorted((found.keys() ^ known) - tied):
            raise UsageError(
                f"{folder} is of another student: {wrong[0].removeprefix(_STUDENT)} is in one of them only"
            )
        self.model.load_state_dict(found, strict=False)

    def _load_best_model(self) -> None:
        self._load_from_checkpoint(self.state.best_model_checkpoint)

    def prediction_step(
        self, model: nn.Module, inputs: Any, prediction_loss_only: bool, *args: Any, **given: Any
    ) -> Any:
        return super().prediction_step(model, inputs, True, *args, **given)


def _is_students(name: str) -> bool:
    return name.startswith(_STUDENT)
