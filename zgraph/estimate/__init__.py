"""Memory and time on hardware that is not here: plans, sweeps and traces."""
