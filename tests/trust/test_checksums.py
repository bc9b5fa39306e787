"""Checkpoints of which a bit has changed, or whose parts do not tile their tensors."""

from __future__ import annotations

import json
import logging
import os
import random
from pathlib import Path
from typing import Literal

import pytest
import torch
from torch import nn

import zgraph
from zgraph.engine.checkpoint import checksums, directory
from zgraph.engine.checkpoint.checksums import Box, check_file, is_tiled
from zgraph.engine.checkpoint.export import export_hf
from zgraph.engine.checkpoint.files import opened
from zgraph.engine.checkpoint.index import Index, RankFiles
from zgraph.engine.checkpoint.older import Chunk, OldIndex, Stored
from zgraph.engine.checkpoint.storage import INDEX, Reader
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
    engine.wait_for_checkpoint()
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


@pytest.mark.parametrize("name", ["rank_0_0.safetensors", INDEX, "state.json", "rank_0_files.json"])
def test_only_regular_files_are_read(saved: Path, name: str) -> None:
    """A link to a device would be read for ever, and a pipe would wait for a writer."""
    for make in (lambda path: path.symlink_to("/dev/zero"), os.mkfifo, Path.mkdir):
        (saved / name).rename(saved / "kept")
        make(saved / name)  # type: ignore[operator]
        with pytest.raises(CheckpointError, match=r"holds no checkpoint|no regular file"):
            engine_of().load_checkpoint(saved.parent)
        (saved / name).rmdir() if make is Path.mkdir else (saved / name).unlink()
        (saved / "kept").rename(saved / name)
    with pytest.raises(CheckpointError, match="no regular file"):
        check_file(Path("/dev/zero"), 0, 0)


def test_json_has_a_limit_of_size(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(directory, "MAX_TEXT_BYTES", 200)
    with pytest.raises(CheckpointError, match="at most 200"):
        Reader(saved)
    engine = engine_of()
    engine.save_checkpoint(tmp_path, tag="large")
    with pytest.raises(CheckpointError, match="keep less in client_state"):
        engine.wait_for_checkpoint()
    assert not (tmp_path / "large").exists()


def test_a_later_version_says_to_update(saved: Path) -> None:
    index = json.loads((saved / INDEX).read_text())
    (saved / INDEX).write_text(json.dumps(index | {"version": 4, "more": 1}))
    with pytest.raises(CheckpointError, match=r"version 4 .* up to 3: update zgraph"):
        Reader(saved)
    for version in ("4", 0, None):
        (saved / INDEX).write_text(json.dumps(index | {"version": version}))
        with pytest.raises(CheckpointError, match="damaged"):
            Reader(saved)


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


def as_older(folder: Path, version: Literal[1, 2]) -> None:
    """Make a checkpoint of one rank one of an older version, whose index lists the parts of each tensor."""
    index = Index.model_validate_json((folder / INDEX).read_text())
    told = folder / "rank_0_files.json"
    files = RankFiles.model_validate_json(told.read_text()).files
    told.unlink()
    homes = {name: file for file, held in files.items() for name in held.names}
    tensors = {
        name: Stored(
            dtype=entry.dtype,
            shape=entry.shape,
            chunks=(Chunk(offsets=(0,) * len(entry.shape), sizes=entry.shape, file=homes[name]),),
        )
        for name, entry in index.tensors.items()
    }
    sizes = {file: held.num_bytes for file, held in files.items() if held.names}
    checksums = {file: held.checksum for file, held in files.items()} if version > 1 else {}
    made = OldIndex(version=version, tensors=tensors, files=sizes, checksums=checksums)
    made = made.model_copy(update={"checksum": made.computed() if version > 1 else None})
    (folder / INDEX).write_text(made.model_dump_json(exclude={"checksums", "checksum"} if version == 1 else None))


@pytest.mark.parametrize("version", [1, 2])
def test_an_older_checkpoint_loads(saved: Path, caplog: pytest.LogCaptureFixture, version: Literal[1, 2]) -> None:
    expected = {name: Reader(saved).whole(name) for name in Reader(saved).described}
    as_older(saved, version)
    engine = engine_of(seed=1)
    with caplog.at_level(logging.WARNING, "zgraph"):
        assert engine.load_checkpoint(saved.parent)[0] == str(saved)
    assert ("cannot be checked" in caplog.text) == (version == 1)
    assert torch.equal(engine.module.get_parameter("weight"), expected["model.weight"])
    assert {name for name in expected if torch.equal(Reader(saved).whole(name), expected[name])} == {*expected}


def test_a_flipped_bit_in_an_older_one_is_found(saved: Path) -> None:
    as_older(saved, 2)
    path = saved / "rank_0_0.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(CheckpointError, match=r"rank_0_0.safetensors is damaged"):
        engine_of().load_checkpoint(saved.parent)


def test_an_older_one_without_its_checksums_is_damaged(saved: Path) -> None:
    as_older(saved, 2)
    index = OldIndex.model_validate_json((saved / INDEX).read_text()).model_copy(update={"checksums": {}})
    index = index.model_copy(update={"checksum": index.computed()})
    (saved / INDEX).write_text(index.model_dump_json())
    with pytest.raises(CheckpointError, match=r"no checksum of rank_0_0.safetensors"):
        engine_of().load_checkpoint(saved.parent)


def test_files_are_as_safetensors_reads_them(saved: Path) -> None:
    with opened(saved / "rank_0_0.safetensors") as found:
        assert found.metadata() == {"format": "pt"}
        assert {name: found.get_tensor(name).shape for name in found.keys()}["model.weight"] == (5, 6)  # noqa: SIM118


def test_parts_at_one_place_are_damage(saved: Path) -> None:
    as_older(saved, 1)
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
