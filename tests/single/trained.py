"""Three small models, trained for a few steps on one rank, with what they take of memory."""

from collections.abc import Callable, Iterable, Mapping
from functools import cache
from typing import Any

import torch
from torch import nn

import zgraph
from benchmarks.memory import measure
from small import llama, t5, vit
from zgraph.compiler.compiled_model import compiled_model

VOCABULARY = 300


MODELS: dict[str, Callable[[], nn.Module]] = {
    "llama": lambda: llama(num_layers=2),
    "vit": lambda: vit(num_layers=2),
    "t5": lambda: t5(num_layers=1),
}


def batch(name: str, seed: int) -> dict[str, torch.Tensor]:
    dice = torch.Generator().manual_seed(seed)
    if name == "vit":
        return {
            "pixel_values": torch.randn(4, 3, 32, 32, generator=dice),
            "labels": torch.randint(5, (4,), generator=dice),
        }
    ids = torch.randint(VOCABULARY, (2, 48), generator=dice)
    return {"input_ids": ids, "labels": ids}


MakeOptimizer = Callable[[nn.Module], torch.optim.Optimizer]


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-3)


def losses(model: nn.Module, batches: Iterable[Mapping[str, torch.Tensor]]) -> list[float]:
    """Of steps of AdamW, one a batch."""
    optimizer = adamw(model)
    found = []
    for inputs in batches:
        made = model(**inputs)
        loss = made if isinstance(made, torch.Tensor) else made.loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found


class Trained:
    """A few steps: their losses, the bytes alive at the peak, and those predicted.

    Args:
        name: the model.
        budget: bytes that may be alive.
        make_optimizer: from the compiled model.
        options: more of `zgraph.compile`'s.
    """

    def __init__(
        self, name: str, budget: int | None = None, make_optimizer: MakeOptimizer = adamw, **options: Any
    ) -> None:
        torch.compiler.reset()
        self.losses: list[float] = []
        torch.manual_seed(0)
        model = zgraph.compile(MODELS[name]().train(), memory_budget=budget, **options)

        def prepare() -> Callable[[int], torch.Tensor]:
            optimizer = make_optimizer(model)
            batches = [batch(name, seed) for seed in range(3)]

            def step(index: int) -> torch.Tensor:
                torch.manual_seed(index)
                loss = model(**batches[index]).loss
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                self.losses.append(loss.item())
                return loss

            return step

        live = measure(prepare, warmup=2, device=torch.device("cpu"))
        self.report = zgraph.report(model)
        (entry,) = self.report.entries
        self.at_rest = self.report.rest_bytes + self.report.state_bytes + self.report.buffer_bytes
        self.peak = self.at_rest + live.peak_bytes - live.rest_bytes
        self.predicted = self.report.peak_bytes
        self.num_again = sum("recompute" in n.origin.made_by for n in entry.plan.graph.nodes)
        self.num_moved = sum(n.op == "offload_start" for n in entry.plan.graph.nodes)
        self.host_alive = compiled_model(model).session.host.pool.alive_bytes


@cache
def plain(name: str) -> Trained:
    """As the model is trained without options, once for all tests."""
    return Trained(name)
