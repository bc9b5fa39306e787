"""Optimizers over local shards: what lies side by side in memory is updated as one."""

from zgraph.optim.adamw import AdamW
from zgraph.optim.lion import Lion
from zgraph.optim.sgd import SGD

__all__ = ["SGD", "AdamW", "Lion"]
