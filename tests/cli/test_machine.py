"""The command's knowledge of the machine, the ranks that it starts on it, and what shells complete."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from zgraph.cli.environment_report import bug_report, cores
from zgraph.cost import known


def test_a_bug_report_has_no_secrets(zgraph_command, monkeypatch, tmp_path):
    home = tmp_path / "home" / "alice"
    (home / ".cache" / "zgraph" / "kernels").mkdir(parents=True)
    for name in [name for name in os.environ if name.startswith("ZGRAPH_")]:
        monkeypatch.delenv(name)
    (home / ".cache" / "zgraph" / "kernels" / "one.py").write_bytes(b"12345")
    for name, value in {
        "HOME": str(home),
        "USER": "alice",
        "LOGNAME": "alice",
        "ZGRAPH_DUMP": f"{home}/graphs",
        "ZGRAPH_DISABLE": "/scratch/alice/x",
        "AWS_SECRET_ACCESS_KEY": "hunter2",
        "TRITON_CACHE_DIR": str(home / "none"),
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    code, out, _ = zgraph_command("env", "--json")
    assert code == 0
    found = json.loads(out)
    assert found["environment"] == {"ZGRAPH_DISABLE": "/scratch/$USER/x", "ZGRAPH_DUMP": "~/graphs"}
    assert found["caches"]["~/.cache/zgraph"] == {"bytes": 5, "files": 1}
    assert found["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert found["machine"]["cores to use"] >= 1
    for secret in ("alice", "hunter2", str(tmp_path / "home")):
        assert secret not in out


def test_a_bug_report_says_what_is_broken(monkeypatch):
    """Where torch cannot be imported, and the user has no name."""
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.setattr("zgraph.cli.environment_report.TOPOLOGY", ((sys.executable, "-c", "print('GPU0 NV18')"),))
    monkeypatch.setattr("getpass.getuser", lambda: {}["user"])
    found = bug_report()
    assert found["torch"]["error"].startswith("ModuleNotFoundError")
    assert found["caches"] == {"error": "KeyError: 'user'"}
    assert list(found["topology"].values()) == ["GPU0 NV18"]
    assert found["versions"]["torch"] != "not installed"


def test_a_script_has_its_own_arguments_and_exit_code(zgraph_command):
    code, out, error = zgraph_command("launch", "--nnodes", "1", "--nproc-per-node=2", "train.py", "--help", "--fail")
    assert code == 7
    threads = max(cores() // 2, 1)
    assert sorted(out.splitlines()) == [f"rank {r} of 2, {threads} threads, ['--help', '--fail']" for r in (0, 1)]
    assert "train.py FAILED" in error


def test_threads_that_the_user_chose_stay(zgraph_command, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.setenv("PET_NPROC_PER_NODE", "1")
    code, out, _ = zgraph_command("launch", "train.py")
    assert code == 0
    assert out.strip() == "rank 0 of 1, 3 threads, []"


@pytest.mark.parametrize(("ranks", "said"), [("many", "Unsupported"), ("0", "1 or more")])
def test_ranks_that_cannot_be(ranks, said, zgraph_command):
    code, _, error = zgraph_command("launch", "--nproc-per-node", ranks, "train.py")
    assert code == 2
    assert said in error


def completed(zgraph_command, monkeypatch, line: str) -> list[str]:
    """Completions that bash would offer at the end of a line."""
    words = line.split(" ")
    monkeypatch.setenv("_ZGRAPH_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", "\n".join(words))
    monkeypatch.setenv("COMP_CWORD", str(len(words) - 1))
    code, out, error = zgraph_command()
    assert code == 0, error
    return out.split()


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("zgraph exp", ["explain", "export", "export-model"]),
        ("zgraph opt run.zg --disable-pass buc", ["bucket"]),
        ("zgraph opt run.zg --stop-after sch", ["schedule"]),
        ("zgraph opt run.zg --print-ir-after dce,bucket,sch", ["dce,bucket,schedule"]),
        ("zgraph opt run.zg --passes canon", ["canonicalize"]),
        ("zgraph trace model.py:gone --hardware h", [name for name in known() if name.startswith("h")]),
        ("zgraph plan model.py:gone --hardware 8x8-b", ["8x8-b200"]),
        ("zgraph plan model.py:gone --dtype b", ["bf16"]),
        ("zgraph show run.zg --lane c", ["compute", "comm"]),
        ("zgraph show ru", []),  # then the shell offers files
    ],
)
def test_what_is_offered(line, offered, zgraph_command, monkeypatch):
    assert completed(zgraph_command, monkeypatch, line) == offered


def test_zsh_offers_files_where_there_is_nothing_else(zgraph_command, monkeypatch):
    monkeypatch.setenv("_ZGRAPH_COMPLETE", "complete_zsh")
    monkeypatch.setenv("_TYPER_COMPLETE_ARGS", "zgraph show ru")
    assert zgraph_command()[1].strip() == "_files"
    monkeypatch.setenv("_TYPER_COMPLETE_ARGS", "zgraph opt run.zg --stop-after sched")
    assert '"schedule"' in zgraph_command()[1]


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")
def test_bash_completes_once_it_is_installed(zgraph_command, monkeypatch, tmp_path):
    """The script that --install-completion writes, sourced by a real bash with `zgraph` on its path."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr("shellingham.detect_shell", lambda: ("bash", "/bin/bash"))
    code, _, error = zgraph_command("--install-completion")
    assert code == 0, error
    command = tmp_path / "bin" / "zgraph"
    command.parent.mkdir()
    command.write_text(f"#!/bin/sh\nexec {sys.executable} -c 'from zgraph.cli import main; main()' \"$@\"\n")
    command.chmod(0o755)
    script = (
        "source ~/.bashrc; complete -p zgraph; COMP_WORDS=(zgraph opt run.zg --disable-pass buc); COMP_CWORD=4; "
        '_zgraph_completion zgraph; echo "${COMPREPLY[@]}"'
    )
    path = f"{command.parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "--norc", "-c", script],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "PATH": path, "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert done.stdout.splitlines() == ["complete -o default -F _zgraph_completion zgraph", "bucket"]
