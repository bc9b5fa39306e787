"""Hugging Face's Trainer over zgraph: `from zgraph.hf import Trainer` instead of `from transformers import Trainer`.

`enable` does the same to any class derived from it, and `prepare` brings a compiled model to an Accelerator.
"""

from zgraph.hf.accelerators import prepare
from zgraph.hf.trainer import Trainer, enable

__all__ = ["Trainer", "enable", "prepare"]
