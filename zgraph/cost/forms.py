"""A step in closed form: FLOP, bytes and time as expressions in the number of ranks and the symbolic sizes.

Sizes that were symbols at capture (the batch, the sequence: `zgraph.trace(..., dynamic=True)`) stay symbols here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import sympy

from zgraph.cost.hardware import Hardware
from zgraph.cost.work import work
from zgraph.ir import Graph, InputKind
from zgraph.ir.symbols import symbol

NUM_RANKS = symbol("N")
"""The symbol for the number of ranks."""

ROUNDS: Mapping[int, int] = {0: 2, 1: 2, 2: 2, 3: 3}
"""Times that (N - 1) / N of all parameters cross the wire: an all-reduce is a reduce-scatter and an all-gather."""


@dataclass(frozen=True)
class StepForm:
    """One training step of one rank.

    Args:
        flop: of all matmuls.
        moved_bytes: memory read and written by all other ops.
        num_ops: ops that do either.
        parameter_bytes: of the whole model, in the dtype that it is gathered in.
        dtype: of the matmuls.
    """

    flop: sympy.Expr
    moved_bytes: sympy.Expr
    num_ops: int
    parameter_bytes: int
    dtype: str

    def wire_bytes(self, stage: int) -> sympy.Expr:
        """Bytes that one rank sends in a step (Rajbhandari et al., "ZeRO", 2020, section 7).

        Raises:
            KeyError: there is no such stage.
        """
        return ROUNDS[stage] * self.parameter_bytes * (NUM_RANKS - 1) / NUM_RANKS

    def computing_s(self, hardware: Hardware) -> sympy.Expr:
        """Seconds of computing, every op at the profile's best rate."""
        device = hardware.device
        launches = self.num_ops * device.launch_us / 1e6
        return self.flop / device.rate(self.dtype) + self.moved_bytes / device.memory_bytes_per_s + launches

    def step_s(self, stage: int, hardware: Hardware) -> sympy.Expr:
        """Seconds of a step that hides all communication it can: the larger of computing and the slowest link."""
        bytes_per_s = hardware.within.rate
        if hardware.num_hosts > 1:
            bytes_per_s = min(bytes_per_s, hardware.devices_per_host * hardware.between.rate)
        return sympy.Max(self.computing_s(hardware), self.wire_bytes(stage) / bytes_per_s)


def closed_form(graph: Graph) -> StepForm:
    """The closed form of a captured graph (before or after its passes)."""
    flop: sympy.Expr = sympy.Integer(0)
    moved: sympy.Expr = sympy.Integer(0)
    num_ops, dtype = 0, "f32"
    for node in graph.nodes:
        done = work(graph, node)
        if done.flop != 0:
            flop, dtype = flop + done.flop, done.dtype
        else:
            moved += done.num_bytes
        num_ops += bool(done.flop != 0 or done.num_bytes != 0)
    parameters = sum(
        int(i.value.tensor.numel) * i.value.tensor.dtype.itemsize for i in graph.inputs if i.kind is InputKind.param
    )
    return StepForm(sympy.expand(flop), sympy.expand(moved), num_ops, parameters, dtype)
