"""What a GPU runs by default: regions that are compiled at link time, with kernels that were measured to be faster."""

import pytest

from tests.deep import deep
from tests.emulated import defaults
from tests.emulated.defaults import Found
from tests.emulated.server import Server


@pytest.mark.parametrize("fastest", ["kernel", deep("inductor"), deep("aten")])
def test_training_without_options(echoes: Server, fastest: str) -> None:
    """The processes that compile are started with the model and waited for before they are needed. All regions of a
    step are lowered before the first is waited for, and all of them before anything runs.
    """
    found: Found = echoes.run(defaults.train, fastest)
    assert found.losses == pytest.approx(found.expected, rel=2e-5)
    assert found.races == []
    assert found.kernels == "auto"
    assert (found.num_kernels > 0) == (fastest == "kernel")
    assert (found.num_inside > 0) == (fastest == "kernel")
    first = found.asked.index("step")
    second = found.asked.index("step", first + 1)
    assert found.asked[:first] == ["warm"]
    assert found.asked[second + 1 :] == []
    tuning, begin = found.asked[first + 1 : second], found.asked.index("lowered")
    assert tuning[0] == "warmed"
    assert "candidate lowered" in found.asked[first:begin]
    assert found.asked[begin - 1] == "warmed"
    assert found.asked[begin:second] == ["lowered"] * found.num_regions + ["waited"] * found.num_regions
