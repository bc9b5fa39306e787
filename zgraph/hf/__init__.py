"""Hugging Face's Trainer over zgraph: `from zgraph.hf import Trainer`; only inference imports transformers too.

`enable` does the same to any class derived from it. `DistillationTrainer` trains a student. `Accelerator` compiles what
it prepares; `prepare` brings a compiled model to accelerate's own. `load_pretrained` tells of every weight where it
came from. These names are loaded when they are first used: `zgraph.hf.adapt` needs neither transformers nor Accelerate.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from zgraph.hf.accelerator import Accelerator
    from zgraph.hf.accelerators import prepare
    from zgraph.hf.arguments import TrainingArguments
    from zgraph.hf.distillation import DistillationTrainer
    from zgraph.hf.pretrained import Loaded, load_pretrained, loaded
    from zgraph.hf.trainer import Trainer, enable

__all__ = [
    "Accelerator",
    "DistillationTrainer",
    "Loaded",
    "Trainer",
    "TrainingArguments",
    "enable",
    "load_pretrained",
    "loaded",
    "prepare",
]

_HOMES = {
    "Accelerator": "zgraph.hf.accelerator",
    "DistillationTrainer": "zgraph.hf.distillation",
    "Loaded": "zgraph.hf.pretrained",
    "Trainer": "zgraph.hf.trainer",
    "TrainingArguments": "zgraph.hf.arguments",
    "enable": "zgraph.hf.trainer",
    "load_pretrained": "zgraph.hf.pretrained",
    "loaded": "zgraph.hf.pretrained",
    "prepare": "zgraph.hf.accelerators",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'zgraph.hf' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
