"""The parts of the pass `fuse`: patterns, groups, candidates, losses, rotary embeddings."""
