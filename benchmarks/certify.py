"""Time of certificates: python -m benchmarks.certify

Of a Llama-3 70B traced for 64 H100s, beside its passes: the certificate that a compile makes, and the one of every
graph that `zgraph verify` makes. And of the demo, from the call of the compiler to the end of the first step: with the
certificate and without, in turns, each in a process of its own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from benchmarks.results import write

HARDWARE = "8x8-h100"


@dataclass(frozen=True)
class Large:
    """Seconds for a large model, and nodes of its last graph."""

    nodes: int
    passes_s: float
    compile_s: float
    verify_s: float


def large(num_layers: int) -> Large:
    """Trace a Llama-3 70B of so many layers, and certify it."""
    os.environ["ZGRAPH_VERIFY"] = "0"
    import torch
    import transformers as hf

    from zgraph.certify.certificate import Certifier
    from zgraph.estimate.trace import traced
    from zgraph.passes import RECIPES, parse_recipe

    config = hf.LlamaConfig(
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=num_layers,
        num_attention_heads=64,
        num_key_value_heads=8,
        vocab_size=128256,
        use_cache=False,
    )
    with torch.device("meta"):
        model = hf.LlamaForCausalLM(config)
        ids = torch.zeros(1, 4096, dtype=torch.int64)
    run = traced(
        model,
        {"input_ids": ids, "labels": ids},
        parse_recipe(RECIPES[3]),
        hardware=HARDWARE,
        param_dtype=torch.bfloat16,
    )
    graphs = [(name.partition("#")[0], run.graph(name)) for name in run.names]
    taken = []
    for thorough in (False, True):
        certifier = Certifier(graphs[0][1], run.context, thorough=thorough)
        for step, graph in graphs[1:]:
            certifier.add(step, graph)
        began = time.perf_counter()
        certifier.finish()
        taken.append(time.perf_counter() - began)
    passes_s = sum(snapshot.seconds for snapshot in run.manifest.snapshots)
    return Large(len(graphs[-1][1].nodes), passes_s, *taken)


def first_step() -> float:
    """Seconds from the call of the compiler to the end of the demo's first step, on one rank."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    import zgraph

    config = LlamaConfig(
        vocab_size=2048,
        hidden_size=384,
        intermediate_size=1024,
        num_hidden_layers=6,
        num_attention_heads=6,
        num_key_value_heads=6,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        use_cache=False,
    )
    model = LlamaForCausalLM(config)
    ids = torch.randint(2048, (4, 128))
    began = time.perf_counter()
    trained = zgraph.compile(model, stage=3)
    trained(input_ids=ids, labels=ids).loss.backward()
    return time.perf_counter() - began


def apart(verify: int) -> float:
    """The first step in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.certify", "--only"],
        env={**os.environ, "ZGRAPH_VERIFY": str(verify)},
        capture_output=True,
        text=True,
        check=True,
    )
    return float(json.loads(done.stdout.splitlines()[-1]))


def main(
    layers: Annotated[int, typer.Option(min=1, help="Layers of the large model.")] = 80,
    rounds: Annotated[int, typer.Option(min=1, help="The demo's model is compiled both ways once a round.")] = 5,
    only: Annotated[bool, typer.Option("--only", help="Compile the demo's model in this process.")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="File to write the results to.")] = None,
) -> None:
    """Time certificates, and print them."""
    if only:
        print(json.dumps(first_step()))
        return
    found = large(layers)
    table = Table(title=f"Llama-3 70B, {layers} layers, {found.nodes:,} nodes", title_justify="left")
    for column in ("", "s", "of the passes"):
        table.add_column(column, justify="left" if not column else "right")
    for name, seconds in (("passes", found.passes_s), ("compile", found.compile_s), ("zgraph verify", found.verify_s)):
        table.add_row(name, f"{seconds:.1f}", f"{seconds / found.passes_s:.2f}")
    Console().print(table)
    steps = [(apart(0), apart(1)) for _ in range(rounds)]
    without, share = median(a for a, _ in steps), median(b / a for a, b in steps)
    Console().print(f"the demo's first step: {without:.1f} s without a certificate, with it {share:.3f} of that")
    write(json_file, layers=layers, large=asdict(found), first_step_s=[{"without": a, "with": b} for a, b in steps])


if __name__ == "__main__":
    typer.run(main)
