"""Errors of the user's forward come as they are: its class, its cause, its lines, a note of where, and not torch's."""

from __future__ import annotations

import traceback
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import zgraph
from zgraph.capture import failures
from zgraph.errors import GraphBreakError, UsageError

from . import failing
from .failing import Failing, OwnError

FILE = failing.__file__

CASES: dict[str, tuple[type[Exception], str]] = {
    "raise": (ValueError, "the user's own error"),
    "own class": (OwnError, "3 of (2, 4)"),
    "cause": (LookupError, "outer"),
    "key": (KeyError, "b"),
    "shapes": (RuntimeError, "[2, 4] X [3, 3]"),
    "none": (TypeError, "NoneType"),
    "index": (IndexError, "out of bounds"),
    "assert": (AssertionError, "nine"),
}


def line_of(how: str) -> int:
    return next(i for i, line in enumerate(Path(FILE).read_text().splitlines(), 1) if line.endswith(f"# {how}"))


def caught(model: nn.Module, *args: Any, **kwargs: Any) -> Exception:
    try:
        model(*args, **kwargs)
    except Exception as error:
        return error
    raise AssertionError("nothing was raised")


def frames(error: BaseException) -> list[str]:
    """The files of a traceback from the first of zgraph's frontend on, and of what led to the error."""
    files = [frame.filename for frame in traceback.extract_tb(error.__traceback__)]
    return files[next(i for i, file in enumerate(files) if file.endswith("frontend.py")) + 1 :]


@pytest.mark.parametrize("how", CASES)
def test_the_users_error_is_raised_as_it_is(how: str) -> None:
    kind, text = CASES[how]
    model = zgraph.compile(Failing(how))
    error = caught(model, torch.ones(2, 4))
    assert type(error) is kind
    assert text in str(error)
    (note,) = error.__notes__
    assert f"{FILE}:{line_of(how)}, while zgraph captured the forward of Failing" in note
    assert frames(error) == [FILE]
    assert "torch._dynamo" not in "".join(traceback.format_exception(error)).replace("torch/_dynamo", "torch._dynamo")
    assert model.seen == 0


def test_a_cause_of_the_users_own_stays() -> None:
    error = caught(zgraph.compile(Failing("cause")), torch.ones(2, 4))
    assert isinstance(error.__cause__, AttributeError)
    assert error.__cause__.__context__ is None


def test_the_model_works_afterwards() -> None:
    model = zgraph.compile(Failing("raise"))
    caught(model, torch.ones(2, 4))
    model.how = ""
    model(torch.ones(2, 4)).backward()
    assert model.layer.weight.grad is not None


@pytest.mark.parametrize(("args", "kwargs"), [((), {}), ((torch.ones(2, 4),), {"input_ids": 3})])
def test_arguments_that_do_not_fit_are_a_type_error(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    error = caught(zgraph.compile(Failing("")), *args, **kwargs)
    assert type(error) is TypeError
    assert "forward()" in str(error)


@pytest.mark.parametrize("how", ["branch", "write"])
def test_a_graph_break_is_none_of_the_users_errors(how: str, capsys: pytest.CaptureFixture[str]) -> None:
    model = zgraph.compile(Failing(how))
    error = caught(model, torch.ones(2, 4))
    assert type(error) is GraphBreakError
    assert f"{FILE}:{line_of(how)}" in str(error)
    assert capsys.readouterr().out == ""
    assert model.calls == 0, "the forward must not run again for what is no error of its own"


def test_tracebacks_may_have_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZGRAPH_TRACEBACK", "full")
    error = caught(zgraph.compile(Failing("shapes")), torch.ones(2, 4))
    assert type(error) is RuntimeError
    assert len(frames(error)) > 5
    assert any(str(failures.TORCH) in file for file in frames(error))


def test_a_wrong_choice_of_tracebacks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZGRAPH_TRACEBACK", "long")
    with pytest.raises(UsageError, match="ZGRAPH_TRACEBACK must be short or full, not 'long'"):
        zgraph.compile(Failing(""))(torch.ones(2, 4))


def test_an_error_of_a_pass_is_shown_without_torchs_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> Any:
        raise ZeroDivisionError("in a pass")

    monkeypatch.setattr("zgraph.compiler.passed.make_plan", broken)
    error = caught(zgraph.compile(Failing("")), torch.ones(2, 4))
    assert type(error) is ZeroDivisionError
    assert frames(error)[-1] == __file__
    assert not any(str(failures.TORCH) in file for file in frames(error))
