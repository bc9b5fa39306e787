"""CPU time from the call of the compiler to the end of the first step: python -m benchmarks.first_step

Six small models of transformers on one process, by `torch.compile(backend="aot_eager")`, which captures and does
nothing else, and by zgraph at stage 3, in turns. What is done once for a process is done before, with two layers.
"""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import torch.distributed as dist
import transformers as hf
import typer
from rich.console import Console
from rich.table import Table
from torch import nn
from torch._C._distributed_c10d import HashStore

import zgraph
from benchmarks.results import write

WIDTH, HEADS, WORDS = 64, 4, 256
SIZES = {"hidden_size": WIDTH, "intermediate_size": 128, "num_attention_heads": HEADS}


@dataclass(frozen=True)
class Row:
    """Seconds of the CPU for the first step of a model, round by round.

    ratio: median over the rounds of zgraph's time in that of `aot_eager`.
    """

    model: str
    aot_eager_s: list[float]
    zgraph_s: list[float]
    ratio: float


def built(model: str, config: str, **sizes: int) -> nn.Module:
    """A model of transformers by the names of its class and of its configuration's."""
    made: nn.Module = getattr(hf, model)(getattr(hf, config)(**sizes))
    return made


def gpt2(layers: int) -> nn.Module:
    return built("GPT2LMHeadModel", "GPT2Config", n_embd=WIDTH, n_layer=layers, n_head=HEADS, vocab_size=WORDS)


def llama(layers: int) -> nn.Module:
    return built("LlamaForCausalLM", "LlamaConfig", vocab_size=WORDS, **SIZES, num_hidden_layers=layers)


def qwen3(layers: int) -> nn.Module:
    heads = {"num_key_value_heads": 2, "head_dim": 16}
    return built("Qwen3ForCausalLM", "Qwen3Config", vocab_size=WORDS, **SIZES, **heads, num_hidden_layers=layers)


def bert(layers: int) -> nn.Module:
    return built("BertForMaskedLM", "BertConfig", vocab_size=WORDS, **SIZES, num_hidden_layers=layers)


def t5(layers: int) -> nn.Module:
    sizes = {"d_model": WIDTH, "d_ff": 128, "d_kv": 16, "num_heads": HEADS, "vocab_size": WORDS}
    sizes |= {"decoder_start_token_id": 0}
    return built("T5ForConditionalGeneration", "T5Config", **sizes, num_layers=layers // 2)


def vit(layers: int) -> nn.Module:
    sizes = {**SIZES, "num_labels": 5, "image_size": 32, "patch_size": 8}
    return built("ViTForImageClassification", "ViTConfig", **sizes, num_hidden_layers=layers)


MODELS: tuple[Callable[[int], nn.Module], ...] = (gpt2, llama, qwen3, bert, t5, vit)


def inputs(model: nn.Module) -> dict[str, torch.Tensor]:
    """A batch for a model of text or of images."""
    if isinstance(model, hf.ViTForImageClassification):
        return {"pixel_values": torch.zeros(2, 3, 32, 32), "labels": torch.zeros(2, dtype=torch.int64)}
    ids = torch.randint(WORDS, (2, 16))
    return {"input_ids": ids, "labels": ids}


def first_step_s(build: Callable[[int], nn.Module], layers: int, compiler: Callable[[Any], Any]) -> float:
    """Seconds of the CPU to compile a new model and to run its first forward and backward."""
    torch._dynamo.reset()
    gc.collect()
    torch.manual_seed(0)
    model = build(layers).train()
    given = inputs(model)
    began = time.process_time()
    compiler(model)(**given).loss.backward()
    return time.process_time() - began


def aot_eager(model: nn.Module) -> Any:
    """The model, captured and run op by op."""
    return torch.compile(model, backend="aot_eager")


def sharded(model: nn.Module) -> Any:
    """The model at stage 3."""
    return zgraph.compile(model, stage=3)


def measured(build: Callable[[int], nn.Module], layers: int, rounds: int) -> Row:
    """Both compilers in turns, each first in every other round."""
    taken: dict[Callable[[Any], Any], list[float]] = {aot_eager: [], sharded: []}
    for compiler in taken:
        first_step_s(build, 2, compiler)
    for number in range(rounds):
        for compiler in sorted(taken, key=lambda c: (c is sharded) == (number % 2 == 0)):
            taken[compiler].append(first_step_s(build, layers, compiler))
    theirs, ours = taken.values()
    return Row(build.__name__, theirs, ours, median(b / a for a, b in zip(theirs, ours, strict=True)))


def main(
    layers: Annotated[int, typer.Option(min=2, help="Layers of each model.")] = 12,
    rounds: Annotated[int, typer.Option(min=1, help="How often each is compiled.")] = 5,
    only: Annotated[str, typer.Option(help="One of the models.")] = "",
    json_file: Annotated[Path | None, typer.Option("--json", help="File to write the results to.")] = None,
) -> None:
    """Time both on each model, and print the medians of the ratios."""
    os.environ.setdefault("ZGRAPH_LOGS", "none")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    table = Table(title=f"first step, {layers} layers", title_justify="left")
    for column in ("model", "aot_eager s", "zgraph s", "ratio"):
        table.add_column(column, justify="left" if column == "model" else "right")
    found = []
    for build in (build for build in MODELS if only in ("", build.__name__)):
        row = measured(build, layers, rounds)
        found.append(asdict(row))
        write(json_file, layers=layers, rows=found)
        table.add_row(row.model, f"{median(row.aot_eager_s):.2f}", f"{median(row.zgraph_s):.2f}", f"{row.ratio:.2f}")
    Console().print(table)
    dist.destroy_process_group()


if __name__ == "__main__":
    typer.run(main)
