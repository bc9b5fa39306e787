"""What `import zgraph` gives: the public names and nothing else, without torch, and a clear error without links."""

import subprocess
import sys
from pathlib import Path

import pytest

import zgraph
from tests.house.rooms import ROOT


def python(code: str, folder: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, env={"PYTHONPATH": str(folder)}
    )


@pytest.mark.parametrize("name", zgraph.__all__)
def test_every_public_name_is_there(name):
    assert getattr(zgraph, name) is not None


def test_completion_shows_the_public_names_and_nothing_else():
    assert sorted(dir(zgraph)) == sorted([*zgraph.__all__, "__version__"])
    assert sorted(dir(zgraph.hf)) == ["Trainer", "enable", "prepare"]
    with pytest.raises(AttributeError, match="no attribute 'compil'"):
        _ = zgraph.compil


def test_the_parts_without_torch_are_imported_without_it():
    code = "import sys, zgraph; zgraph.errors, zgraph.passes, zgraph.ir, dir(zgraph); assert 'torch' not in sys.modules"
    found = python(code)
    assert found.returncode == 0, found.stderr


def test_a_checkout_without_links_says_so(tmp_path):
    package = tmp_path / "zgraph"
    package.mkdir()
    for name in ("__init__.py", "version.py"):
        (package / name).write_text((ROOT / "zgraph" / name).read_text())
    (package / "passes").write_text("../passes")  # what git writes where it may not make links
    found = python("import zgraph", tmp_path)
    assert found.stderr.splitlines()[-1].startswith("ImportError: ")
    assert "git config core.symlinks true" in found.stderr
