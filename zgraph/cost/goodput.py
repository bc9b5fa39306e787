"""Goodput: the share of a job's time that ends up in the model, when it fails now and then and saves checkpoints.

Failures come at random with a constant rate. Training saves a checkpoint behind each interval; what fails begins again
at the last one, and may fail while it restarts or saves. The expected time is exact under that model: J. T. Daly, "A
higher order estimate of the optimum checkpoint interval for restart dumps", FGCS 22 (2006), equation 13.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from scipy.optimize import minimize_scalar

from zgraph.errors import UsageError


@dataclass(frozen=True)
class Failures:
    """A job that fails.

    Args:
        every_s: mean time between two failures of the whole job, in seconds.
        checkpoint_s: time that training stands still for a checkpoint.
        restart_s: time from a failure until training goes on.

    Raises:
        UsageError: a time is negative or not finite, or there is none between failures.
    """

    every_s: float
    checkpoint_s: float = 0.0
    restart_s: float = 0.0

    def __post_init__(self) -> None:
        if not 0 < self.every_s < math.inf:
            raise UsageError(f"the time between failures must be above 0 seconds, not {self.every_s:g}")
        if not (0 <= self.checkpoint_s < math.inf and 0 <= self.restart_s < math.inf):
            raise UsageError("a checkpoint and a restart take 0 seconds or more")


@dataclass(frozen=True)
class Goodput:
    """Shares of a job's time.

    Args:
        useful: in steps that stay.
        checkpoints: in checkpoints that are kept.
        restarts: from failures until training goes on.
        lost: in steps and checkpoints that a failure undid.
        interval_s: training between two checkpoints, in seconds.
    """

    useful: float
    checkpoints: float
    restarts: float
    lost: float
    interval_s: float


def goodput(failures: Failures, interval_s: float) -> Goodput:
    """Shares of the time of a job that saves a checkpoint after each `interval_s` seconds of training.

    Raises:
        UsageError: the interval is no time, or so long that the job would not get through one.
    """
    if not 0 < interval_s < math.inf:
        raise UsageError(f"the time between checkpoints must be above 0 seconds, not {interval_s:g}")
    mean, save, restart = failures.every_s, failures.checkpoint_s, failures.restart_s
    if (interval_s + save + restart) / mean > 500:
        raise UsageError(
            f"a failure every {mean:,.0f} s on average, and {interval_s + save:,.0f} s between checkpoints: "
            "the job would never get there; save more often"
        )
    failed = math.expm1((interval_s + save) / mean)  # failures before an interval is through
    down = failed * mean * math.expm1(restart / mean)
    total = mean * math.exp(restart / mean) * failed
    useful, kept = interval_s / total, save / total
    return Goodput(useful, kept, down / total, max(1 - useful - kept - down / total, 0.0), interval_s)


def best_interval_s(failures: Failures, least_s: float) -> float:
    """The time between checkpoints with the best goodput, and at least a step.

    Args:
        failures: of the job.
        least_s: the time of a step.

    Raises:
        UsageError: a checkpoint takes so long that the job would not get through one.
    """
    mean, save = failures.every_s, failures.checkpoint_s
    if not save:
        return least_s
    if save > 100 * mean:
        raise UsageError(
            f"a checkpoint takes {save:,.0f} s, and the job fails every {mean:,.0f} s on average: it would never get "
            "there; save faster, or to a nearer place"
        )
    bounds = (math.log(1e-6 * mean), math.log(100 * mean))
    found = minimize_scalar(
        lambda x: math.expm1((math.exp(x) + save) / mean) / math.exp(x), bounds=bounds, method="bounded"
    )
    return max(math.exp(found.x), least_s)
