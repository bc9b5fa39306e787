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

NUM_ITERATIONS = 6
STEP = 0.02
"""Of a difference quotient."""


@dataclass(frozen=True)
class Constant:
    """What is known of a constant before any row is seen: its value, and the standard deviation of its logarithm."""

    value: float
    spread: float


PRIORS: Mapping[str, Constant] = {
    "sustained ampere": Constant(0.85, 0.15),
    "sustained hopper": Constant(0.75, 0.15),
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
    device = {
        "sustained": min(constants[f"sustained {kind}"], 1),
        "matmul_half_dim": constants["half dim"],
        "memory_share": min(constants["memory"], 1),
        "fused_share": min(constants["fused"], 1),
        "update_share": min(constants["update"], 1),
        "attention": attention,
    }
    return hardware.model_copy(
        update={
            "device": hardware.device.model_copy(update=device),
            "within": _scaled(hardware.within, constants["within"]),
            "between": _scaled(hardware.between, constants["between"]),
            "overlap_slowdown": max(constants["slowdown"], 1.0),
        }
    )


def _scaled(link: Link, share: float) -> Link:
    return Link(bytes_per_s=link.bytes_per_s * share, latency_us=link.latency_us)


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


def fit(predictions: Sequence[Prediction]) -> dict[str, float]:
    """The constants that explain the rows best."""
    names = list(PRIORS)
    center = np.log([PRIORS[n].value for n in names])
    spread = np.array([PRIORS[n].spread for n in names])
    counts = Counter(p.row.family for p in predictions)
    weights = np.array([1 / math.sqrt(_weight(counts[p.row.family])) for p in predictions]) / ROW_SPREAD

    def errors(point: NDArray[np.float64]) -> NDArray[np.float64]:
        constants = dict(zip(names, np.exp(point).tolist(), strict=True))
        return np.array([math.log(step_s(p, constants) / p.row.measured_s) for p in predictions])

    point = center.copy()
    for _ in range(NUM_ITERATIONS):
        here = errors(point)
        steps = np.eye(len(names)) * STEP
        slopes = np.stack([(errors(point + step) - here) / STEP for step in steps], axis=1)
        robust = weights / np.sqrt(np.maximum(np.abs(here) / (2 * ROW_SPREAD), 1))
        a = np.concatenate([robust[:, None] * slopes, np.diag(1 / spread)])
        b = np.concatenate([-robust * here, (center - point) / spread])
        change = np.linalg.lstsq(a, b, rcond=None)[0]
        point = point + np.clip(change, -0.3, 0.3)
        if np.abs(change).max() < 0.003:
            break
    return dict(zip(names, np.exp(point).tolist(), strict=True))


def _weight(count: int) -> float:
    """How many rows of one system count as one: all but a few tell the same."""
    return max(count / 8, 1.0)
