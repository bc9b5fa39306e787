"""The costs to plan with where nothing is known of the hardware."""

from __future__ import annotations

from functools import cache

from zgraph.cost.hardware import hardware
from zgraph.cost.table import CostTable


@cache
def default_costs() -> CostTable:
    """Costs where nothing is known: processors, each behind a gigabit link. What is planned for a slow network loses
    nothing on a fast one.
    """
    return CostTable(hardware=hardware("cpu"), per_host=1)
