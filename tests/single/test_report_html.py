"""`zgraph.report(model)` as a picture: what it draws is what the passes did, run again when it is asked for."""

import pickle
import re

import pytest
import torch
from torch import nn

import zgraph
from zgraph.errors import UsageError
from zgraph.runfile.format import load_run


@pytest.fixture
def model() -> nn.Module:
    return zgraph.compile(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 1)), stage=3)


def test_the_run_of_a_report_is_the_file_that_compile_saves(tmp_path):
    model = zgraph.compile(nn.Linear(8, 4), stage=3, save=tmp_path / "run.zg")
    model(torch.ones(2, 8)).sum().backward()
    (entry,) = zgraph.report(model).entries
    assert entry.run().texts == load_run(tmp_path / "run.zg").texts


def test_saved_as_html(model, tmp_path):
    model(torch.ones(2, 8)).sum().backward()
    zgraph.report(model).save(tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text()
    assert "<title>Sequential, zgraph</title>" in text
    assert not re.search(r"(src|href)\s*=", text.partition('id="data"')[0])
    assert zgraph.report(model)._repr_html_().startswith("<iframe sandbox")


def test_a_report_goes_to_another_process(model):
    model(torch.ones(2, 8)).sum().backward()
    (entry,) = pickle.loads(pickle.dumps(zgraph.report(model))).entries
    assert entry.run().texts == zgraph.report(model).entries[0].run().texts


def test_nothing_captured_yet(model):
    with pytest.raises(UsageError, match="the first call of the model captures it"):
        zgraph.report(model).save("never.html")
    assert "Nothing captured yet" in zgraph.report(model)._repr_html_()
