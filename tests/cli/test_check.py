"""`zgraph check`, and what `verify` and `bisect` find by numbers: which pass, in which program."""

import json
from pathlib import Path

import pytest

from tests.trust import faults
from tests.trust.test_numeric import PLAIN, final, steps
from zgraph.runfile.format import Provenance, run_file


@pytest.fixture
def runs(tmp_path: Path, monkeypatch) -> None:
    """Files with a run that is right, one that is wrong under no_sync, and one that rounds."""
    monkeypatch.chdir(tmp_path)
    for name, fault in (("right", None), ("wrong", faults.forgotten), ("rounds", faults.rounded_gradient)):
        more = [] if fault is None else [("mine", fault(final("net", PLAIN[1])))]
        _, found, there = steps(*more)
        run_file([(s, g, 0.0) for s, g in found], Provenance(model="Net"), there).save(Path(f"{name}.zg"))


def test_the_commands(runs, command):
    code, out, error = command("check", "right.zg")
    assert code == 0, error
    assert "the graph after dce computes what was captured, on 2 simulated ranks, in 8 programs:" in out
    assert "  without tangents, second step, no_sync" in out
    code, out, _ = command("check", "wrong.zg", "--seed", "3")
    assert code == 1
    rows = {line.split()[0]: line.split(maxsplit=1)[1] for line in out.splitlines()}
    assert rows["pass"] == "mine (the graph mine)"
    assert rows["program"] == "no_sync"
    assert rows["differs"].startswith("accumulating under no_sync, the gradient of ")
    code, out, _ = command("check", "wrong.zg", "--every", "--json")
    found = json.loads(out)
    assert (code, found["wrong"]["step"], found["wrong"]["failure"]["program"]) == (1, "mine", "no_sync")
    assert command("check", "wrong.zg", "--micro-steps", "0")[0] == 0
    assert command("check", "rounds.zg")[0] == 0
    code, out, _ = command("check", "rounds.zg", "--dtypes")
    assert code == 1
    assert "in fp64 nothing differs" in out


def test_what_is_used_wrongly(runs, command):
    for args, wanted, said in (
        (("check", "right.zg@dce"), 2, "leave out @dce"),
        (("check", "right.zg", "--max-memory", "much"), 2, "--max-memory: much is no size"),
        (("check", "right.zg", "--max-memory", "1KiB"), 3, "allow more with --max-memory"),
    ):
        code, _, error = command(*args)
        assert (code, said in " ".join(error.split())) == (wanted, True), error


def test_verify_checks_numbers_on_request(runs, command):
    code, out, error = command("verify", "right.zg", "--numeric", "--json")
    assert code == 0, error
    found = json.loads(out)
    assert found["fine"]
    assert found["numeric"]["wrong"] is None
    code, out, _ = command("verify", "right.zg", "--numeric")
    assert code == 0
    assert "computes what was captured" in out


def test_bisect_finds_what_only_shows_under_no_sync(runs, command):
    code, out, _ = command("bisect", "wrong.zg", "--json")
    culprit = json.loads(out)["culprit"]
    assert (code, culprit["step"], culprit["failure"]["program"]) == (1, "mine", "no_sync")
    assert 2 <= len(culprit["rewrite"]["lines"]) <= 6, culprit["rewrite"]["lines"]
