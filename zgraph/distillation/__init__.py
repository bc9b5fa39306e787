"""A student learns from a teacher's logits in one compiled step, with neither's logits whole in memory."""

from zgraph.distillation.kept import KeptLogits, keep_logits
from zgraph.distillation.model import Distillation, Distilled, distill
from zgraph.distillation.pruning import prune_layers

__all__ = ["Distillation", "Distilled", "KeptLogits", "distill", "keep_logits", "prune_layers"]
