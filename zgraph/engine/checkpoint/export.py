"""A trained model as one folder that transformers loads, from an engine or from a checkpoint."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from zgraph.bridge.dtypes import Dtype, as_dtype_or_none
from zgraph.compiler.compiled_model import compiled_model
from zgraph.engine.checkpoint.background import settle_files
from zgraph.engine.checkpoint.directory import sync, write_text
from zgraph.engine.checkpoint.files import in_files, read_json, write_tensors
from zgraph.engine.checkpoint.state import State
from zgraph.engine.checkpoint.storage import Reader
from zgraph.engine.checkpoint.tensors import model_tensors, whole
from zgraph.errors import CheckpointError, UsageError

if TYPE_CHECKING:
    from zgraph.engine.protocol import Trains

MAX_BYTES = 5_000_000_000
"""Of a safetensors file that transformers would write."""

TOKENIZER = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "*.model",
    "chat_template*",
)
"""The names of a tokenizer's files."""

Fetch = Callable[[str], torch.Tensor]


def save_16bit(engine: Trains, folder: Path, file: str) -> bool:
    """As `Engine.save_16bit_model`."""
    zero = engine.config.keys.zero_optimization
    if Path(file).name != file or not file.endswith(".safetensors"):
        raise UsageError(f"save_filename must be the name of a safetensors file, say model.safetensors, not {file!r}")
    if zero.stage == 3 and not zero.stage3_gather_16bit_weights_on_model_save:
        return False
    _Writing(engine).write(folder, file.removesuffix(".safetensors"), None)
    return True


def export(engine: Trains, folder: Path, tokenizer: Any) -> None:
    """As `Engine.export`."""
    config: Any = getattr(engine.module, "config", None)
    writing = _Writing(engine)
    writing.write(folder, "model", MAX_BYTES)

    def beside() -> None:
        if hasattr(config, "to_diff_dict"):
            _write_config(folder, config.to_diff_dict(), type(engine.module).__name__, engine.config.param_dtype)
        _write_tokenizer(folder, tokenizer)

    writing.ranks.first(beside)


def export_hf(
    checkpoint_folder: str | Path, folder: str | Path, *, tokenizer: Any = None, dtype: Dtype | None = None
) -> None:
    """Make a folder that transformers loads of a checkpoint; one process does it, and tensors are read one by one.

    Args:
        checkpoint_folder: that of one tag.
        folder: where to.
        tokenizer: one of transformers, or a folder that has a tokenizer's files.
        dtype: of the parameters; by default what was computed in.

    Raises:
        CheckpointError: the checkpoint is damaged, or the folder cannot be written.
    """
    settle_files()
    reader, home = Reader(Path(checkpoint_folder)), Path(folder)
    reader.check()
    state = read_json(Path(checkpoint_folder) / "state.json", State)
    chosen = as_dtype_or_none(state.dtype if dtype is None else dtype, "dtype")
    dtypes = {
        name.removeprefix("model."): stored.torch_dtype
        for name, stored in reader.index.tensors.items()
        if name.startswith("model.")
    }
    wanted = {n: d if chosen is None or n in state.buffers or d is None else chosen for n, d in dtypes.items()}
    sizes = {
        name: torch.Size(reader.index.tensors[f"model.{name}"].shape).numel() * kind.itemsize
        for name, kind in wanted.items()
        if kind is not None
    }
    try:
        write_sharded(home, "model", sizes, lambda name: reader.whole(f"model.{name}").to(wanted[name]), MAX_BYTES)
        if state.model_info is not None:
            _write_config(home, state.model_info, None, None if chosen is None else str(chosen)[6:])
        _write_tokenizer(home, tokenizer)
    except OSError as error:
        raise CheckpointError(f"{home} cannot be written: {error}") from None


def write_sharded(
    folder: Path, stem: str, num_bytes: Mapping[str, int], fetch: Fetch, max_bytes: int | None, *, writes: bool = True
) -> None:
    """Write tensors as one safetensors file, or as several and an index.

    Args:
        folder: where to.
        stem: how the files' names begin.
        num_bytes: of each tensor.
        fetch: makes a tensor by its name. It is called for each of them, in their order.
        max_bytes: of a file; None for one file.
        writes: whether this rank writes, or takes part in fetching only.

    Raises:
        OSError: the folder cannot be written.
    """
    if writes:
        folder.mkdir(parents=True, exist_ok=True)
    parts = list(in_files(num_bytes, sum(num_bytes.values()) if max_bytes is None else max_bytes))
    files = [_file(stem, number, len(parts)) for number in range(len(parts))]
    for file, names in zip(files, parts, strict=True):
        tensors = {}
        for name in names:
            tensor = fetch(name)
            if writes:
                tensors[name] = tensor.contiguous()
        if writes:
            write_tensors(folder / file, tensors)
    if writes and len(parts) > 1:
        weights = {name: file for file, names in zip(files, parts, strict=True) for name in names}
        index = {"metadata": {"total_size": sum(num_bytes.values())}, "weight_map": weights}
        write_text(folder / f"{stem}.safetensors.index.json", json.dumps(index, indent=2, sort_keys=True))
    if writes:
        sync(folder)


def _file(stem: str, number: int, count: int) -> str:
    return f"{stem}.safetensors" if count == 1 else f"{stem}-{number + 1:05}-of-{count:05}.safetensors"


class _Writing:
    """An engine's model on its way to the first rank's disk.

    All ranks take part in gathering; what goes wrong on the first is kept until the end, so that none waits in vain.
    """

    def __init__(self, engine: Trains) -> None:
        self.tensors, self.ranks = model_tensors(engine.module), engine.ranks
        self.session = compiled_model(engine.module).session
        self.session.raise_doom()
        self.dtype = getattr(torch, engine.config.param_dtype) if engine.config.param_dtype is not None else None

    def write(self, folder: Path, stem: str, max_bytes: int | None) -> None:
        sizes = {name: tensor.numel() * self._dtype(tensor).itemsize for name, tensor in self.tensors.items()}
        problem: OSError | None = None
        left = iter(self.tensors)

        def fetch(name: str) -> torch.Tensor:
            next(left)
            return whole(self.tensors[name], self._dtype(self.tensors[name]))

        try:
            write_sharded(folder, stem, sizes, fetch, max_bytes, writes=self.ranks.rank == 0)
        except OSError as error:
            problem = error
        for name in left:
            whole(self.tensors[name], self._dtype(self.tensors[name]))

        def check() -> None:
            if problem is not None:
                raise problem
            self.session.raise_doom()  # what was gathered since may be torn

        self.ranks.together(check)

    def _dtype(self, tensor: torch.Tensor) -> torch.dtype:
        is_cast = self.dtype is not None and isinstance(tensor, nn.Parameter) and tensor.is_floating_point()
        return self.dtype if is_cast and self.dtype is not None else tensor.dtype


def _write_config(folder: Path, info: Mapping[str, Any], architecture: str | None, dtype: str | None) -> None:
    found = dict(info)
    if architecture is not None:
        found["architectures"] = [architecture]
    if dtype is not None:
        found["dtype"] = dtype
    write_text(folder / "config.json", json.dumps(found, indent=2, sort_keys=True) + "\n")


def _write_tokenizer(folder: Path, tokenizer: Any) -> None:
    if isinstance(tokenizer, str | Path):
        for path in sorted({p for pattern in TOKENIZER for p in Path(tokenizer).glob(pattern)}):
            shutil.copy(path, folder / path.name)
    elif tokenizer is not None:
        tokenizer.save_pretrained(str(folder))
