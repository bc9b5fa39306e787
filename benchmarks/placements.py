"""Agreement of the search for placements with the plans that transformers has for its models.

Two layers of each configuration, at the sizes that are its class's defaults, are captured on the meta device with one
row of tokens and searched. Each matrix that the model's `base_model_tp_plan` cuts is compared with where the search
cuts it; of a configuration without a plan, with Llama's, whose modules it has. Where they differ, the matrix is put
where the plan has it and all else is searched again: what a step takes more then is the reason.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from benchmarks import results
from zgraph.bridge.target import cost_table
from zgraph.errors import ZgraphError
from zgraph.ir import Placement
from zgraph.options.model_plans import planned
from zgraph.options.searched import search_of
from zgraph.passes.placements import Search

CONFIGURATIONS = (
    *("llama", "mistral", "qwen2", "qwen3", "gemma", "olmo", "olmo2", "granite", "cohere", "cohere2"),
    *("smollm3", "ernie4_5", "phi3", "glm", "glm4", "starcoder2", "helium", "seed_oss", "arcee", "hunyuan_v1_dense"),
)
"""Types of models with a plan, dense ones."""

NUM_LAYERS = 2


@dataclass(frozen=True)
class Difference:
    """A matrix that the search puts elsewhere than the plan.

    Args:
        name: of the parameter.
        plan: where the plan has it.
        found: where the search has it.
        more_us: what a step takes more with the matrix where the plan has it; None if the program has no such choice.
    """

    name: str
    plan: str
    found: str
    more_us: float | None

    @property
    def reason(self) -> str:
        if self.more_us is None:
            return "no op passes a cut there, so that it is gathered whole"
        return f"{self.more_us:,.1f} us more there" if self.more_us >= 0.05 else "a tie"


@dataclass(frozen=True)
class Agreement:
    """Placements of the matrices of one configuration, by the search and by the plan."""

    model: str
    num_matrices: int
    differences: tuple[Difference, ...]
    gap: float
    seconds: float
    has_plan: bool = True

    @property
    def line(self) -> str:
        same = self.num_matrices - len(self.differences)
        whose = "" if self.has_plan else "   by Llama's plan: there is none of its own"
        return f"{self.model:18} {same:3} of {self.num_matrices:3}   gap {self.gap:.3%}   {self.seconds:6.1f} s{whose}"


def compared(kind: str, num_ranks: int, tokens: int, hardware: str) -> Agreement:
    """The search of one configuration beside its plan."""
    model, has_plan = _model(kind)
    row = torch.zeros(1, tokens, dtype=torch.int64, device="meta")
    costs = cost_table(hardware, torch.device("cpu"))
    began = time.perf_counter()
    search, _ = search_of(model, (), {"input_ids": row, "labels": row}, costs, num_ranks, 1, torch.bfloat16)
    gap = search.found.gap
    seconds = time.perf_counter() - began
    plan = {name: place for name, place in planned(model, num_ranks) if ".layers." in name and name.endswith("weight")}
    differences = tuple(_differences(search, plan))
    return Agreement(kind, len(plan), differences, gap, seconds, has_plan)


def _model(kind: str) -> tuple[nn.Module, bool]:
    """The model of a configuration, and whether transformers has a plan for it."""
    config: Any = transformers.AutoConfig.for_model(kind, num_hidden_layers=NUM_LAYERS, use_cache=False)
    if getattr(config, "head_dim", 0) is None:
        config.head_dim = config.hidden_size // config.num_attention_heads
    if not (has_plan := bool(config.base_model_tp_plan)):
        config.base_model_tp_plan = transformers.LlamaConfig.base_model_tp_plan
    with torch.device("meta"):
        model: nn.Module = transformers.AutoModelForCausalLM.from_config(config)
    return model, has_plan


def _differences(search: Search, plan: dict[str, Any]) -> Iterator[Difference]:
    told: dict[tuple[str, str, str], float | None] = {}
    for entry in search.space.graph.params:
        if entry.target not in plan:
            continue
        wanted: Placement = plan[entry.target]
        found = search.found.places[entry.value.name]
        if found == wanted:
            continue
        kind = (entry.target.split(".layers.")[1].split(".", 1)[1], str(wanted), str(found))
        if kind not in told:
            others = search.alternatives(entry.value.name)
            told[kind] = next((other.more_us for other in others if other.place == wanted), None)
        yield Difference(entry.target, str(wanted), str(found), told[kind])


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--configurations", nargs="+", default=CONFIGURATIONS)
    parser.add_argument("--ranks", type=int, default=2, help="ranks that compute together")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--hardware", default="h100")
    parser.add_argument("--json", type=Path, help="where to write what was found")
    options = parser.parse_args(arguments)
    found: list[Agreement] = []
    refused: dict[str, str] = {}
    for kind in options.configurations:
        try:
            found.append(compared(kind, options.ranks, options.tokens, options.hardware))
        except ZgraphError as error:
            refused[kind] = str(error).splitlines()[0]
            print(f"{kind:18} not searched: {refused[kind]}", flush=True)
            continue
        print(found[-1].line, flush=True)
        for difference in found[-1].differences:
            print(
                f"    {difference.name}: {difference.found}, where the plan has {difference.plan}: {difference.reason}"
            )
        _write(options, found, refused)
    matrices, same = _counted(found)
    print(f"{same} of {matrices} matrices of {len(found)} configurations lie where their plans have them")


def _counted(found: Sequence[Agreement]) -> tuple[int, int]:
    """Matrices, and those of them that lie where their plans have them."""
    matrices = sum(a.num_matrices for a in found)
    return matrices, matrices - sum(len(a.differences) for a in found)


def _write(options: argparse.Namespace, found: Sequence[Agreement], refused: dict[str, str]) -> None:
    matrices, same = _counted(found)
    results.write(
        options.json,
        num_ranks=options.ranks,
        tokens=options.tokens,
        hardware=options.hardware,
        num_layers=NUM_LAYERS,
        num_matrices=matrices,
        num_alike=same,
        refused=refused,
        agreements=[
            {**asdict(a), "differences": [{**asdict(d), "reason": d.reason} for d in a.differences]} for a in found
        ],
    )


if __name__ == "__main__":
    main()
