"""Computing again what does not fit, beside PyTorch's own ways: python -m benchmarks.recompute

One process, a Llama of 6 layers. Each of PyTorch's ways is run as it is; zgraph then gets its measured peak as the
memory budget. What counts is how many FLOP each adds to the step. Every row is a fresh process.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch import config as functorch_config
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaForCausalLM

from benchmarks.memory import measure
from benchmarks.models import llama
from benchmarks.results import write

BATCH_SIZE, SEQUENCE, VOCABULARY = 4, 256, 2048
BUDGETS = (1.0, 0.8, 0.6, 0.4, 0.2)
"""Of torch's partitioner: shares of the activations that it would keep without a budget."""


@dataclass(frozen=True)
class Measured:
    """One way: the most bytes alive, parameters and AdamW's state included, and the FLOP of a forward and backward."""

    name: str
    peak_bytes: int
    flop: int


def llama_6l() -> nn.Module:
    torch.manual_seed(0)
    return LlamaForCausalLM(llama(256, 704, 6, 8, VOCABULARY)).train()


def batch() -> dict[str, Tensor]:
    ids = torch.randint(VOCABULARY, (BATCH_SIZE, SEQUENCE), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "labels": ids}


def peak_of(model: nn.Module) -> int:
    """Bytes alive at the peak of a training step. The model has been run before; its optimizer has not."""
    given = batch()

    def prepare() -> Callable[[int], Tensor]:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

        def step(_: int) -> Tensor:
            loss: Tensor = model(**given).loss
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            optimizer.zero_grad()
            return loss

        return step

    live = measure(prepare, warmup=2, device=torch.device("cpu"))
    return live.peak_bytes - live.rest_bytes + 12 * sum(p.numel() for p in model.parameters())


def flop_of(run: Callable[[], Any]) -> int:
    with FlopCounterMode(display=False) as counter:
        run()
    return int(counter.get_total_flops())


def eager(name: str, *, checkpoint: bool) -> Measured:
    """PyTorch without a compiler."""
    model = llama_6l()
    if checkpoint:
        model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
    flop = flop_of(lambda: model(**batch()).loss.backward())
    model.zero_grad()
    return Measured(name, peak_of(model), flop)


def partitioned(name: str, budget: float) -> Measured:
    """torch.compile's partitioner with an activation memory budget, its graphs run op by op."""
    flop: list[int] = []

    def counted(gm: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        def run(args: list[Any]) -> Any:
            with FlopCounterMode(display=False) as counter:
                made = torch.fx.Interpreter(gm).boxed_run(args)
            flop.append(int(counter.get_total_flops()))
            return made

        run._boxed_call = True  # type: ignore[attr-defined]
        return run

    functorch_config.activation_memory_budget = budget
    backend = aot_autograd(fw_compiler=counted, bw_compiler=counted, partition_fn=min_cut_rematerialization_partition)
    model = llama_6l()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    compiled(**batch()).loss.backward()
    model.zero_grad()
    return Measured(name, peak_of(compiled), sum(flop[:2]))


def ours(name: str, budget: int | None) -> Measured:
    """zgraph on one rank."""
    import zgraph

    model = zgraph.compile(llama_6l(), memory_budget=budget)
    model(**batch()).loss.backward()
    model.zero_grad()
    return Measured(name, peak_of(model), zgraph.report(model).flop)


def apart(function: Callable[..., Measured], *args: Any, **kwargs: Any) -> Measured:
    """The result of a function, run in a process of its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, args, kwargs)


def main(
    json_file: Annotated[Path | None, typer.Option("--json", help="File to write the results to.")] = None,
) -> None:
    """Measure PyTorch's ways, give zgraph their peaks as budgets, and print both."""
    plain, roomy = apart(eager, "eager, all kept", checkpoint=False), apart(ours, "zgraph", None)
    baselines = [plain, apart(eager, "eager, torch.utils.checkpoint on each layer", checkpoint=True)]
    baselines += [apart(partitioned, f"torch's partitioner, budget {b}", b) for b in BUDGETS]
    table = Table(title="Llama, 6 layers of 256, batch 4 x 256, fp32, AdamW, one process", title_justify="left")
    for column in ("way", "peak MB", "FLOP added", "zgraph in that budget: peak MB", "FLOP added"):
        table.add_column(column, justify="right" if column != "way" else "left")
    found = []
    for baseline in baselines:
        same = apart(ours, "zgraph", baseline.peak_bytes)
        table.add_row(
            baseline.name,
            f"{baseline.peak_bytes / 1e6:.1f}",
            f"{baseline.flop / plain.flop - 1:.1%}",
            f"{same.peak_bytes / 1e6:.1f}",
            f"{same.flop / roomy.flop - 1:.1%}",
        )
        found.append({"peer": asdict(baseline), "zgraph": asdict(same)})
    Console().print(table)
    write(json_file, plain=asdict(plain), roomy=asdict(roomy), rows=found)


if __name__ == "__main__":
    typer.run(main)
