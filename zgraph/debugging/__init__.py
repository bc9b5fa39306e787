"""Debugger of the compiler: a check on simulated ranks, the rewrite that is to blame, a small failing graph."""

from zgraph.debugging.bisection import Culprit, bisect
from zgraph.debugging.check import differs, examine, reference
from zgraph.debugging.known import Known, Reference
from zgraph.debugging.outcome import Difference, Failure
from zgraph.debugging.programs import Programs
from zgraph.debugging.reduction import Commanded, Passed, reduce
from zgraph.debugging.rounding import Rounding

__all__ = [
    "Commanded",
    "Culprit",
    "Difference",
    "Failure",
    "Known",
    "Passed",
    "Programs",
    "Reference",
    "Rounding",
    "bisect",
    "differs",
    "examine",
    "reduce",
    "reference",
]
