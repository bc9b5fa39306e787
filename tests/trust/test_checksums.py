"""Checkpoints of which a bit has changed, or whose parts do not tile their tensors."""

from __future__ import annotations

import json
import logging
import random
from pathlib import Path

import pytest
import torch
from torch import nn

import zgraph
from zgraph.engine.checkpoint import checksums
from zgraph.engine.checkpoint.checksums import Box, is_tiled
from zgraph.engine.checkpoint.export import export_hf
from zgraph.engine.checkpoint.storage import INDEX, Index, Reader
from zgraph.engine.engine import Engine
from zgraph.errors import CheckpointError


def engine_of(seed: int = 0) -> Engine:
    torch.manual_seed(seed)
    config = {"train_batch_size": 4, "optimizer": {"type": "AdamW"}}
    return zgraph.initialize_engine(model=nn.Linear(6, 5), config=config)[0]  # type: ignore[arg-type]


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    engine = engine_of()
    engine.save_checkpoint(tmp_path)
    return tmp_path / "global_step0"


def test_a_flipped_bit_anywhere_is_found_before_anything_is_loaded(saved: Path) -> None:
    engine = engine_of(seed=1)
    before = {name: value.clone() for name, value in engine.module.state_dict().items()}
    draw = random.Random(0)
    for path in sorted(saved.iterdir()):
        whole = path.read_bytes()
        for at in {0, len(whole) // 2, len(whole) - 1, *(draw.randrange(len(whole)) for _ in range(12))}:
            path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << draw.randrange(8)]) + whole[at + 1 :])
            with pytest.raises(CheckpointError, match=path.name):
                engine.load_checkpoint(saved.parent)
        path.write_bytes(whole)
    assert all(torch.equal(value, before[name]) for name, value in engine.module.state_dict().items())
    engine.load_checkpoint(saved.parent)
    assert not torch.equal(engine.module.state_dict()["weight"], before["weight"])


def test_a_damaged_checkpoint_is_not_exported(saved: Path, tmp_path: Path) -> None:
    path = saved / "rank_0_0.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(CheckpointError, match=f"{path.name} is damaged"):
        export_hf(saved, tmp_path / "out")


def test_a_file_is_read_in_pieces(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checksums, "CHUNK_BYTES", 7)
    Reader(saved).check()


def test_ranks_check_all_files_together(saved: Path) -> None:
    path = saved / "state.json"
    path.write_text(path.read_text() + " ")
    failed = 0
    for rank in range(3):
        try:
            Reader(saved).check(rank, 3)
        except CheckpointError:
            failed += 1
    assert failed == 1


def of_version_1(folder: Path) -> None:
    index = json.loads((folder / INDEX).read_text())
    del index["checksums"], index["checksum"]
    (folder / INDEX).write_text(json.dumps({**index, "version": 1}))


def test_an_older_checkpoint_loads_and_is_said_not_to_be_checked(saved: Path, caplog: pytest.LogCaptureFixture) -> None:
    of_version_1(saved)
    with caplog.at_level(logging.WARNING, "zgraph"):
        assert engine_of(seed=1).load_checkpoint(saved.parent)[0] == str(saved)
    assert "cannot be checked" in caplog.text


def test_a_newer_one_without_checksums_is_damaged(saved: Path) -> None:
    index = Index.model_validate_json((saved / INDEX).read_text()).model_copy(update={"checksums": {}})
    index = index.model_copy(update={"checksum": index.computed()})
    (saved / INDEX).write_text(index.model_dump_json())
    with pytest.raises(CheckpointError, match=r"no checksum of rank_0_0.safetensors"):
        engine_of().load_checkpoint(saved.parent)


def test_parts_at_one_place_are_damage(saved: Path) -> None:
    of_version_1(saved)
    index = json.loads((saved / INDEX).read_text())
    stored = next(t for name, t in index["tensors"].items() if name.endswith("weight"))
    (chunk,) = stored["chunks"]
    half = {**chunk, "sizes": [chunk["sizes"][0], chunk["sizes"][1] // 2]}
    stored["chunks"] = [half, half]
    (saved / INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"the parts of .*weight do not make a tensor"):
        Reader(saved)


@pytest.mark.parametrize(
    ("shape", "boxes", "good"),
    [
        ((4,), [((0,), (2,)), ((2,), (2,))], True),
        ((4,), [((0,), (2,)), ((0,), (2,))], False),
        ((4,), [((0,), (3,)), ((2,), (1,))], False),
        ((4,), [((0,), (2,)), ((3,), (2,))], False),
        ((2, 2), [((0, 0), (2, 1)), ((0, 1), (2, 1))], True),
        ((2, 2), [((0, 0), (2, 1)), ((0, 0), (1, 2))], False),
        ((2, 2), [((0, 0), (1, 1)), ((0, 1), (1, 1)), ((1, 0), (1, 2))], True),
        ((2, 2), [((0, 0), (2,))], False),
        ((), [((), ())], True),
        ((), [((), ()), ((), ())], False),
        ((), [], False),
        ((0, 3), [], True),
        ((0, 3), [((0, 0), (0, 3))], True),
        ((4,), [((0,), (4,)), ((2,), (0,))], True),
    ],
)
def test_tiling(shape: tuple[int, ...], boxes: list[Box], good: bool) -> None:
    assert is_tiled(shape, boxes) is good


def test_tiling_of_many_parts_is_fast() -> None:
    for dim in range(2):
        boxes = [((i, 0) if dim == 0 else (0, i), (1, 3) if dim == 0 else (3, 1)) for i in range(100_000)]
        assert is_tiled((100_000, 3) if dim == 0 else (3, 100_000), boxes)
