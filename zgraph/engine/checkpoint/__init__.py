"""Checkpoints of the engine: written, read, and exported."""
