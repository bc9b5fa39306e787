"""A student learns from a teacher's logits in one compiled step, with neither's logits whole in memory."""

from zgraph.distillation.model import Distillation, Distilled, distill
from zgraph.distillation.pruning import prune_layers

__all__ = ["Distillation", "Distilled", "distill", "prune_layers"]
