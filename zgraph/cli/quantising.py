"""The commands that keep a model's weights in integers, and that measure what it costs."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from zgraph.cli.app import AsJson, app, console, one_of, print_json, progress, writing
from zgraph.cli.completion import any_of
from zgraph.errors import UsageError

WEIGHTS, ACTIVATIONS = ("int8", "int4"), ("int8",)
NUM_WORST = 10
"""Layers that `eval` names."""

Model = Annotated[str, typer.Argument(help="A folder with a model and its tokenizer, as transformers saves them.")]
Weights = Annotated[str, typer.Option(help="int8 or int4.", autocompletion=any_of(*WEIGHTS))]
Group = Annotated[int, typer.Option(help="Columns that share a scale in int4: 32, 64 or 128.")]
Calibrate = Annotated[
    Path | None,
    typer.Option(
        "--calibrate", help="A text in UTF-8 that int4 is rounded to suit (GPTQ), or that int8 activations are seen on."
    ),
]
Wider = Annotated[
    float, typer.Option(min=0, max=0.99, help="The share of weights in int4 that stay in int8: those that cost most.")
]
EXAMPLE = 8
"""Tokens of the rows that a model is exported with."""

NUM_CALIBRATED = 8192
"""Tokens of a text that models are calibrated with."""


@app.command()
def quantise(
    model: Model,
    output: Annotated[str, typer.Option("--output", "-o", help="The folder to write.")],
    weights: Weights = "int8",
    group: Group = 64,
    calibrate: Calibrate = None,
    wider: Wider = 0.0,
    as_json: AsJson = False,
) -> None:
    """Write a model with its weights in int8 or int4, as safetensors.

    Example: `zgraph quantise SmolLM2-135M -o SmolLM2-135M-int8`
    """
    from zgraph.inference.storage import FILE, save_quantised

    one_of("--weights", weights, WEIGHTS)
    with progress() as shown:
        shown.add_task(f"reading {model}")
        found, tokenizer = _plain(model)
        before = sum(p.nbytes for p in found.parameters())
        shown.add_task("rounding its weights")
        with writing(output):
            seen = calibration(tokenizer, calibrate)
            kept = save_quantised(found, Path(output), weights=weights, group=group, calibrate=seen, wider=wider)
            tokenizer.save_pretrained(output)
    after = (Path(output) / FILE).stat().st_size
    counts = Counter(kept.values())
    if as_json:
        print_json({"folder": output, "bytes": after, "bytes_before": before, "weights": dict(counts)})
        return
    listed = ", ".join(f"{count} weights in {kind}" for kind, count in sorted(counts.items()))
    console().print(
        f"{output}: {after:,} bytes, {after / before:.2f} of the {before:,} before; {listed}", highlight=False
    )


@app.command("eval")
def evaluation(
    model: Model,
    text: Annotated[Path, typer.Option("--text", help="A text in UTF-8 to predict.")],
    weights: Weights = "int8",
    activations: Annotated[
        str, typer.Option(help="int8 rounds activations too.", autocompletion=any_of(*ACTIVATIONS))
    ] = "",
    kv: Annotated[
        str, typer.Option("--kv", help="int8 rounds keys and values too.", autocompletion=any_of("int8"))
    ] = "",
    group: Group = 64,
    calibrate: Calibrate = None,
    wider: Wider = 0.0,
    window: Annotated[int, typer.Option(min=2, help="Tokens that are scored together.")] = 256,
    max_windows: Annotated[int, typer.Option(min=1, help="Windows of the text that are scored at most.")] = 64,
    as_json: AsJson = False,
) -> None:
    """Score a text with a model as it is and in integers: perplexities, and the layers that err most.

    Example: `zgraph eval SmolLM2-135M --text book.txt --weights int4`
    """
    import torch

    from zgraph.inference.evaluation import evaluate

    one_of("--weights", weights, WEIGHTS)
    words = _text(text)
    with progress() as shown:
        shown.add_task(f"scoring {text}")
        found, tokenizer = _plain(model)
        tokens = torch.tensor(tokenizer(words, verbose=False)["input_ids"])
        result = evaluate(
            found,
            tokens,
            weights=weights,
            activations=activations or None,
            kv=kv or None,
            group=group,
            calibrate=calibration(tokenizer, calibrate),
            wider=wider,
            window=window,
            max_windows=max_windows,
        )
    if as_json:
        print_json({**dataclasses.asdict(result), "worse": result.worse})
        return
    out = console()
    out.print(
        f"perplexity {result.before:.4f} before, {result.after:.4f} after ({result.worse:+.2%}), over "
        f"{result.num_tokens:,} tokens; weights {result.after_bytes:,} bytes, "
        f"{result.after_bytes / result.before_bytes:.2f} of the {result.before_bytes:,} before",
        highlight=False,
    )
    table = Table("layer", "kept in", "error", title="the layers that err most")
    for layer in result.layers[:NUM_WORST]:
        table.add_row(escape(layer.name), layer.kept_in, f"{layer.error:.4f}")
    out.print(table)


@app.command("export-model")
def export_model(
    model: Model,
    output: Annotated[str, typer.Option("--output", "-o", help="The file to write, .onnx or .pt2.")],
    weights: Annotated[str, typer.Option(help="int8; as they are without.", autocompletion=any_of("int8"))] = "",
    as_json: AsJson = False,
) -> None:
    """Write a model's forward for other runtimes: ONNX, or a program of torch.export. It takes rows of any length.

    Example: `zgraph export-model SmolLM2-135M -o smollm2.onnx`
    """
    import torch

    from zgraph.inference.exporting import export_model as written

    if weights:
        one_of("--weights", weights, ("int8",))
    with progress() as shown:
        shown.add_task(f"reading {model}")
        found, _, kept_in = loaded(model)
        if kept_in is not None and weights and weights != kept_in[0]:
            raise UsageError(f"{model} has weights in {kept_in[0]}; leave --weights out")
        is_int8 = "int8" in (weights, kept_in[0] if kept_in is not None else "")
        ids = torch.arange(2 * EXAMPLE).view(2, EXAMPLE) % found.config.vocab_size
        shown.add_task(f"writing {output}")
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        dynamic = dict.fromkeys(inputs, (0, 1))
        with writing(output):
            written(found, inputs, output, dynamic=dynamic, weights="int8" if is_int8 else None)
    files = [file for file in (Path(output), Path(f"{output}.data")) if file.is_file()]
    num_bytes, kind = sum(file.stat().st_size for file in files), "int8" if is_int8 else "fp32"
    if as_json:
        print_json({"file": output, "bytes": num_bytes, "weights": kind})
        return
    console().print(f"{output}: {num_bytes:,} bytes, weights in {kind}", highlight=False)


def calibration(tokenizer: Any, path: Path | None) -> Any:
    """The tokens of a text that a model is calibrated with, in windows of 256; None without one."""
    if path is None:
        return None
    import torch

    from zgraph.inference.evaluation import WINDOW

    tokens = torch.tensor(tokenizer(_text(path), verbose=False)["input_ids"])[:NUM_CALIBRATED]
    if not len(tokens):
        raise UsageError(f"{path} has no tokens; take a longer text")
    return tokens[: len(tokens) // WINDOW * WINDOW].view(-1, WINDOW) if len(tokens) >= WINDOW else tokens


def loaded(name: str) -> tuple[Any, Any, tuple[str, int] | None]:
    """The model and the tokenizer of a folder, in fp32; the integers of `zgraph quantise`, and their group.

    Nothing of the folder's is run, and nothing downloaded.
    """
    try:
        import torch
        import transformers
    except ImportError:
        raise UsageError("this needs transformers: pip install zgraph-compiler[hf]") from None
    from zgraph.inference.storage import FILE, load_quantised

    folder = Path(name)
    if not folder.is_dir():
        raise UsageError(f"there is no folder {name}; save a model and its tokenizer to one with save_pretrained")
    safe = {"local_files_only": True, "trust_remote_code": False}
    auto: Any = transformers.AutoModelForCausalLM
    tokenizer: Any = transformers.AutoTokenizer
    try:
        if (folder / FILE).is_file():
            model, weights, group = load_quantised(folder)
            return model, tokenizer.from_pretrained(name, **safe), (weights, group)
        plain = auto.from_pretrained(name, dtype=torch.float32, use_safetensors=True, **safe).eval()
        return plain, tokenizer.from_pretrained(name, **safe), None
    except UsageError:
        raise
    except (OSError, ValueError) as error:
        raise UsageError(f"{name} has no causal language model with safetensors, or no tokenizer: {error}") from None


def _plain(name: str) -> tuple[Any, Any]:
    """The model and the tokenizer of a folder that holds no integers."""
    model, tokenizer, kept_in = loaded(name)
    if kept_in is not None:
        raise UsageError(f"{name} has weights in {kept_in[0]} already; take the folder that it was made from")
    return model, tokenizer


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UsageError(f"{path} is no text in UTF-8") from None
