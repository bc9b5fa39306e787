"""An engine's counts of steps as a state that a replica of an elastic job takes over when it joins."""

from __future__ import annotations

from collections.abc import Mapping

from zgraph.engine.protocol import Trains

COUNTS = ("global_steps", "micro_steps", "skipped_steps")


class Counts:
    """Counts of an engine's steps.

    Args:
        engine: whose.
    """

    def __init__(self, engine: Trains) -> None:
        self._engine = engine

    def state_dict(self) -> dict[str, int]:
        """The counts, by name."""
        return {name: getattr(self._engine, name) for name in COUNTS}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Go on from counts.

        Raises:
            ValueError: they are none.
        """
        if state.keys() != {*COUNTS} or any(type(count) is not int or count < 0 for count in state.values()):
            raise ValueError(f"{str(state)[:80]} are no counts of steps")
        for name, count in state.items():
            setattr(self._engine, name, count)
