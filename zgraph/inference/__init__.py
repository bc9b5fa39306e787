"""A model for inference: captured programs, a cache with fixed places, and tokens from them."""

from zgraph.inference.exporting import export_model
from zgraph.inference.forwards import Inference
from zgraph.inference.generation import Generator
from zgraph.inference.model import infer
from zgraph.inference.serving import serving

__all__ = ["Generator", "Inference", "export_model", "infer", "serving"]
