"""Check that DeepSpeed's optimizers for processors share."""

from __future__ import annotations

from zgraph.errors import UsageError


def check_states(are_fp32: bool) -> None:
    """Raise UsageError for states in another dtype than the masters."""
    if not are_fp32:
        raise UsageError("fp32_optimizer_states=False: states have the masters' dtype; leave it out")
