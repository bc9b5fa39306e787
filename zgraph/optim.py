"""Optimizers whose state may lie elsewhere than their parameters."""

from zgraph.runtime.adamw import AdamW

__all__ = ["AdamW"]
