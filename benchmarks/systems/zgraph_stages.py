"""zgraph, stages 0 to 3: as it comes, and planned with what was measured on the hosts at hand."""

from __future__ import annotations

import copy
import time
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from benchmarks.systems.base import LEARNING_RATE, Outlook, Role, Step, System, adamw_step

if TYPE_CHECKING:
    from zgraph.cost import CostTable

BUDGET = "650MB"
"""Peak of a baseline's ZeRO-3 for the 30 M Llama; zgraph keeps gathered parameters in what is left."""


def prepare(model: nn.Module, device: torch.device, **options: Any) -> Step:
    import zgraph

    compiled: nn.Module = zgraph.compile(model, **options)
    return adamw_step(compiled)


class CalibratedStep:
    """Measures ops and collectives on a copy of the model in its first step, then trains the model planned with them.

    Args:
        model: what to train.
        options: of `zgraph.compile`.
    """

    def __init__(self, model: nn.Module, options: dict[str, Any]) -> None:
        self.model, self.options = model, options
        self.is_planned = False
        self.optimizer_s = 0.0
        self.waited_before_s = 0.0
        self.num_steps = 0

    def __call__(self, tokens: Tensor) -> Tensor:
        if not self.is_planned:
            self._plan(tokens)
        loss: Tensor = self.model(input_ids=tokens, labels=tokens).loss
        loss.backward()  # type: ignore[no-untyped-call]
        began = time.perf_counter()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.optimizer_s = time.perf_counter() - began
        self.num_steps += 1
        return loss.detach()

    def _plan(self, tokens: Tensor) -> None:
        import zgraph

        table = self._measured(tokens)
        torch.compiler.reset()  # which remembers what it compiled, with its memory
        self.model = zgraph.compile(self.model, hardware=table, **self.options)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=LEARNING_RATE)
        self.is_planned = True

    def _measured(self, tokens: Tensor) -> CostTable:
        import zgraph

        rehearsal: nn.Module = zgraph.compile(copy.deepcopy(self.model), **self.options)

        def step() -> None:
            rehearsal.zero_grad()
            rehearsal(input_ids=tokens, labels=tokens).loss.backward()

        return zgraph.profile(rehearsal, step)

    def begin(self) -> None:
        """Begins to measure."""
        self.waited_before_s, self.num_steps = self._waited_s(), 0

    def outlook(self) -> Outlook:
        """The time predicted for a step, and the time that computing waited for since `begin`."""
        import zgraph

        (entry,) = zgraph.report(self.model).entries
        return Outlook(
            step_s=entry.timeline.step_us / 1e6 + self.optimizer_s,
            exposed_s=entry.timeline.exposed_us / 1e6,
            measured_exposed_s=(self._waited_s() - self.waited_before_s) / max(self.num_steps, 1),
            gap=entry.gap,
            peak_bytes=zgraph.report(self.model).peak_bytes,
        )

    def _waited_s(self) -> float:
        from zgraph.compiler.compiled_model import compiled_model

        return compiled_model(self.model).session.peers.waited_s


def prepare_calibrated(model: nn.Module, device: torch.device, **options: Any) -> Step:
    return CalibratedStep(model, options)


ZGRAPH = (
    *(
        System(f"zgraph stage {stage}", Role.ZGRAPH, stage, partial(prepare, stage=stage), "zgraph", "zgraph")
        for stage in (0, 1, 2, 3)
    ),
    System("zgraph in pieces", Role.ZGRAPH, 3, partial(prepare, stage=3, fullgraph=False), "zgraph", "zgraph"),
    *(
        System(
            f"zgraph stage {stage}{name}, calibrated",
            Role.ZGRAPH,
            stage,
            partial(prepare_calibrated, stage=stage, **options),
            "zgraph",
            "zgraph",
            True,
        )
        for stage, name, options in (
            (0, "", {}),
            (1, "", {}),
            (2, "", {}),
            (3, "", {}),
            (3, f" in {BUDGET}", {"memory_budget": BUDGET}),
        )
    ),
)
