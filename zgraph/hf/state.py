"""The state of a Trainer's optimizer in a folder of its checkpoint, in the files of the engine's checkpoints.

Every rank writes its own shards; another number of ranks, or stage, reads what it needs of them. Nothing is unpickled.
"""

from __future__ import annotations

from pathlib import Path

from torch import nn
from torch.optim import Optimizer

from zgraph.compiler.compiled_model import compiled_model
from zgraph.engine.checkpoint.files import read_json
from zgraph.engine.checkpoint.optimizer_state import OptimizerLoad, OptimizerState, optimizer_rest, optimizer_tensors
from zgraph.engine.checkpoint.ranks import ranks_of
from zgraph.engine.checkpoint.shards import read_shards, write_shards
from zgraph.engine.checkpoint.storage import INDEX, Reader, Writer
from zgraph.errors import CheckpointError

REST = "optimizer.json"


def is_complete(folder: Path) -> bool:
    """Whether `save_state` has written all: the index comes last."""
    return (folder / INDEX).is_file()


def save_state(folder: Path, model: nn.Module, optimizer: Optimizer) -> None:
    """Write the optimizer's state; all ranks call it, and have written when it returns.

    Args:
        folder: one that all hosts see.
        model: compiled; the optimizer has its parameters.
        optimizer: any of torch's or zgraph's.

    Raises:
        CheckpointError: on all ranks, if one cannot write.
        PeerError: the ranks cannot go on; nothing is saved.
    """
    session = compiled_model(model).session
    session.raise_doom()
    ranks = ranks_of(session)

    def begin() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / INDEX).unlink(missing_ok=True)

    def contents() -> dict[str, str]:
        return {REST: optimizer_rest(model, optimizer).model_dump_json()} if ranks.rank == 0 else {}

    ranks.first(begin)
    beside = ranks.together(contents)
    writer = Writer(folder, ranks.rank, beside, lambda: None, lambda: session.doom)
    write_shards(optimizer_tensors(model, optimizer), writer, ranks)


def load_state(folder: Path, model: nn.Module, optimizer: Optimizer) -> None:
    """Read what `save_state` wrote into an optimizer of the same model, however it is sharded now.

    Raises:
        CheckpointError: the folder is not complete, damaged, or of another model; on all ranks.
    """
    ranks = ranks_of(compiled_model(model).session)

    def opened() -> tuple[Reader, OptimizerState, OptimizerLoad]:
        reader = Reader(folder)
        reader.check(ranks.rank, ranks.size)
        rest = read_json(folder / REST, OptimizerState)
        load = OptimizerLoad(optimizer, model, reader.described)
        if missing := sorted(load.parameters.keys() - {name for group in rest.groups for name in group.names}):
            raise CheckpointError(f"{folder} has no state of {', '.join(missing[:5])}: it is of another model")
        return reader, rest, load

    reader, rest, load = ranks.together(opened)
    read_shards(load.targets, reader, ranks)
    ranks.together(lambda: load.finish(rest))
