"""An observer of one capture, which keeps its plan if what torch traced is what was rehearsed."""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from zgraph.bridge.aten import FROM_TORCH
from zgraph.capture.importer import Leaf
from zgraph.capture.rehearsal import INPUT, Rehearsal, Traced, names_of, trace
from zgraph.compiler.plan_cache import PlanCache
from zgraph.cost.workspace import NUM_THREADS
from zgraph.errors import in_one_line
from zgraph.ir import Graph, InputKind, OutputKind, Phase
from zgraph.passes.core.instruments import PassSummary
from zgraph.runfile.format import RunFile
from zgraph.runfile.kept import Bound, Constant, Kept, Reuse, arguments, steps_of
from zgraph.runtime.reused import constant_text

CAPTURE, FAILED = "capture", "failed"
"""Words of the first rank in the place of a plan: the others capture together with it, or without it."""


@dataclass
class Observer:
    """Sees what is captured in one call, and keeps its plan.

    Args:
        model: the model.
        rehearsal: of the call.
        key: of the plan.
        leaves: of the call's arguments.
        cache: keeps the plan.
        tell: is given the plan for the other ranks, or why there is none for them; None where none waits.

    `why` says why the plan is not kept; it is empty if it is.
    """

    model: nn.Module
    rehearsal: Rehearsal
    key: str
    leaves: Sequence[Any]
    cache: PlanCache
    tell: Callable[[str], None] | None = None
    why: str = "torch.compile had captured it before"
    is_kept: bool = False

    def __post_init__(self) -> None:
        self._traced: Traced | None = None
        self._inputs: list[tuple[str, str]] = []
        self._outputs: list[int | None] = []
        self._constants: list[Constant] = []

    def saw(self, gm: fx.GraphModule, examples: Sequence[Any], leaves: Mapping[int, Leaf]) -> None:
        """Compare what torch has traced with what was rehearsed."""
        names = names_of(self.model, self.leaves)
        self._traced, self.why = None, ""
        self._inputs = [_place(leaves[i], names.get(id(e), "")) for i, e in enumerate(examples)]
        if not all(target for _, target in self._inputs):
            self.why = "the graph reads what is neither a parameter, a buffer nor an argument"
            return
        try:
            self._traced = traced = trace(gm, examples, names)
        except Exception as error:
            self.why = f"the graph does not run on tensors without data ({in_one_line(error)})"
            return
        places = {term: index for index, term in reversed([*enumerate(traced.terms)])}
        wanted = [r.term for r in self.rehearsal.results if r.input is None]
        if not set(wanted) <= places.keys() or traced.written != self.rehearsal.written:
            self.why = "torch.compile traced something else than what runs without it"
            return
        self._outputs = [None if r.input is not None else places[r.term] for r in self.rehearsal.results]

    def takes(self, graph: Graph, constants: Mapping[str, torch.Tensor], hints: Mapping[str, int]) -> bool:
        """Whether the plan of a captured graph will be kept; the others are told if not."""
        if not self.why and self.is_kept:
            self.why = "the call has several graphs"
        self.why = self.why or self._problem(graph, constants, hints)
        if self.why:
            self._say(CAPTURE)
        return not self.why

    def keep(self, run: RunFile, steps: Sequence[PassSummary], said: tuple[str, str]) -> None:
        """Keep a plan, and give it to the others."""
        assert self._traced is not None
        values = [i.value.name for i in arguments(run.graph())]
        inputs = tuple(
            Bound.model_validate({"value": value, "kind": kind, "target": target})
            for value, (kind, target) in zip(values, self._inputs, strict=True)
        )
        reuse = Reuse(
            key=self.key,
            inputs=inputs,
            constants=tuple(self._constants),
            outputs=tuple(self._outputs),
            requires_grad=tuple(self._traced.requires_grad),
            steps=steps_of(steps),
            said=said,
        )
        held = Kept(run, reuse).signed().to_bytes()
        self.cache.keep(self.key, held)
        self.is_kept = True
        self._say(base64.b64encode(held).decode())

    def runs(self) -> None:
        """A program begins: nobody must wait for a plan any more."""
        self._say(CAPTURE)

    def failed(self) -> None:
        """The capture has failed."""
        self._say(FAILED)

    def _say(self, word: str) -> None:
        if self.tell is not None:
            tell, self.tell = self.tell, None
            tell(word)

    def _problem(self, graph: Graph, constants: Mapping[str, torch.Tensor], hints: Mapping[str, int]) -> str:
        """Why a captured graph cannot be called by what is known of it; empty if it can."""
        traced = self._traced
        if traced is None:
            return "the call has several graphs"
        self._constants = []
        for name, constant in constants.items():
            if (data := constant_text(constant)) is None:
                return f"the graph holds a tensor of shape {tuple(constant.shape)} that the model's code has made"
            kind, shape = FROM_TORCH[constant.dtype], tuple(constant.shape)
            self._constants.append(Constant(name=name, dtype=kind, shape=shape, data=data))
        if any(not name.startswith(NUM_THREADS) for name in hints):
            return "some of its sizes are symbols"
        inputs = [(i.kind.value, i.target) for i in arguments(graph)]
        wanted = [(kind, "" if kind == INPUT else target) for kind, target in self._inputs]
        if [(kind, "" if kind == INPUT else target) for kind, target in inputs] != wanted:
            return "AOTAutograd has changed the inputs of the graph"
        tangents = [i.value.tensor for i in graph.inputs if i.kind is InputKind.tangent]
        outputs = [o for o in graph.outputs if o.phase is Phase.forward]
        made = [o.value.tensor for o in outputs if o.kind is OutputKind.output and o.value is not None]
        targets = {i.value.name: f"{i.kind.value} {i.target}" for i in graph.inputs}
        written = [targets.get(o.target or "", "") for o in outputs if o.kind is OutputKind.mutation]
        if sorted(written) != sorted(traced.written) or len(written) + len(made) != len(outputs):
            return "AOTAutograd finds that other tensors are written to"
        if [(o.dtype, o.shape) for o in made] != [(FROM_TORCH[dtype], shape) for dtype, shape in traced.kinds]:
            return "AOTAutograd has changed the outputs of the graph"
        wants = [kind for kind, wanted in zip(made, traced.requires_grad, strict=True) if wanted]
        if tangents and [(t.dtype, t.shape) for t in tangents] != [(t.dtype, t.shape) for t in wants]:
            return "AOTAutograd has other gradients for outputs"
        made_backward = [o for o in graph.outputs if o.phase is not Phase.forward and o.value is not None]
        if any(o.kind is not OutputKind.grad for o in made_backward):
            return "the backward writes to an input"
        return ""


def _place(leaf: Leaf, name: str) -> tuple[str, str]:
    """The kind of an input and its target: a name, or the number of an argument; no target if it has none."""
    if leaf.kind is not InputKind.input:
        return leaf.kind.value, leaf.target
    return INPUT, name.removeprefix(f"{INPUT} ") if name.startswith(f"{INPUT} ") else ""
