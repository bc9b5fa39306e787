"""Who keeps the copies of a rank's shards in memory: one engine of one process."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.single.memory_engines import MARK, engine_of, marks, settled, step
from zgraph.engine.checkpoint.memory import shelf as shelf_module
from zgraph.engine.checkpoint.memory.shelf import Shelf
from zgraph.errors import CheckpointError


def test_two_jobs_of_one_name_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shelf_module, "_PATIENCE_S", 0.2)
    path = Shelf.of(tmp_path, "alone").folder / "rank_1" / ".lock"
    path.parent.mkdir(mode=0o700)
    held = "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.lockf(f, fcntl.LOCK_EX); print(1, flush=True); input()"
    pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", held, str(path)], **pipes) as other:
        assert other.stdout is not None
        other.stdout.readline()
        with pytest.raises(CheckpointError, match=r"same name runs here\. Give each its own checkpoint\.memory\.job"):
            Shelf.of(tmp_path, "alone").hold(1, MARK)
        other.kill()
    Shelf.of(tmp_path, "alone").hold(1, engine_of)  # a lock ends with its process
    Shelf.of(tmp_path, "alone").remove([1])


def test_two_engines_of_one_process_do_not_have_one_name(tmp_path: Path) -> None:
    first, second = engine_of(tmp_path), engine_of(tmp_path)
    step(first)
    step(first)
    settled(first)
    assert step(second)
    with pytest.raises(CheckpointError, match=r"another engine of this process .* Give each its own"):
        step(second)
    assert marks(tmp_path) == [2]
    step(first)
    step(first)
    settled(first)
    assert marks(tmp_path) == [2, 4]
    del first  # one that nobody has any more makes no copies
    again = engine_of(tmp_path)
    assert again.load_checkpoint(tmp_path / "none")[0] is not None
    assert again.global_steps == 4
    again.destroy()


def test_a_lock_is_of_the_file_that_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process before came to its end, and removed its folder, between the file's opening and its lock."""
    shelf = Shelf.of(tmp_path, "alone")
    path = shelf.folder / "rank_0" / ".lock"
    lockf, times = fcntl.lockf, list[int]()

    def late(descriptor: int, how: int) -> None:
        times.append(descriptor)
        if len(times) == 1:
            shutil.rmtree(path.parent)
        lockf(descriptor, how)

    monkeypatch.setattr(shelf_module.fcntl, "lockf", late)
    shelf.hold(0, engine_of)
    assert len(times) == 2
    assert os.path.samestat(os.fstat(shelf_module._HELD[path][0]), path.stat())
    shutil.rmtree(path.parent)
    shelf.hold(0, engine_of)
    assert os.path.samestat(os.fstat(shelf_module._HELD[path][0]), path.stat())
    shelf.remove([0])
    assert not shelf.folder.exists()
