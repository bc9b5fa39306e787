"""Messages while a model is captured: one line a graph, and why it is captured again."""

from __future__ import annotations

import inspect
import io
import logging
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import zgraph
from zgraph.compiler import build, narrator
from zgraph.compiler.compiled_model import compiled_model
from zgraph.compiler.narrator import Bar, tell
from zgraph.cost import bytes_text, memory_interval, time_text
from zgraph.environment import LOG_KINDS, environment
from zgraph.errors import UsageError

from .nets import Mlp, built, rows

ROOT = Path(__file__).parents[2]

TRAINS = """
import torch
import zgraph
{before}
model = torch.nn.Linear(4, 4)
zgraph.compile(model, stage=2)
{after}
for size in (2, 3, 3):
    model(torch.ones(size, 4)).sum().backward()
"""

LINE = (
    r"captured Linear, \d+ nodes in \d+\.\d s; \d+ passes in \d+\.\d s; stage 2 on 1 rank; predicted step [\d.,]+ us "
    r"\(80 %: [\d.,]+ to [\d.,]+\), peak [\d.]+ (KiB|B) \(80 %: [\d.]+ to [\d.]+\)"
)
AGAIN = r"Linear is captured again, time 2: input\.shape\[0\] changed from 2 to 3; sizes that change are symbols .*"


def said(before: str = "", after: str = "", **env: str) -> list[str]:
    """Standard error of a process that trains."""
    code = TRAINS.format(before=before, after=after)
    found = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(ROOT), "PATH": "", "OMP_NUM_THREADS": "1", **env},
    )
    assert found.returncode == 0, found.stderr
    return found.stderr.splitlines()


def test_without_any_logging_a_line_is_on_standard_error() -> None:
    first, again, second = said()
    assert re.fullmatch("zgraph: " + LINE, first)
    assert re.fullmatch("zgraph: " + AGAIN, again)
    assert re.fullmatch("zgraph: " + LINE, second)


@pytest.mark.parametrize("place", ["before", "after"])
def test_the_users_logging_decides_and_nothing_is_said_twice(place: str) -> None:
    setup = "import logging; logging.basicConfig(level=logging.{}, format='mine %(name)s %(message)s')"
    lines = said(**{place: setup.format("INFO")})
    assert len(lines) == 3
    assert all(line.startswith("mine zgraph ") for line in lines)
    assert said(**{place: setup.format("WARNING")}) == []


def test_a_level_of_the_users_decides() -> None:
    assert said("import logging; logging.getLogger('zgraph').setLevel(logging.WARNING)") == []


def test_nothing_is_said_where_none_is_asked() -> None:
    assert said(ZGRAPH_LOGS="none") == []


def lines_of(model: nn.Module, caplog: pytest.LogCaptureFixture, *calls: Any) -> list[str]:
    with caplog.at_level(logging.INFO, logger="zgraph"):
        for call in calls:
            call(model)
    return [record.getMessage() for record in caplog.records if record.name == "zgraph"]


def test_each_kind_is_chosen(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZGRAPH_LOGS", "passes")
    model = zgraph.compile(built(Mlp))
    lines = lines_of(model, caplog, lambda m: m(*rows(0)))
    names = [step.text.partition("(")[0] for step in zgraph.report(model).entries[0].steps]
    assert [line.partition(":")[0] for line in lines] == names
    assert re.fullmatch(r"partition: .*; \d+ nodes, \d+ ms", lines[names.index("partition")])


def test_the_line_has_the_reports_numbers(caplog: pytest.LogCaptureFixture) -> None:
    model = zgraph.compile(built(Mlp), stage=lambda name: 0 if "bias" in name else 3)
    (line,) = lines_of(model, caplog, lambda m: m(*rows(0)).backward(), lambda m: m(*rows(0)))
    report = zgraph.report(model)
    (entry,) = report.entries
    peak = bytes_text(memory_interval(report.peak_bytes, entry.costs))
    assert f"predicted step {time_text(entry.time)}, peak {peak}" in line
    assert f"{len(entry.steps)} passes" in line
    assert "stages 0 and 3 on 1 rank" in line


class Taking(nn.Module):
    """Takes nested things, and a mode."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, batch: dict[str, Any], mode: str = "a", mask: torch.Tensor | None = None) -> torch.Tensor:
        hidden = self.layer(batch["x"])
        hidden = hidden if mask is None else hidden * mask
        return hidden.sum() if mode == "a" else hidden.mean()


def test_what_changed_is_named(caplog: pytest.LogCaptureFixture) -> None:
    def call(size: int, **more: Any) -> Any:
        return lambda model: model({"x": torch.ones(size, 4, dtype=more.pop("dtype", torch.float32))}, **more)

    def evaluated(model: nn.Module) -> None:
        with torch.no_grad():
            call(2)(model)

    model = zgraph.compile(built(Taking), dynamic=False)
    calls = call(2), call(5), call(5, mode="b"), call(5, mask=torch.ones(4)), evaluated
    lines = [line for line in lines_of(model, caplog, *calls) if "again" in line]
    assert [line.partition("captured again, ")[2] for line in lines] == [
        "time 2: batch['x'].shape[0] changed from 2 to 5",
        "time 3: mode changed from 'a' to 'b'",
        "time 4: mask changed from None to a tensor",
        "time 5: torch.is_grad_enabled() changed from True to False",
    ]


@pytest.mark.parametrize("text", ["captures", "capture,schedule", "All", "none,capture"])
def test_a_wrong_kind_names_the_known_ones(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZGRAPH_LOGS", text)
    with pytest.raises(UsageError, match=f"which is no kind of line; .*the kinds are {', '.join(LOG_KINDS)}"):
        zgraph.compile(Mlp())


def test_all_and_none(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = {"all": {*LOG_KINDS}, "none": set(), "": set(), " capture , passes": {"capture", "passes"}}
    for text, kinds in chosen.items():
        monkeypatch.setenv("ZGRAPH_LOGS", text)
        assert environment().logs == kinds


class Screen(io.StringIO):
    """A terminal."""

    def isatty(self) -> bool:
        return True


def shown(monkeypatch: pytest.MonkeyPatch, seconds: float, *, screen: io.StringIO) -> str:
    """Output of a bar in the time that something takes."""
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(narrator, "SILENT_SECONDS", 0.2)
    bar = Bar("Net")
    bar.start()
    time.sleep(seconds)
    bar.passes(4)
    bar.advance("bucket")
    time.sleep(0.3 if seconds > 0.2 else 0)
    bar.stop()
    time.sleep(0.4)
    return screen.getvalue()


def test_a_bar_is_shown_on_a_terminal_for_what_takes_long(monkeypatch: pytest.MonkeyPatch) -> None:
    text = shown(monkeypatch, 0.6, screen=Screen())
    assert "capturing Net" in text
    assert "passes on Net: bucket is done" in text
    assert "1/4" in text


def test_no_bar_for_what_is_short_or_not_watched(monkeypatch: pytest.MonkeyPatch) -> None:
    assert shown(monkeypatch, 0.0, screen=Screen()) == ""
    assert shown(monkeypatch, 0.6, screen=io.StringIO()) == ""


def test_telling_is_logging_where_somebody_listens(
    caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    with caplog.at_level(logging.INFO, logger="zgraph"):
        tell("a line")
    assert caplog.messages == ["a line"]
    assert capsys.readouterr().err == ""


class Two(nn.Module):
    """Two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 4)


class Printing(Two):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.first(x)
        print(hidden.shape)
        return self.last(hidden).sum()


def test_each_end_of_a_piece_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "zgraph")
    model = zgraph.compile(Printing(), fullgraph=False)
    for _ in range(2):
        model(torch.ones(2, 4)).backward()
    (said,) = [r.getMessage() for r in caplog.records if "a piece ends" in r.getMessage()]
    line = inspect.getsourcelines(Printing.forward)[1] + 2
    assert f"{__file__}:{line}: Failed to trace builtin operator" in said
    assert not logging.getLogger("torch._dynamo.symbolic_convert.__graph_breaks").isEnabledFor(logging.DEBUG)
    assert not any("captured again" in r.getMessage() for r in caplog.records)


class Branching(Two):
    """A branch on a value between the layers."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.first(x)
        return self.last(y if y.sum() > 1e9 else -y)


def test_the_pieces_of_a_call_are_not_said_to_be_captured_again(caplog: pytest.LogCaptureFixture) -> None:
    model = zgraph.compile(Branching(), fullgraph=False)
    with caplog.at_level(logging.INFO, logger="zgraph"):
        model(torch.ones(2, 4)).sum().backward()
        assert len(zgraph.report(model).entries) > 1
        assert "captured again" not in caplog.text
        model(torch.ones(3, 4)).sum().backward()
    assert caplog.text.count("captured again") == 1
    assert "captured again, time 2: x.shape[0] changed from 2 to 3" in caplog.text


def test_a_reset_of_torch_compile_leaves_the_time_of_a_capture() -> None:
    model = zgraph.compile(built(Mlp))
    for _ in range(2):
        model(*rows(0)).backward()
        narrated = compiled_model(model).narrator
        assert narrated.seconds > 0
        narrated.seconds = narrated._began = 0.0
        torch.compiler.reset()


def test_advice_on_the_allocator_is_told_once(caplog: pytest.LogCaptureFixture, monkeypatch: Any) -> None:
    monkeypatch.setenv("ZGRAPH_LOGS", "capture")
    monkeypatch.setattr(build, "allocator_advice", lambda device: "set PYTORCH_ALLOC_CONF=expandable_segments:True")
    monkeypatch.setattr(build, "_advised", set())
    caplog.set_level(logging.INFO, "zgraph")
    for _ in range(2):
        zgraph.compile(Two())
    assert caplog.text.count("set PYTORCH_ALLOC_CONF=expandable_segments:True") == 1
