"""What a plan costs: bytes over the step, bytes on the wire. No torch here."""

from zgraph.cost.memory import MemoryCurve, Moment, simulate_memory
from zgraph.cost.wire import Traffic, traffic

__all__ = ["MemoryCurve", "Moment", "Traffic", "simulate_memory", "traffic"]
