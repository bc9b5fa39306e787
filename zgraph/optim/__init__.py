"""Optimizers over local shards: adjacent parameters are updated in one call."""

from zgraph.optim.adamw import AdamW
from zgraph.optim.compact import CompactAdamW
from zgraph.optim.lion import Lion
from zgraph.optim.local_steps import LocalSteps, Nesterov
from zgraph.optim.muon import Muon
from zgraph.optim.one_bit_adam import OneBitAdam
from zgraph.optim.sgd import SGD

__all__ = ["SGD", "AdamW", "CompactAdamW", "Lion", "LocalSteps", "Muon", "Nesterov", "OneBitAdam"]
