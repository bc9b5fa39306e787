"""The commands that answer: over HTTP, and in the terminal."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.live import Live
from rich.markup import escape
from rich.prompt import Prompt
from rich.text import Text

from zgraph.cli.app import app, console, errors, one_of, progress
from zgraph.cli.completion import any_of
from zgraph.cli.quantising import ACTIVATIONS, WEIGHTS, Calibrate, calibration, loaded
from zgraph.cli.terminal import printable
from zgraph.errors import UsageError

Model = Annotated[
    str, typer.Argument(help="A folder with a model and its tokenizer, of transformers or of zgraph quantise.")
]
Weights = Annotated[str, typer.Option(help="int8 or int4; as they are without.", autocompletion=any_of(*WEIGHTS))]
Activations = Annotated[str, typer.Option(help="int8 rounds activations too.", autocompletion=any_of(*ACTIVATIONS))]
KV = Annotated[str, typer.Option("--kv", help="int8 keeps keys and values in it.", autocompletion=any_of("int8"))]
Group = Annotated[int, typer.Option(help="Columns that share a scale in int4: 32, 64 or 128.")]
MaxLen = Annotated[int, typer.Option(min=2, help="Tokens of a request, the prompt's among them; 1,024 without.")]


@app.command()
def serve(
    model: Model,
    host: Annotated[str, typer.Option(help="The address to listen on; by default, this machine alone.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="The port; 0 takes a free one.")] = 8000,
    name: Annotated[str, typer.Option(help="What clients call the model; the folder's name without.")] = "",
    max_batch: Annotated[int, typer.Option(min=1, help="Requests that generate at once.")] = 8,
    max_len: MaxLen | None = None,
    max_waiting: Annotated[int, typer.Option(min=0, help="Requests that may wait; more are refused.")] = 256,
    max_body: Annotated[int, typer.Option(min=1024, help="Bytes of a request at most.")] = 1 << 20,
    grace: Annotated[float, typer.Option(min=0, help="Seconds for requests under way at the end.")] = 30.0,
    weights: Weights = "",
    activations: Activations = "",
    kv: KV = "",
    group: Group = 64,
    calibrate: Calibrate = None,
) -> None:
    """Answer by OpenAI's protocol over HTTP, many requests in each step.

    Example: `zgraph serve SmolLM2-135M --weights int8`
    """
    try:
        from zgraph.server.app import Limits, Server
        from zgraph.server.serve import bound, hosts_of, listener
        from zgraph.server.text import Words
        from zgraph.server.worker import Worker
    except ImportError as error:
        raise UsageError(f"this needs {error.name}: pip install zgraph-compiler[serve]") from None

    _check(weights, activations, kv)
    listening = bound(host, port)
    with progress() as shown:
        shown.add_task(f"reading and capturing {model}")
        generator, tokenizer = _generator(model, max_batch, max_len, weights, activations, kv, group, calibrate)
    called = name or Path(model).resolve().name
    server = Server(
        Worker(generator, max_waiting), Words(tokenizer), called, Limits(max_body, grace_seconds=grace), hosts_of(host)
    )
    address, taken = listening.getsockname()[:2]
    shown_host = f"[{address}]" if ":" in address else address
    console().print(f"{escape(called)} answers at http://{shown_host}:{taken}/v1", highlight=False)
    listener(server).run([listening])


@app.command()
def chat(
    model: Model,
    system: Annotated[str, typer.Option(help="What the model is told before the conversation.")] = "",
    max_len: MaxLen | None = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens of an answer at most.")] = 512,
    temperature: Annotated[float, typer.Option(min=0, max=2, help="0 takes the likeliest token.")] = 0.7,
    top_p: Annotated[float, typer.Option(min=0.01, max=1, help="Draw from the likeliest that have this share.")] = 0.95,
    seed: Annotated[int, typer.Option(help="Of the draws.")] = 0,
    weights: Weights = "",
    activations: Activations = "",
    kv: KV = "",
    group: Group = 64,
    calibrate: Calibrate = None,
) -> None:
    """Talk with a model in the terminal; an empty line or the end of the input ends it.

    Example: `zgraph chat SmolLM2-135M --weights int8`
    """
    _check(weights, activations, kv)
    from zgraph.inference.sampling import Sampling
    from zgraph.server.talk import Talk
    from zgraph.server.text import Words

    with progress() as shown:
        shown.add_task(f"reading and capturing {model}")
        generator, tokenizer = _generator(model, 1, max_len, weights, activations, kv, group, calibrate)
    sampling = Sampling(True, temperature, top_p=top_p) if temperature else Sampling()
    talk, out = Talk(generator, Words(tokenizer), sampling, seed, system), console()
    while True:
        try:
            said = Prompt.ask("[bold]you[/]", console=out)
        except (EOFError, KeyboardInterrupt):
            break
        if not said.strip():
            break
        text = Text()
        try:
            with Live(text, console=out, refresh_per_second=12, vertical_overflow="visible") as live:
                for piece in talk.answer(said, max_tokens):
                    text.append(printable(piece))
                    live.update(text)
        except KeyboardInterrupt:
            errors().print("stopped")


def _check(weights: str, activations: str, kv: str) -> None:
    """Refuse words that mean nothing, before anything is read."""
    if weights:
        one_of("--weights", weights, WEIGHTS)
    if activations:
        one_of("--activations", activations, ACTIVATIONS)
    if kv:
        one_of("--kv", kv, ACTIVATIONS)


def _generator(
    folder: str,
    max_batch: int,
    max_len: int | None,
    weights: str,
    activations: str,
    kv: str,
    group: int,
    calibrate: Path | None,
) -> tuple[Any, Any]:
    """The model of a folder for inference, and its tokenizer."""
    from zgraph.inference import Generator, infer

    model, tokenizer, kept_in = loaded(folder)
    if kept_in is not None:
        if weights and weights != kept_in[0]:
            raise UsageError(f"{folder} has weights in {kept_in[0]}; leave --weights out")
        if calibrate is not None and kept_in[0] == "int4":
            raise UsageError(f"{folder} has weights in int4 already; leave --calibrate out")
        weights, group = kept_in
    found = infer(
        model,
        max_batch=max_batch,
        max_len=max_len,
        weights=weights or None,
        activations=activations or None,
        kv=kv or None,
        group=group,
        calibrate=calibration(tokenizer, calibrate),
    )
    if not isinstance(found, Generator):
        found.generate()
    return found, tokenizer
