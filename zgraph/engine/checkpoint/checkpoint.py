"""Checkpoints of an engine: each rank writes its own files, whole or not at all, while training goes on.

Tensors lie under the names of parameters, so that a checkpoint is resumed at any number of ranks, stage or offload.
No pickle is written or read.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from zgraph.bridge import private_runtime
from zgraph.compiler.compiled_model import compiled_model, is_gathered
from zgraph.engine.checkpoint.accumulation import check_between, gradient_targets, gradients_of, take_gradients
from zgraph.engine.checkpoint.background import Background, complete, settle_files
from zgraph.engine.checkpoint.deepspeed import is_deepspeed, load_deepspeed
from zgraph.engine.checkpoint.directory import Folders, checked_tag
from zgraph.engine.checkpoint.files import read_json
from zgraph.engine.checkpoint.json_codec import decode
from zgraph.engine.checkpoint.memory.copies import Copies
from zgraph.engine.checkpoint.optimizer_state import OptimizerLoad
from zgraph.engine.checkpoint.rests import rest_targets, rests_of, take_rests
from zgraph.engine.checkpoint.rng_state import start_anew
from zgraph.engine.checkpoint.shards import read_shards, write_shards
from zgraph.engine.checkpoint.state import (
    STATE,
    OfRank,
    State,
    model_targets,
    of_rank,
    restore,
    tensors_of,
    texts_of,
    without_frozen,
)
from zgraph.engine.checkpoint.storage import INDEX, Reader, Writer
from zgraph.engine.checkpoint.tensors import Tensors, model_tensors
from zgraph.errors import CheckpointError, UsageError, ZgraphError

if TYPE_CHECKING:
    from zgraph.engine.protocol import Trains

log = logging.getLogger("zgraph")

Loaded = tuple[str | None, dict[str, Any] | None]


@dataclass(frozen=True)
class Parts:
    """Parts of a checkpoint to load."""

    optimizer: bool = True
    scheduler: bool = True
    module_only: bool = False
    strict: bool = True


class Checkpoints:
    """Saves and loads an engine.

    Args:
        engine: which.
    """

    def __init__(self, engine: Trains) -> None:
        self.engine, self.ranks = engine, engine.ranks
        self._background = Background(engine.ranks, "checkpoint", complete)
        self.copies = Copies(engine) if engine.config.keys.checkpoint.memory.every else None

    # --- saving ------------------------------------------------------------------------------------------------------

    def save(
        self, root: Path, tag: object, client_state: Mapping[str, Any], *, is_latest: bool, frozen: bool = True
    ) -> bool:
        """As `Engine.save_checkpoint`."""
        self._check_at_rest()
        check_between(self.engine)
        self.wait()
        settle_files()
        name, tensors, beside = self.ranks.together(lambda: self._contents(tag, client_state))
        if not frozen:
            tensors = without_frozen(self.engine.module, tensors)
        tensors |= gradients_of(self.engine) | rests_of(self.engine)
        name = self._same_tag(name)
        folders = Folders(root)
        folder = self.ranks.first(lambda: folders.begin(name))
        session = compiled_model(self.engine.module).session

        def commit() -> None:
            folders.commit(folder, name, is_latest=is_latest)

        writer = Writer(folder, self.ranks.rank, beside, commit, lambda: session.doom)
        keys = self.engine.config.keys.checkpoint
        if keys.is_asynchronous:
            self._background.begin(tensors, writer, keys.memory_bytes)
        else:
            self._write(tensors, writer)
        return True

    def wait(self) -> None:
        """As `Engine.wait_for_checkpoint`."""
        self._background.wait()

    def after_step(self) -> None:
        """Copy to the memory of hosts what has just been updated, if it is time."""
        if self.copies is not None and self.copies.is_due:
            self.copies.make()

    def close(self) -> None:
        """As `Engine.destroy`, for what concerns checkpoints."""
        self.wait()
        if self.copies is not None:
            self.copies.close()

    def _contents(self, tag: object, client_state: Mapping[str, Any]) -> tuple[str, Tensors, dict[str, str]]:
        """The tag, the tensors, and the files beside them that this rank writes."""
        name = checked_tag(f"global_step{self.engine.global_steps}" if tag is None else tag)
        beside = texts_of(self.engine, client_state, of_all=self.ranks.rank == 0)
        return name, tensors_of(self.engine), beside

    def _same_tag(self, tag: str) -> str:
        """The first rank's, if all have the same or may differ."""
        tags = self.ranks.gather(tag)
        how = self.engine.config.keys.checkpoint.tag_validation
        if len(set(tags)) > 1 and how != "ignore":
            told = f"the ranks save under different tags: {', '.join(sorted(set(tags)))}"
            if how == "fail":
                raise CheckpointError(f"{told}; give all of them the same")
            log.warning("%s; all take that of the first rank, %s", told, tags[0])
        return tags[0]

    def _write(self, tensors: Tensors, writer: Writer) -> None:
        try:
            write_shards(tensors, writer, self.ranks)
        except ZgraphError as error:
            log.error("%s", error)
            if self.ranks.rank == 0:
                shutil.rmtree(writer.folder, ignore_errors=True)
            raise

    def _check_at_rest(self) -> None:
        if is_gathered(self.engine.module):
            raise UsageError("a checkpoint within zgraph.gathered: there are no shards in there; go out first")

    # --- loading -----------------------------------------------------------------------------------------------------

    def load(self, root: Path, tag: object, parts: Parts) -> Loaded:
        """As `Engine.load_checkpoint`."""
        self._check_at_rest()
        self.wait()
        settle_files()
        folders = Folders(root)
        folder = self.ranks.first(lambda: folders.find(None if tag is None else checked_tag(tag)))
        if tag is None and parts == Parts(strict=parts.strict) and self.copies is not None:
            step = self.ranks.first(lambda: _step_of(folder))
            if (found := self.copies.find(newer_than=step)) is not None:
                try:
                    return found.place, self._load(partial(self.copies.reader, found), parts)
                except CheckpointError as error:
                    raise self.copies.not_ours(found, error) from None
        if folder is None:
            if self.ranks.rank == 0:
                what, there = "to go on from" if tag is None else tag, ", ".join(folders.tags()) or "nothing"
                log.warning("there is no checkpoint %s in %s, which has %s", what, root, there)
            return None, None
        is_theirs = self.ranks.first(lambda: is_deepspeed(folder))
        if is_theirs:
            return str(folder), self._load_deepspeed(folder, parts)

        def reader() -> Reader:
            if not (folder / INDEX).is_file():
                raise CheckpointError(f"{folder} holds no checkpoint: it has neither {INDEX} nor DeepSpeed's files")
            return Reader(folder)

        return str(folder), self._load(reader, parts)

    def _load(self, open_reader: Callable[[], Reader], parts: Parts) -> dict[str, Any]:
        engine, ranks = self.engine, self.ranks
        first = ranks.rank - ranks.rank % engine.config.together  # ranks that compute together draw the same

        def opened() -> tuple[Reader, State, OfRank | None, Tensors, OptimizerLoad | None, Tensors, Tensors]:
            reader = open_reader()
            reader.check(ranks.rank, ranks.size)
            state = read_json(reader.beside(STATE, 0), State)
            own = read_json(reader.beside(of_rank(first), first), OfRank) if first < state.world_size else None
            targets = model_targets(engine.module, reader.index.tensors, strict=parts.strict)
            gradients = gradient_targets(engine, state, reader.described) if parts.optimizer else {}
            rests = rest_targets(engine, reader.described) if parts.optimizer else {}
            return reader, state, own, targets, self._optimizer_load(reader, parts), gradients, rests

        reader, state, own, targets, optimizer, gradients, rests = ranks.together(opened)
        tensors = targets | gradients | rests | (optimizer.targets if optimizer is not None else {})
        try:
            read_shards(tensors, reader, ranks)
        finally:
            reader.close()
        _written(engine.module)

        def finish() -> None:
            take_gradients(engine, gradients)
            if parts.optimizer:
                take_rests(engine, rests)
            if optimizer is not None:
                optimizer.finish(state)
            if not parts.module_only:
                restore(engine, state, scheduler=parts.scheduler, optimizer=parts.optimizer)
                if own is not None:
                    own.restore()
                else:
                    start_anew(engine.config.keys.seed or 0, state.global_steps, first)

        ranks.together(finish)
        mine = own.client_state if own is not None else None
        found: dict[str, Any] = decode(state.client_state if mine is None else mine)
        return found

    def _optimizer_load(self, reader: Reader, parts: Parts) -> OptimizerLoad | None:
        optimizer = self.engine.optimizer
        if optimizer is None or not parts.optimizer:
            return None
        return OptimizerLoad(optimizer, self.engine.module, reader.described)

    def _load_deepspeed(self, folder: Path, parts: Parts) -> dict[str, Any]:
        found = self.ranks.together(
            lambda: load_deepspeed(
                self.engine,
                folder,
                strict=parts.strict,
                optimizer=parts.optimizer,
                scheduler=parts.scheduler,
                module_only=parts.module_only,
            )
        )
        _written(self.engine.module)
        self.engine.zero_grad()
        return found


def _step_of(folder: Path | None) -> int:
    """The step of a checkpoint on disk; -1 where there is none that can be read."""
    try:
        return read_json(folder / STATE, State).global_steps if folder is not None else -1
    except CheckpointError:
        return -1


def _written(module: nn.Module) -> None:
    """Copies to compute with are out of date."""
    private_runtime.bump_version([t for t in model_tensors(module).values() if isinstance(t, nn.Parameter)])
