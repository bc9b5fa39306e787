"""A cache that others have written into: nothing of it runs or is believed, and no file elsewhere is overwritten."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from zgraph.bridge.private_files import drafted, private_folder, read_private
from zgraph.codegen import kernels
from zgraph.compiler import autotune
from zgraph.errors import CacheError

TEXT = '''"""A kernel."""


def kernel():
    return "the text at hand"
'''


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "zgraph"


def source_path() -> Path:
    kernels.load_source("kernel", TEXT)
    (path,) = kernels.folder().iterdir()
    return path


@pytest.mark.parametrize("planted", ["def kernel():\n    return 'planted'\n", TEXT[:40], "", TEXT + "#", "\0"])
def test_a_kernel_that_is_another_or_cut_off_is_written_anew(planted: str) -> None:
    path = source_path()
    path.write_text(planted)
    assert kernels.load_source("kernel", TEXT)() == "the text at hand"
    assert path.read_text() == TEXT


def test_a_kernel_of_another_length_of_bytes_than_of_letters() -> None:
    text = TEXT.replace("hand", "händ")
    kernels.load_source("kernel", text)
    before = next(kernels.folder().iterdir()).stat().st_ino
    kernels.load_source("kernel", text)
    assert next(kernels.folder().iterdir()).stat().st_ino == before


def test_source_is_told_from_the_text_at_hand() -> None:
    import inspect

    path = source_path()
    made = kernels.load_source("kernel", TEXT)
    path.write_text("def kernel():\n    return 'planted'\n\n\n\n\n")
    assert "the text at hand" in inspect.getsource(made)


def test_a_link_in_place_of_a_kernel_is_replaced(tmp_path: Path) -> None:
    path, other = source_path(), tmp_path / "other"
    other.write_text("precious")
    path.unlink()
    path.symlink_to(other)
    assert kernels.load_source("kernel", TEXT)() == "the text at hand"
    assert other.read_text() == "precious"
    assert not path.is_symlink()


def test_links_at_names_that_could_be_guessed_are_not_followed(tmp_path: Path) -> None:
    path, other = source_path(), tmp_path / "other"
    other.write_text("precious")
    path.unlink()
    path.with_suffix(f".{os.getpid()}").symlink_to(other)
    kernels.load_source("kernel", TEXT)
    assert other.read_text() == "precious"


@pytest.mark.parametrize("name", ["kernels", "times"])
def test_folders_are_of_this_user_alone(cache: Path, name: str) -> None:
    cache.mkdir(mode=0o755)
    (cache / name).mkdir(mode=0o755)
    folder = private_folder(cache, name)
    assert [p.stat().st_mode & 0o777 for p in (cache, folder)] == [0o700, 0o700]


@pytest.mark.parametrize("make", [kernels.folder, lambda: autotune.times_path(torch.device("cpu"))])
@pytest.mark.parametrize("name", ["", "kernels", "times"])
def test_a_folder_of_everyone_or_a_link_is_refused(cache: Path, tmp_path: Path, make, name: str) -> None:  # type: ignore[no-untyped-def]
    folder = cache / name
    folder.parent.mkdir(exist_ok=True)
    folder.mkdir()
    folder.chmod(0o777)
    if name and name not in ("kernels" if make is kernels.folder else "times"):
        make()
        return
    with pytest.raises(CacheError, match=r"written by everyone.*XDG_CACHE_HOME"):
        make()
    folder.rmdir()
    (tmp_path / "elsewhere").mkdir()
    folder.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CacheError, match=r"is a link.*XDG_CACHE_HOME"):
        make()


def test_another_users_folder_is_refused(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.mkdir()
    uid = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: uid + 1)
    with pytest.raises(CacheError, match=r"another user.*XDG_CACHE_HOME"):
        kernels.folder()


def test_a_file_in_place_of_a_folder_is_told_of(cache: Path) -> None:
    cache.write_text("")
    with pytest.raises(CacheError, match="XDG_CACHE_HOME"):
        kernels.folder()


def test_a_pipe_or_a_large_file_is_no_file_of_ours(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "large").write_bytes(bytes(11))
    assert read_private(tmp_path / "pipe", 10) is None
    assert read_private(tmp_path / "large", 10) is None
    assert read_private(tmp_path / "missing", 10) is None


def test_a_draft_that_fails_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("before")
    with pytest.raises(ValueError, match="no"), drafted(tmp_path / "file") as stream:  # noqa: PT012
        stream.write(b"half")
        raise ValueError("no")
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir() if p.is_file()] == [("file", "before")]


GOOD = {"a group": {"aten": 2.0, "kernel": 1}}


@pytest.mark.parametrize(
    "held",
    [
        '{"a": {"aten": null}}',
        '{"a": {"aten": {}}}',
        '{"a": {"aten": "1"}}',
        '{"a": {"aten": -1.0}}',
        '{"a": {"aten": NaN}}',
        '{"a": {"aten": Infinity}}',
        '{"a": {"aten": 1e999}}',
        '{"a": {"unknown": 1.0}}',
        '{"a": 1}',
        "[]",
        "1",
        "",
        "\0",
        '{"a": ' * 50_000,
        "[" * 50_000,
        '{"a": {"aten": true}}',
        '{"half',
    ],
)
def test_times_that_are_none_are_measured_again(held: str) -> None:
    path = autotune.times_path(torch.device("cpu"))
    path.write_text(held)
    assert autotune._read(path) == {}


def test_times_are_read_and_a_file_too_large_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    path = autotune.times_path(torch.device("cpu"))
    path.write_text(json.dumps(GOOD))
    assert autotune._read(path) == GOOD
    monkeypatch.setattr(autotune, "MAX_BYTES", 10)
    assert autotune._read(path) == {}
