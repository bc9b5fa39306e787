"""Once the heartbeat has aborted collectives, nothing that may be torn is applied, saved or handed out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch.distributed.device_mesh import DeviceMesh

import zgraph
from zgraph.compiler.compiled_model import compiled_model
from zgraph.engine.checkpoint import staging, storage
from zgraph.engine.engine import Engine
from zgraph.errors import CheckpointError, PeerError

from .nets import Odd, rows
from .pool import Pool
from .test_engine_checkpoint import engine_of

WHY = "rank 7 is gone"


def is_refused(action: Callable[[], Any]) -> None:
    with pytest.raises(PeerError, match=WHY):
        action()


def train(engine: Engine) -> None:
    for step in range(4):
        engine.backward(engine(*rows(step, 6)))
        engine.step()


def a_plain_loop(mesh: DeviceMesh) -> None:
    torch.manual_seed(0)
    model, other = zgraph.compile(Odd(), stage=3, mesh=mesh), torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(*rows(0, 8)).backward()
    before = [p.full_tensor().clone() for p in model.parameters()]  # type: ignore[attr-defined]
    compiled_model(model).session.peers.doom = PeerError(WHY)
    is_refused(optimizer.step)
    is_refused(model.state_dict)
    other(torch.ones(2)).sum().backward()
    torch.optim.SGD(other.parameters(), lr=0.1).step()
    compiled_model(model).session.peers.doom = None
    for parameter, was in zip(model.parameters(), before, strict=True):
        assert torch.equal(parameter.full_tensor(), was)  # type: ignore[attr-defined]


def an_engine(mesh: DeviceMesh, path: Path) -> None:
    engine = engine_of(2, mesh=mesh)
    train(engine)
    engine.save_checkpoint(path, tag="good")
    peers = compiled_model(engine.module).session.peers
    peers.doom = PeerError(WHY)
    for action in (engine.step, lambda: engine.save_checkpoint(path), engine.get_global_grad_norm):
        is_refused(action)
    for action in (engine.module_state_dict, lambda: engine.export(path / "export")):
        is_refused(action)
    assert engine.global_steps == 2
    peers.doom = None
    engine.destroy()


def while_it_is_saved(mesh: DeviceMesh, path: Path, is_async: bool) -> None:
    """Aborted when the first rank comes to read its shards."""
    engine = engine_of(2, mesh=mesh, checkpoint={"asynchronous": is_async})
    train(engine)
    engine.save_checkpoint(path, tag="good")
    engine.wait_for_checkpoint()
    peers = compiled_model(engine.module).session.peers

    def dooming(own: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            if mesh.get_rank() == 0:
                peers.doom = PeerError(WHY)
            return own(*args)

        return call

    where = (staging.Pipe, "fill") if is_async else (storage, "write_tensors")

    def save() -> None:
        engine.save_checkpoint(path, tag="torn")
        engine.wait_for_checkpoint()

    with patch.object(*where, dooming(getattr(*where))), pytest.raises(CheckpointError, match=WHY):
        save()
    peers.doom = None
    found, _ = engine.load_checkpoint(path)
    assert found is not None
    assert Path(found).name == "good"
    assert sorted(p.name for p in path.iterdir() if p.is_dir()) == ["good"]


def test_a_plain_loop(pool: Pool) -> None:
    pool.run(a_plain_loop, 2)


def test_an_engine(pool: Pool, tmp_path: Path) -> None:
    pool.run(an_engine, 2, tmp_path)
    assert not (tmp_path / "export").exists()


@pytest.mark.parametrize("is_async", [False, True])
def test_while_it_is_saved(pool: Pool, tmp_path: Path, is_async: bool) -> None:
    pool.run(while_it_is_saved, 2, tmp_path, is_async)
