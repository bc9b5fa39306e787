"""What a compiler did wrong: a check on simulated ranks, the rewrite that is to blame, a small failing graph."""

from zgraph.debugging.bisection import Culprit, bisect
from zgraph.debugging.check import Difference, Failure, Reference, differs, examine, reference
from zgraph.debugging.reduction import Commanded, Passed, reduce

__all__ = [
    "Commanded", "Culprit", "Difference", "Failure", "Passed", "Reference", "bisect", "differs", "examine", "reduce",
    "reference",
]  # fmt: skip
