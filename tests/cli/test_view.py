"""`zgraph view`: one run or two, and what it refuses."""

import json
from pathlib import Path

import pytest

from tests.cli.graphs import long
from zgraph.cli.main import main
from zgraph.passes import Context
from zgraph.runfile.format import Provenance, run_file


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Runs the command in a folder with three runs; what it printed, and its exit code."""
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b", "c"):
        run_file([("captured", long(), 0.0)], Provenance(model="Small"), Context()).save(Path(f"{name}.zg"))

    def command(*words: str) -> tuple[str, int]:
        monkeypatch.setattr("sys.argv", ["zgraph", "view", *words])
        with pytest.raises(SystemExit) as ended:
            main()
        said = capsys.readouterr()
        return said.out + said.err, int(ended.value.code or 0)

    return command


@pytest.mark.parametrize("files", [("a.zg",), ("a.zg", "b.zg")])
def test_it_writes_a_page(run, files):
    said, code = run(*files, "-o", "page.html", "--json")
    assert code == 0
    assert json.loads(said)["bytes"] == len(Path("page.html").read_text())


@pytest.mark.parametrize(
    ("files", "said"),
    [
        (("a.zg", "b.zg", "c.zg"), "one run or two side by side, and these are 3"),
        (("a.zg", "a.zg"), "are the same file"),
        (("a.zg", "./a.zg"), "are the same file"),
        (("-", "-"), "are the same file"),
        (("a.zg", "none.zg"), "there is no file none.zg"),
        (("a.zg@captured", "b.zg"), "leave out @captured"),
    ],
)
def test_what_it_refuses(run, files, said):
    printed, code = run(*files)
    assert code == 2
    assert said in printed
    assert not Path("report.html").exists()
