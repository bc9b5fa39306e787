"""The options of `zgraph.compile`: what they mean, and what is refused."""
