"""zgraph in a few minutes: `python -m examples.demo`, or `make demo`.

Trains a Hugging Face Llama of 11 M parameters, sharded over the GPUs of this machine or over two CPU ranks, on text
from Python's own library; then trains the same with DDP, and shows that the losses are equal, what each ZeRO stage
holds in memory and sends over the wire, and what the compiler's passes did.
"""

from __future__ import annotations

import argparse
import sys
import time
from contextlib import closing

from rich.console import Console
from rich.text import Text

from examples import tables
from examples.launch import RankFailed, at_least_one, default_num_ranks, device_kind, launch
from examples.progress import Display, Started, Stepped
from examples.text import Corpus, load_corpus
from examples.training import STAGES, Built, Job, Run, work

VOCAB_SIZE = 2048


def main() -> int:
    """Run the demo; returns the exit code of the process."""
    arguments = _arguments()
    console = Console()
    began = time.monotonic()
    try:
        corpus = _prepare(console, arguments)
        job = Job(arguments.stage, arguments.steps, corpus.tokens, VOCAB_SIZE)
        runs = _train(console, job, arguments.ranks)
    except RankFailed as error:
        Console(stderr=True).print(Text.assemble(("The demo stopped: ", "bold red"), str(error)))
        return 1
    except KeyboardInterrupt:
        console.print("Interrupted; all ranks have ended.")
        return 130
    _show(console, runs, arguments.stage)
    console.print(f"Took {time.monotonic() - began:.0f} s.\n", highlight=False)
    console.print(_next_steps())
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m examples.demo", description=__doc__.split("\n\n")[1])
    parser.add_argument("--steps", type=at_least_one, default=100, help="optimizer steps (default: 100)")
    parser.add_argument("--stage", type=int, choices=STAGES, default=3, help="ZeRO stage to train with (default: 3)")
    parser.add_argument(
        "--ranks",
        type=at_least_one,
        default=default_num_ranks(),
        help="processes to shard over: on GPUs where there is one for each, else on the CPU (default: all GPUs, or 2)",
    )
    return parser.parse_args()


def _prepare(console: Console, arguments: argparse.Namespace) -> Corpus:
    where = "GPU, NCCL" if device_kind(arguments.ranks) == "cuda" else "CPU, gloo"
    corpus = load_corpus(VOCAB_SIZE)
    console.print(
        f"[bold]zgraph demo[/]: stage {arguments.stage}, {tables.ranks(arguments.ranks)} ({where})\n"
        f"text: {corpus.num_bytes / 1e6:.1f} MB of Python's manual and library, {len(corpus.tokens):,} tokens",
        highlight=False,
    )
    return corpus


def _train(console: Console, job: Job, num_ranks: int) -> list[Run]:
    runs: list[Run] = []
    with Display(console) as display, closing(launch(work, num_ranks, job)) as events:
        for event in events:
            match event:
                case Built():
                    display.print(f"model: LlamaForCausalLM, {event.num_parameters / 1e6:.1f} M parameters\n")
                case Started() | Stepped():
                    display.show(event)
                case Run():
                    runs.append(event)
    return runs


def _show(console: Console, runs: list[Run], stage: int) -> None:
    by_stage = {run.stage: run for run in runs if run.stage is not None}
    ddp = next(run for run in runs if run.stage is None)
    console.print()
    for table in (tables.losses(by_stage[stage], ddp), tables.memory(by_stage), tables.wire(by_stage)):
        console.print(table, "")
    console.print(f"[bold]What was compiled at stage {stage}:[/] zgraph.report(model)\n", highlight=False)
    console.print(by_stage[stage].report, "")


def _next_steps() -> Text:
    return Text(
        "What to try next:\n"
        "  python -m examples.demo --stage 2 --steps 40    train with another stage\n"
        "  python -m examples.demo --ranks 4               shard over more ranks\n"
        "  ZGRAPH_DUMP=build/zir python -m examples.demo   read the graph after each pass\n"
        "  python -m examples.finetune_smollm2             fine-tune real weights"
    )


if __name__ == "__main__":
    sys.exit(main())
