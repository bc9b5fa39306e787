"""A model for inference: captured programs, a cache with fixed places, and tokens from them."""

from zgraph.inference.model import Inference, infer

__all__ = ["Inference", "infer"]
