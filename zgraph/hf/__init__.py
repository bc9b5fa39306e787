"""Hugging Face's Trainer over zgraph: `from zgraph.hf import Trainer`; nothing else imports transformers.

`enable` does the same to any class derived from it. `Accelerator` compiles what it prepares; `prepare` brings a
compiled model to accelerate's own. These names are loaded when they are first used: `zgraph.hf.adapt` needs neither
transformers nor Accelerate.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from zgraph.hf.accelerator import Accelerator
    from zgraph.hf.accelerators import prepare
    from zgraph.hf.arguments import TrainingArguments
    from zgraph.hf.trainer import Trainer, enable

__all__ = ["Accelerator", "Trainer", "TrainingArguments", "enable", "prepare"]

_HOMES = {
    "Accelerator": "zgraph.hf.accelerator",
    "Trainer": "zgraph.hf.trainer",
    "TrainingArguments": "zgraph.hf.arguments",
    "enable": "zgraph.hf.trainer",
    "prepare": "zgraph.hf.accelerators",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'zgraph.hf' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
