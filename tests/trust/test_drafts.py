"""Files that are written beside and renamed: no link at a name that could be guessed is followed."""

from __future__ import annotations

import os
from pathlib import Path

from zgraph.engine.checkpoint.directory import Folders
from zgraph.ir import Graph
from zgraph.passes import Context
from zgraph.runfile.format import CAPTURED, Provenance, load_run, run_file


def test_a_run_file_follows_no_link_beside_it(tmp_path: Path) -> None:
    other, path = tmp_path / "other", tmp_path / "run.zg"
    other.write_text("precious")
    (tmp_path / ".run.zg.draft").symlink_to(other)
    run_file([(CAPTURED, Graph("none"), 0.0)], Provenance(model="none"), Context()).save(path)
    assert other.read_text() == "precious"
    assert load_run(path).names == (CAPTURED,)
    umask = os.umask(0)
    os.umask(umask)
    assert path.stat().st_mode & 0o777 == 0o666 & ~umask


def test_the_name_of_the_last_checkpoint_follows_no_link(tmp_path: Path) -> None:
    other, root = tmp_path / "other", tmp_path / "root"
    other.write_text("precious")
    folders = Folders(root)
    written = folders.begin("one")
    (root / ".latest.writing").symlink_to(other)
    folders.commit(written, "one", is_latest=True)
    assert other.read_text() == "precious"
    assert folders.find(None) == root / "one"
