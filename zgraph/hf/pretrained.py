"""Weights of a pretrained model, with an account of each: the file that it came from, or that it is new."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch.distributed as dist
from safetensors import safe_open
from torch import nn
from transformers.utils import (
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    WEIGHTS_INDEX_NAME,
    WEIGHTS_NAME,
)
from transformers.utils.hub import cached_file

from zgraph.compiler.narrator import tell
from zgraph.environment import environment
from zgraph.errors import StateDictError, UsageError
from zgraph.options.validate import check_in_memory

New = Literal["warn", "error", "allow"]
ATTRIBUTE = "_zgraph_loaded"
_HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")
_SHOWN = 8


@dataclass(frozen=True)
class Loaded:
    """Account of the weights of a model that `load_pretrained` made.

    Attributes:
        name: the folder or the model's name.
        sources: the file of each parameter that was loaded; several, joined by ", ", if it was put together. One that
            is tied to another has that one's.
        missing: parameters that are not in the files and were newly made, at random as a rule.
        mismatched: the same of those that the files have in another shape.
        unexpected: what the files have and the model does not take.
    """

    name: str
    sources: Mapping[str, str]
    missing: tuple[str, ...] = ()
    mismatched: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()

    @property
    def new(self) -> tuple[str, ...]:
        """Parameters whose values come from no file."""
        return tuple(sorted({*self.missing, *self.mismatched}))

    @property
    def line(self) -> str:
        """The account in one line."""
        files = sorted({file for source in self.sources.values() for file in source.split(", ")})
        listed = ", ".join(files[:3]) + (f" and {len(files) - 3} more" if len(files) > 3 else "")
        said = f"{len(self.sources)} of {len(self.sources) + len(self.new)} weights of {self.name} loaded from {listed}"
        said += f"; {len(self.new)} newly made: {_some(self.new)}" if self.new else ""
        return said + (f"; {len(self.unexpected)} not used: {_some(self.unexpected)}" if self.unexpected else "")


def load_pretrained(
    kind: Any, name: str | os.PathLike[str], *args: Any, new: New = "warn", **options: Any
) -> nn.Module:
    """`kind.from_pretrained(name, ...)` of transformers, with an account of every weight: `zgraph.hf.loaded(model)`.

        model = zgraph.compile(load_pretrained(AutoModelForCausalLM, "folder"), stage=3)

    The first rank tells in one line how many weights came from which files.

    Args:
        kind: a model class of transformers, or one of its Auto classes.
        name: a folder, or the name of a model.
        args: more arguments of `from_pretrained`, and `options` its keywords.
        new: what to do about parameters that no file has, which are newly made: "warn" of them by name, "error", or
            "allow" (a new head for another task, say).

    Raises:
        UsageError: `new` is none of these, or the weights would not be in memory.
        StateDictError: with `new="error"`, a parameter is newly made.
    """
    if new not in get_args(New):
        raise UsageError(f'new must be "warn", "error" or "allow", not {new!r}')
    options.pop("output_loading_info", None)
    model, info = kind.from_pretrained(name, *args, output_loading_info=True, **options)
    check_in_memory(model)
    if info["error_msgs"]:
        raise StateDictError(f"weights of {name} do not load: {'; '.join(info['error_msgs'])}")
    mismatched = tuple(sorted(str(entry[0]) for entry in info["mismatched_keys"]))
    missing = tuple(sorted({*info["missing_keys"]} - {*mismatched}))
    places = dict(_places(name, options))
    held = dict(model.named_parameters(remove_duplicate=False))
    sources = {n: _source(n, places, model) for n in dict(model.named_parameters()) if n not in {*missing, *mismatched}}
    for own in [n for n, source in sources.items() if not source]:  # tied: the file has it under its other name
        other = next((n for n in held if held[n] is held[own] and n in places), None)
        sources[own] = places[other] if other else ", ".join(sorted({*places.values()}))
    account = Loaded(str(name), sources, missing, mismatched, tuple(sorted(info["unexpected_keys"])))
    if account.new and new == "error":
        raise StateDictError(
            f"{len(account.new)} parameters of {type(model).__name__} are not in {name} and would be trained from new "
            f"values: {_some(account.new)}. Load a class whose parameters the files have, or pass new='allow'"
        )
    model.__dict__[ATTRIBUTE] = account
    if not dist.is_initialized() or dist.get_rank() == 0:
        if environment().logs:
            tell(account.line)
        if account.new and new == "warn":
            warnings.warn(
                f"{len(account.new)} parameters of {type(model).__name__} are not in {name} and were newly made: "
                f"{_some(account.new)}. Pass new='allow' where they are to be trained from there, new='error' to "
                "refuse them",
                stacklevel=2,
            )
    return model  # type: ignore[no-any-return]


def loaded(model: nn.Module) -> Loaded:
    """The account of a model's weights. Raises UsageError if `load_pretrained` did not make it."""
    found = model.__dict__.get(ATTRIBUTE)
    if not isinstance(found, Loaded):
        raise UsageError(
            f"nothing is known of the weights of this {type(model).__name__}: load it by "
            "zgraph.hf.load_pretrained(class, name) in the place of class.from_pretrained(name)"
        )
    return found


def _places(name: str | os.PathLike[str], options: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """The file of each key of a checkpoint."""
    if gguf := options.get("gguf_file"):
        yield "", str(gguf)
        return
    variant = options.get("variant")
    found = {key: options[key] for key in _HUB_OPTIONS if options.get(key) is not None}
    quiet = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_gated_repo": False}
    for file in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_NAME, WEIGHTS_INDEX_NAME):
        stem, _, rest = file.partition(".")
        own = f"{stem}.{rest.replace('.index', f'.index.{variant}') if 'index' in rest else f'{variant}.{rest}'}"
        path = cached_file(name, own if variant else file, **found, **quiet)
        if path is None:
            continue
        if path.endswith(".json"):
            yield from json.loads(Path(path).read_text())["weight_map"].items()
        elif path.endswith(".safetensors"):
            with safe_open(path, "pt") as opened:
                yield from dict.fromkeys(opened.keys(), Path(path).name).items()
        else:
            yield "", Path(path).name
        return


def _source(name: str, places: Mapping[str, str], model: nn.Module) -> str:
    """The file or files that a parameter came from; empty if none has its name or its module's."""
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    for key in (name, name.removeprefix(prefix), prefix + name):
        if key in places:
            return places[key]
    if "" in places:
        return places[""]
    parts = name.split(".")
    for length in range(len(parts) - 1, 1, -1):  # put together of others of its module, as fused experts are
        part = ".".join(parts[:length]) + "."
        if files := sorted({file for key, file in places.items() if part in f"{prefix}{key}"}):
            return ", ".join(files)
    return ""


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
