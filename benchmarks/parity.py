"""The same script and the same JSON with DeepSpeed and with zgraph: do the losses agree, at every stage?

    python -m benchmarks.parity --json benchmarks/results/parity-deepspeed.json

Two ranks, fp32, AdamW, WarmupLR, accumulation over two micro-batches, gradients clipped. The worker below is the
script: the engine's module is its argument.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.results import write

CONFIG = {
    "train_batch_size": 16,
    "train_micro_batch_size_per_gpu": 4,
    "gradient_accumulation_steps": 2,
    "gradient_clipping": 0.5,
    "optimizer": {
        "type": "AdamW",
        "params": {"lr": 3e-3, "betas": [0.9, 0.95], "weight_decay": 0.1, "torch_adam": True},
    },
    "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 10, "warmup_max_lr": 3e-3}},
}

SYSTEMS = ("deepspeed", "zgraph")


def worker(system: str, stage: int, num_steps: int) -> None:
    """Train a small Llama; the first rank prints losses and gradient norms."""
    import torch
    import torch.distributed as dist
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=256,
            use_cache=False,
        )
    )
    library = import_module(system)
    config = {**CONFIG, "zero_optimization": {"stage": stage}}
    engine, *_ = library.initialize(model=model, model_parameters=model.parameters(), config=config)
    draw = torch.Generator().manual_seed(1 + int(os.environ["RANK"]))
    losses, norms = [], []
    for _ in range(num_steps):
        total = 0.0
        for _ in range(engine.gradient_accumulation_steps()):
            ids = torch.randint(0, 256, (4, 32), generator=draw).cumsum(1) % 256
            loss = engine(input_ids=ids, labels=ids).loss
            engine.backward(loss)
            engine.step()
            total += float(loss.detach()) / engine.gradient_accumulation_steps()
        losses.append(total)
        norms.append(norm if (norm := engine.get_global_grad_norm()) is None else float(norm))
    if dist.get_rank() == 0:
        print("RESULT " + json.dumps({"losses": losses, "norms": norms}))
    dist.destroy_process_group()


def _run(system: str, stage: int, num_steps: int) -> dict[str, list[float]]:
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "benchmarks.parity",
        "--worker",
        system,
        "--stage",
        str(stage),
        "--steps",
        str(num_steps),
    ]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=900)
    lines = [line for line in done.stdout.splitlines() if "RESULT " in line]
    if done.returncode or not lines:
        raise SystemExit(f"{system} at stage {stage} failed:\n{done.stderr[-2000:]}")
    found: dict[str, list[float]] = json.loads(lines[0].partition("RESULT ")[2])
    return found


def main(
    steps: Annotated[int, typer.Option(min=1, help="Steps of each run.")] = 30,
    stage: Annotated[int, typer.Option(hidden=True)] = 0,
    worker_of: Annotated[str, typer.Option("--worker", hidden=True)] = "",
    json_file: Annotated[Path | None, typer.Option("--json", help="File to write the results to.")] = None,
) -> None:
    """Compare the losses and gradient norms of both, stage by stage."""
    if worker_of:
        worker(worker_of, stage, steps)
        return
    found = {str(s): {system: _run(system, s, steps) for system in SYSTEMS} for s in range(4)}
    for number, runs in found.items():
        for what in ("losses", "norms"):
            pairs = zip(runs["deepspeed"][what], runs["zgraph"][what], strict=True)
            if both := [(a, b) for a, b in pairs if a is not None]:  # DeepSpeed's stage 0 has no norm without ZeRO
                print(f"stage {number}: {what} differ by at most {max(abs(a - b) for a, b in both):.2e}")
    write(json_file, config=CONFIG, steps=steps, stages=found)


if __name__ == "__main__":
    typer.run(main)
