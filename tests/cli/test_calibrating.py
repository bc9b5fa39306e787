"""`zgraph calibrate` and `zgraph plan --check`: what training recorded, at the command line."""

import json

import pytest

from tests.cli.conftest import record_costs
from zgraph.cost import hardware


@pytest.fixture
def costs(zgraph_command):
    record_costs()


def test_a_profile_is_written_and_planned_with(folder, zgraph_command, costs):
    (folder / "own.toml").unlink(missing_ok=True)
    code, out, error = zgraph_command("calibrate", "costs", "-o", "own.toml")
    assert code == 0, error
    assert "launch, us" in out
    assert "--hardware own.toml" in out
    assert hardware("own.toml").name == "own"
    code, out, error = zgraph_command("plan", "model.py:gone", "--hardware", "own.toml", "--world", "2", "--stage", "3")
    assert code == 0, error
    code, _, error = zgraph_command("calibrate", "costs", "-o", "own.toml")
    assert code == 2
    assert "there is a file own.toml already" in error
    code, out, _ = zgraph_command("calibrate", "costs", "--json")
    found = json.loads(out)
    assert {"hardware", "changes", "runs", "residual"} == found.keys()


def test_a_prediction_is_checked(zgraph_command, costs):
    code, out, error = zgraph_command("plan", "--check", "costs")
    assert code == 0, error
    assert "off by          +200 %, outside of the predicted interval" in out
    code, out, _ = zgraph_command("plan", "--check", "costs/run.zg", "--hardware", "a10", "--json")
    found = json.loads(out)
    assert found["hardware"] == "a10"
    assert found["num_steps"] == 10


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("plan", "model.py:gone", "--check", "costs"), "--check takes no model"),
        (("plan",), "zgraph plan takes a model"),
        (("plan", "--check", "nowhere"), "nowhere has no run.zg"),
        (("calibrate", "nowhere"), "nowhere has no run.zg"),
        (("calibrate", "costs", "-o", "own.json"), "ending .toml"),
        (("calibrate", "costs", "--from", "h1000"), "did you mean h100?"),
    ],
)
def test_mistakes(zgraph_command, costs, args, said):
    code, _, error = zgraph_command(*args)
    assert code in (1, 2)
    assert said in error
