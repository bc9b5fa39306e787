"""`import zgraph` gives the public names and nothing else, without torch, and a clear error without links."""

import re
import subprocess
import sys
import tomllib
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
    classes = ["Accelerator", "DistillationTrainer", "Loaded", "Trainer", "TrainingArguments"]
    assert sorted(dir(zgraph.hf)) == [*classes, "enable", "load_pretrained", "loaded", "prepare"]
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


def test_one_version_everywhere():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    cited = re.search(r"^version: (.*)$", (ROOT / "CITATION.cff").read_text(), re.M)[1]
    changed = re.search(r"^## ([\d.]+)", (ROOT / "CHANGELOG.md").read_text(), re.M)[1]
    assert {project["version"], cited, changed} == {zgraph.__version__}


def test_the_version_does_not_depend_on_how_the_distribution_is_called():
    """On PyPI, zgraph is another project: what is installed under that name says nothing of this package."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["name"] == "zgraph-compiler"
    asked = re.compile(r"""\bversion\(["']zgraph|metadata.*["']zgraph["']""")
    for folder in ("zgraph", "passes", "codegen", "runtime"):
        for path in (ROOT / folder).rglob("*.py"):
            assert not asked.search(path.read_text()), path


def test_the_licence_is_there():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["license"] == "Apache-2.0"
    text = (ROOT / "LICENSE").read_text()
    assert "Version 2.0, January 2004" in text
    assert "9. Accepting Warranty or Additional Liability" in text
