"""Plain forwards by programs: which of them are recorded."""

import torch
from torch import nn

import zgraph
from zgraph.inference import forwards


def test_forwards_of_few_shapes_are_recorded(monkeypatch):
    """Each recording keeps memory for good."""
    monkeypatch.setattr(forwards, "MAX_RECORDED", 2)
    inference = zgraph.infer(nn.Linear(4, 2))
    found, program = [], inference.programs.program

    def told(*given):
        found.append(given[-1])
        return program(*given)

    monkeypatch.setattr(inference.programs, "program", told)
    for rows in (1, 2, 3, 2, 4):
        assert inference(input=torch.ones(rows, 4)).shape == (rows, 2)
    assert found == [{}, {}, None, None]
