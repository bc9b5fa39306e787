"""Constants of the hardware profiles, fitted to published steps.

What is minimised is the sum over rows of the squared logarithm of predicted over measured, each system with the same
weight however many rows it has, and over constants of the squared distance from what was known before, in units of how
well that was known: Gauss-Newton with a Gaussian prior (Tarantola, "Inverse Problem Theory", 2005, section 3.4). A few
constants and a prior for each keep a system with few rows from bending what all others share.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from benchmarks.published.predict import Prediction, costs_of
from benchmarks.published.rows import Row
from zgraph.cost import CostTable, Hardware, Link
from zgraph.cost.hardware import AttentionRate

ROW_SPREAD = 0.08
"""How far a step that is modelled well lies from the model, as the standard deviation of a logarithm."""

BACKWARD_SHARE = 0.75
"""Rate of attention's backward over that of its forward, in the figures of Dao, "FlashAttention-2", 2023."""

HALF_SEQUENCE = {"flash": 400.0, "triton": 400.0}
"""Keys at which a kernel of attention reaches half of its rate, read off the same figures."""

NUM_ITERATIONS = 20
STEP = 0.02
"""Of a difference quotient, downwards: shares end at 1."""


@dataclass(frozen=True)
class Constant:
    """Prior of a constant, before any row is seen: its value, and the standard deviation of its logarithm."""

    value: float
    spread: float


PRIORS: Mapping[str, Constant] = {
    "sustained ampere": Constant(0.85, 0.15),
    "sustained hopper": Constant(0.75, 0.15),
    "low power": Constant(0.87, 0.08),
    "flash ampere": Constant(0.70, 0.2),
    "flash hopper": Constant(0.45, 0.2),
    "triton ampere": Constant(0.33, 0.3),
    "triton hopper": Constant(0.20, 0.3),
    "memory": Constant(0.80, 0.15),
    "fused": Constant(0.75, 0.2),
    "update": Constant(0.80, 0.2),
    "half dim": Constant(60.0, 0.7),
    "within": Constant(0.85, 0.15),
    "between": Constant(0.85, 0.2),
    "slowdown": Constant(1.06, 0.05),
    "collectives of 2021": Constant(1.0, 2.0),
}

LOW_POWER = ("h100-96",)
"""Devices of 500 W in the place of 700. Power grows with about the 2.5th power of the clock, so the clock of what is
bound by power is (500 / 700) ** (1 / 2.5) of the other's: 0.87."""

Constants = Mapping[str, float]


def prior() -> dict[str, float]:
    """The constants before any row is seen."""
    return {name: known.value for name, known in PRIORS.items()}


def architecture(hardware: Hardware) -> str:
    """The architecture whose constants a device has."""
    return "ampere" if hardware.name.startswith("a1") else "hopper"


def with_constants(hardware: Hardware, constants: Constants) -> Hardware:
    """The profile with fitted constants."""
    kind = architecture(hardware)
    attention = {
        name: AttentionRate(
            forward=min(constants[f"{name} {kind}"], 1),
            backward=min(BACKWARD_SHARE * constants[f"{name} {kind}"], 1),
            half_sequence=half,
        )
        for name, half in HALF_SEQUENCE.items()
    }
    power = constants["low power"] if hardware.name in LOW_POWER else 1.0
    device = {
        "sustained": min(constants[f"sustained {kind}"] * power, 1),
        "matmul_half_dim": constants["half dim"],
        "memory_share": min(constants["memory"], 1),
        "fused_share": min(constants["fused"], 1),
        "update_share": min(constants["update"], 1),
        "attention": attention,
    }
    return hardware.model_copy(
        update={
            "device": hardware.device.model_copy(update=device),
            "within": _shared(hardware.within, constants["within"]),
            "between": _shared(hardware.between, constants["between"]),
            "overlap_slowdown": max(constants["slowdown"], 1.0),
        }
    )


def _shared(link: Link, share: float) -> Link:
    return link.model_copy(update={"share": min(share, 1.0)})


def costs(row: Row, constants: Constants) -> CostTable:
    """The costs of a row with these constants."""
    if "2021" in row.system:
        share = constants["collectives of 2021"]
        constants = {**constants, "within": share, "between": share}
    table = costs_of(row)
    return table.model_copy(update={"hardware": with_constants(table.hardware, constants)})


def step_s(prediction: Prediction, constants: Constants) -> float:
    """Seconds of a step with these constants."""
    return prediction.step_s(costs(prediction.row, constants))


@dataclass(frozen=True)
class Linearised:
    """Logarithms of the steps of some rows as linear functions of those of the constants, around a point.

    Args:
        families: of each row, what it is left out with.
        point: logarithms of the constants.
        errors: logarithms of predicted over measured there.
        slopes: [rows, constants].
    """

    families: tuple[str, ...]
    point: NDArray[np.float64]
    errors: NDArray[np.float64]
    slopes: NDArray[np.float64]

    @classmethod
    def at(cls, predictions: Sequence[Prediction], constants: Constants) -> Linearised:
        """The steps around these constants."""
        point = np.log([constants[name] for name in PRIORS])
        errors = np.array([_error(p, constants) for p in predictions])
        slopes = np.zeros((len(predictions), len(PRIORS)))
        for column, name in enumerate(PRIORS):
            moved = {**constants, name: constants[name] * math.exp(-STEP)}
            for row, prediction in enumerate(predictions):
                if _matters(name, prediction):
                    slopes[row, column] = (errors[row] - _error(prediction, moved)) / STEP
        return cls(tuple(p.row.family for p in predictions), point, errors, slopes)

    def solved(self, left_out: str = "") -> dict[str, float]:
        """The constants that explain the rows best, without those of one family; errors beyond twice the spread count
        by their size, not by their square (Huber, 1964).
        """
        used = np.array([family != left_out for family in self.families])
        counts = Counter(self.families)
        weights = np.array([1 / math.sqrt(row_weight(counts[family])) for family in self.families])[used] / ROW_SPREAD
        known, spread = np.log([c.value for c in PRIORS.values()]), np.array([c.spread for c in PRIORS.values()])
        errors, slopes = self.errors[used], self.slopes[used]
        change = np.zeros(len(PRIORS))
        for _ in range(NUM_ITERATIONS):
            here = errors + slopes @ change
            robust = weights / np.sqrt(np.maximum(np.abs(here) / (2 * ROW_SPREAD), 1))
            a = np.concatenate([robust[:, None] * slopes, np.diag(1 / spread)])
            b = np.concatenate([-robust * errors, (known - self.point) / spread])
            change = np.linalg.lstsq(a, b, rcond=None)[0]
        return dict(zip(PRIORS, np.exp(self.point + change).tolist(), strict=True))


def fit(predictions: Sequence[Prediction], num_rounds: int = 4) -> tuple[dict[str, float], Linearised]:
    """The constants that explain the rows best, and the steps as functions of them there."""
    constants = prior()
    for _ in range(num_rounds):
        near = Linearised.at(predictions, constants)
        constants = near.solved()
    return constants, near


def _error(prediction: Prediction, constants: Constants) -> float:
    return math.log(step_s(prediction, constants) / prediction.row.measured_s)


def _matters(name: str, prediction: Prediction) -> bool:
    """Whether a constant can change a row's step."""
    row = prediction.row
    if name.split()[-1] in ("ampere", "hopper"):
        is_attention = name.split()[0] in HALF_SEQUENCE
        return name.endswith(architecture(row.hardware)) and (not is_attention or name.startswith(row.attention))
    if name in ("within", "between", "slowdown"):
        return row.num_ranks > 1
    if name == "fused":
        return row.is_fused or bool(row.compute)
    if name == "low power":
        return row.hardware.name in LOW_POWER
    return ("2021" in row.system) if "2021" in name else True


def row_weight(count: int) -> float:
    """How many rows of one system count as one: all but a few tell the same."""
    return max(count / 8, 1.0)
