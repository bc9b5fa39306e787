"""The commands that answer: over HTTP, and in the terminal."""

from __future__ import annotations

import signal
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.live import Live
from rich.markup import escape
from rich.prompt import Prompt
from rich.text import Text

from zgraph.cli.app import app, console, errors, one_of, progress
from zgraph.cli.completion import any_of
from zgraph.cli.quantising import ACTIVATIONS, WEIGHTS, Calibrate, calibration, loaded
from zgraph.cli.terminal import printable
from zgraph.cli.together import is_first, together
from zgraph.errors import UsageError

if TYPE_CHECKING:
    from zgraph.server.talk import Talk

Model = Annotated[
    str, typer.Argument(help="A folder with a model and its tokenizer, of transformers or of zgraph quantise.")
]
Weights = Annotated[str, typer.Option(help="int8 or int4; as they are without.", autocompletion=any_of(*WEIGHTS))]
Activations = Annotated[str, typer.Option(help="int8 rounds activations too.", autocompletion=any_of(*ACTIVATIONS))]
KV = Annotated[str, typer.Option("--kv", help="int8 keeps keys and values in it.", autocompletion=any_of("int8"))]
Group = Annotated[int, typer.Option(help="Columns that share a scale in int4: 32, 64 or 128.")]
Parallel = Annotated[
    int, typer.Option("--tensor-parallel", min=1, help="Ranks that share the model: this many processes.")
]
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
    tensor_parallel: Parallel = 1,
) -> None:
    """Answer by OpenAI's protocol over HTTP, many requests in each step.

    With `--tensor-parallel 2` another process is started, which has half of the model. Under a launcher its ranks are
    taken; the first of them listens.

    Example: `zgraph serve SmolLM2-135M --weights int8`
    """
    try:
        from zgraph.server.app import Limits, Server
        from zgraph.server.serve import bound, hosts_of, listener
        from zgraph.server.text import Words
        from zgraph.server.worker import Worker
    except ImportError as error:
        raise UsageError(f"this needs {error.name}: pip install zgraph-compiler[serve]") from None

    _check(model, weights, activations, kv, tensor_parallel)
    listening = bound(host, port) if is_first() else None
    with together(tensor_parallel):
        given = model, max_batch, max_len, weights, activations, kv, group, calibrate, tensor_parallel
        found = _led(given)
        if found is None or listening is None:
            return
        generator, tokenizer = found
        called = name or Path(model).resolve().name
        limits = Limits(max_body, grace_seconds=grace)
        worker = Worker(generator, max_waiting)
        server = Server(worker, Words(tokenizer), called, limits, hosts_of(host))
        address, taken = listening.getsockname()[:2]
        shown_host = f"[{address}]" if ":" in address else address
        console().print(f"{escape(called)} answers at http://{shown_host}:{taken}/v1", highlight=False)
        ended: BaseException | None = None
        try:
            listener(server).run([listening])
        except (SystemExit, KeyboardInterrupt) as signalled:  # once all was over
            ended = signalled
        if worker.error is not None:
            raise worker.error
    if ended is not None:
        raise ended


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
    tensor_parallel: Parallel = 1,
) -> None:
    """Talk with a model in the terminal; an empty line or the end of the input ends it.

    Example: `zgraph chat SmolLM2-135M --weights int8`
    """
    _check(model, weights, activations, kv, tensor_parallel)
    from zgraph.inference.sampling import Sampling
    from zgraph.server.talk import Talk
    from zgraph.server.text import Words

    with together(tensor_parallel):
        found = _led((model, 1, max_len, weights, activations, kv, group, calibrate, tensor_parallel))
        if found is None:
            return
        sampling = Sampling(True, temperature, top_p=top_p) if temperature else Sampling()
        talk = Talk(found[0], Words(found[1]), sampling, seed, system)
        _converse(talk, max_tokens)
        talk.batch.close()


def _converse(talk: Talk, max_tokens: int) -> None:
    """Answer what is said in the terminal; Ctrl-C ends an answer, between two tokens: other ranks may wait for both."""
    out, stopped = console(), threading.Event()
    while True:
        try:
            said = Prompt.ask("[bold]you[/]", console=out)
        except (EOFError, KeyboardInterrupt):
            break
        if not said.strip():
            break
        text = Text()
        stopped.clear()
        before = signal.signal(signal.SIGINT, lambda *_: stopped.set())
        try:
            with Live(text, console=out, refresh_per_second=12, vertical_overflow="visible") as live:
                for piece in talk.answer(said, max_tokens):
                    text.append(printable(piece))
                    live.update(text)
                    if stopped.is_set():
                        break
        finally:
            signal.signal(signal.SIGINT, before)
        if stopped.is_set():
            errors().print("stopped")


def _led(given: tuple[str, int, int | None, str, str, str, int, Path | None, int]) -> tuple[Any, Any] | None:
    """The model and its tokenizer, on the first rank; another follows that to its end, and has nothing then."""
    from zgraph.inference.orders import follow

    with progress() as shown:
        shown.add_task(f"reading and capturing {given[0]}")
        generator, tokenizer = _generator(*given)
    if generator.calls.is_first:
        return generator, tokenizer
    follow(generator)
    return None


def _check(model: str, weights: str, activations: str, kv: str, tensor_parallel: int) -> None:
    """Refuse words that mean nothing, before anything is read or started."""
    if not Path(model).is_dir():
        raise UsageError(f"there is no folder {model}; save a model and its tokenizer to one with save_pretrained")
    if tensor_parallel > 1 and activations:
        raise UsageError("--tensor-parallel is for activations as they are; leave it or --activations out")
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
    tensor_parallel: int,
) -> tuple[Any, Any]:
    """The model of a folder for inference, and its tokenizer. All ranks that compute together call it."""
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
        tensor_parallel=tensor_parallel if tensor_parallel > 1 else None,
    )
    if not isinstance(found, Generator):
        found.generate()
    return found, tokenizer
