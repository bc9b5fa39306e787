"""A training on simulated ranks, as the runtime does it: what lives from one micro-step to the next, and the update.

Parameters are at rest as each rank holds them. Gradients that a program leaves on the rank are held for the program
that adds them, gathers with `keep` are kept while parameters stay the same, and buffers go on from their new values.
The update is plain SGD on what is at rest. A graph for one device runs on each rank alone, and what the ranks have of
their own is averaged outside.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from copy import copy
from dataclasses import dataclass
from typing import Any

import torch

from zgraph.bridge.aten import TO_TORCH
from zgraph.debugging.draws import Disturb, Drawing
from zgraph.debugging.numbers import Numbers, as_dtype
from zgraph.debugging.programs import MicroStep, Programs
from zgraph.interpreter import Interpreter, Ranks, mean, shards, whole
from zgraph.ir import Graph, Input, InputKind, Output, OutputKind, TensorType

Outputs = list[Ranks | None]
"""The outputs of a micro-step, whole."""

Rates = Mapping[str, float]
"""How far each parameter goes against its gradient, by the parameter's name in the model."""

CHANGE = 0.1
"""An update changes a parameter by about this much of its largest number."""

_SEEDS_APART = 15_485_863
"""Seeds of micro-steps are this far apart."""


@dataclass(frozen=True)
class Setting:
    """Settings that the runs of one check have in common.

    Args:
        numbers: the inputs.
        zero_tangents: tangents that are zero where only the loss is differentiated.
        draws: which of the captured graph's draws each random node stands for.
        disturb: changes the operands of ops that compute.
        own: positions of outputs that are not averaged over the ranks yet, though the graph is placed.
    """

    numbers: Numbers
    zero_tangents: frozenset[str]
    draws: Mapping[str, int]
    disturb: Disturb | None = None
    own: Collection[int] = ()


class Training:
    """Micro-steps of a graph's programs, one after another.

    Args:
        programs: to run, as they are to be run.
        setting: what they are run on.
    """

    def __init__(self, programs: Programs, setting: Setting) -> None:
        self.programs, self.setting = programs, setting
        self.graph, self.numbers = programs.synced, setting.numbers
        self.num_ranks = setting.numbers.num_ranks
        self.names = {i.value.name: i.target or i.value.name for i in self.graph.params}
        self.accumulating = {n.option("target") for n in self.graph.nodes if n.op == "accumulate"}
        self.interpreter = Interpreter(self.num_ranks)
        self.masters = {i.value.name: self._at_rest(i) for i in self.graph.params}
        self.resident: dict[str, Ranks] = {}
        self.buffers: dict[str, Ranks] = {}
        self.gradients: dict[str, Ranks] = {}
        self._refresh()

    def run(self, step: MicroStep) -> Outputs:
        """The outputs of a micro-step: those of shards put together again."""
        graph, interpreter = self.programs.program(step), self.interpreter
        seed = self.numbers.seed + _SEEDS_APART * step.batch
        interpreter.caller = Drawing(self.setting.draws, seed, graph, self.setting.disturb)
        interpreter.syncs = step.syncs
        given = self._given(graph, step)
        outputs = interpreter.run(graph, given, {name: r for name, r in self.resident.items() if name in given})
        wholes = [
            None if r is None else whole(o, r, graph.num_shards if graph.mesh else 0)
            for o, r in zip(graph.outputs, outputs, strict=True)
        ]
        for index, (output, made) in enumerate(zip(graph.outputs, wholes, strict=True)):
            if made is not None:
                self._leave(index, output, made, step.syncs)
        if step.syncs:
            self.forget_copies()
        return wholes

    def fork(self) -> Training:
        """Another that goes on from here, and leaves this one as it is."""
        other = copy(self)
        other.interpreter = Interpreter(self.num_ranks)
        other.interpreter.held, other.interpreter.kept = dict(self.interpreter.held), dict(self.interpreter.kept)
        other.masters, other.resident = dict(self.masters), dict(self.resident)
        other.buffers, other.gradients = dict(self.buffers), dict(self.gradients)
        return other

    def forget_copies(self) -> None:
        """Let go of gathered parameters that were kept for the next micro-step."""
        self.interpreter.kept.clear()

    def update(self, rates: Rates) -> None:
        """Change the parameters, and let go of gradients."""
        for entry in self.graph.params:
            name, kind = entry.value.name, entry.value.tensor
            gradients = self.gradients.get(name)
            if gradients is None:
                continue
            rate = rates.get(self.names[name], 0.0)
            steps = shards(gradients, kind, self.graph.num_shards)
            self.masters[name] = [
                master.sub(step.to(master.dtype).view(master.shape), alpha=rate)
                for master, step in zip(self.masters[name], steps, strict=True)
            ]
        self.gradients.clear()
        self.forget_copies()
        self._refresh()

    def rates(self, floor: float) -> Rates:
        """Rates at which an update changes parameters, but by no more than a gradient below the floor is worth."""
        found = {}
        for name, gradients in self.gradients.items():
            size = max((float(t.abs().max()) for t in self.masters[name] if t.numel()), default=0.0)
            slope = float(gradients[0].abs().max()) if gradients[0].numel() else 0.0
            rate = CHANGE * size / max(slope, floor)
            found[self.names[name]] = rate if rate < float("inf") else 0.0
        return found

    # --- at rest ---------------------------------------------------------------------------------------------------

    def _at_rest(self, entry: Input) -> Ranks:
        """A parameter's master as each rank holds it."""
        kind, master = entry.value.tensor, entry.master or entry.value.tensor.dtype
        given = as_dtype(self.numbers.rest[entry.value.name], TO_TORCH[master])
        own = [given.clone() for _ in range(self.num_ranks)]
        return [t.clone() for t in shards(own, kind, self.graph.num_shards)]

    def _refresh(self) -> None:
        """Make what is computed with anew, where it is no master itself."""
        for entry in self.graph.params:
            wanted = TO_TORCH[entry.value.tensor.dtype]
            self.resident[entry.value.name] = [as_dtype(t, wanted) for t in self.masters[entry.value.name]]

    def _given(self, graph: Graph, step: MicroStep) -> dict[str, Any]:
        known = {**self.numbers.rest, **self.buffers, **self.numbers.batch(step.batch)}
        entries = {i.value.name: i for i in graph.inputs if i.value.name in known}
        return {name: self._fed(entry, known[name], step) for name, entry in entries.items()}

    def _fed(self, entry: Input, value: Any, step: MicroStep) -> Any:
        kind = entry.value.type
        if not isinstance(kind, TensorType) or entry.kind is InputKind.param:
            return value
        scale = 1.0
        if entry.kind is InputKind.tangent:
            scale = 0.0 if step.loss_only and entry.value.name in self.setting.zero_tangents else step.scale

        def fed(tensor: torch.Tensor) -> torch.Tensor:
            made = as_dtype(tensor, TO_TORCH[kind.dtype])
            return made if scale == 1.0 or not made.is_floating_point() else made * scale

        return [fed(t) for t in value] if isinstance(value, list) else fed(value)

    # --- what a program leaves -------------------------------------------------------------------------------------

    def _leave(self, index: int, output: Output, made: Ranks, syncs: bool) -> None:
        is_own = not self.graph.mesh or index in self.setting.own
        entry = next((i for i in self.graph.inputs if i.value.name == output.target), None)
        if entry is None:
            return
        name = entry.value.name
        if output.kind is OutputKind.mutation and entry.kind is InputKind.buffer:
            self.buffers[name] = [made[0]] * self.num_ranks if is_own else made
        elif output.kind is OutputKind.grad and entry.kind is InputKind.param:
            self._accumulate(name, [mean(made)] * self.num_ranks if is_own else made, syncs)

    def _accumulate(self, name: str, made: Ranks, syncs: bool) -> None:
        """Hold what the next micro-steps add to, or add to the gradient."""
        target = self.names[name]
        held = not syncs and target in self.accumulating
        kept, key = (self.interpreter.held, target) if held else (self.gradients, name)
        before = kept.get(key)
        kept[key] = made if before is None else [b + m for b, m in zip(before, made, strict=True)]
