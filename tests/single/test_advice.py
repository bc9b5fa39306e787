"""Errors of torch that come of DTensors are told with the remedy."""

from __future__ import annotations

import subprocess
import sys

import pytest

from zgraph.runtime.advice import advice


@pytest.mark.parametrize(
    ("said", "remedy"),
    [
        ("aten.addmm.default got mixed torch.Tensor and DTensor, need to", "within `with zgraph.gathered(model):`"),
        (".numpy() is not supported for tensor subclasses.", "call .full_tensor() of it first, on every rank"),
        ("Attempted to access the data pointer on an invalid python storage.", "call .full_tensor() of it first"),
        ("Operator aten._foreach_copy_.default does not have a sharding strategy registered.", "foreach=False"),
        ("Operator aten.qr.default does not have a sharding strategy registered.", "stage=0"),
        ("The differentiated Tensor at index 0 appears to not have been used in the graph.", 'fullgraph="eager"'),
    ],
)
def test_what_torch_says_of_shards_has_a_remedy(said: str, remedy: str) -> None:
    assert remedy in advice(RuntimeError(said))


def test_other_errors_are_left_alone() -> None:
    assert advice(ValueError("the user's own")) == ""


SCRIPT = """
import torch.distributed as dist
from zgraph.runtime.departures import watch
store = dist.TCPStore("127.0.0.1", 0, is_master=True)
watch(store, 0, str)
raise RuntimeError("aten.mul.Tensor got mixed torch.Tensor and DTensor")
"""


def test_an_error_that_nobody_catches_is_printed_with_it() -> None:
    told = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=False, timeout=120)
    assert "zgraph: the parameters and gradients of a compiled model are DTensors" in told.stderr
