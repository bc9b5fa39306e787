"""A graph that comes from a file names ops and functions on numbers, and nothing else."""

import pytest

from zgraph.bridge.aten import resolve


@pytest.mark.parametrize(
    "name",
    [
        "aten.__class__.__init__.__builtins__.get",
        "py.call",
        "py.attrgetter",
        "py.methodcaller",
        "torch.load",
        "torch.ops",
        "os.system.default",
        "aten.add",
        "aten.__class__.default",
        "aten.add.__class__",
        "math.__loader__",
        "torch.sym_int.__globals__",
        "aten..",
        "",
    ],
)
def test_no_other_name_is_resolved(name):
    with pytest.raises(LookupError):
        resolve(name)


@pytest.mark.parametrize("name", ["aten.add.Tensor", "py.mul", "math.floor", "torch.sym_max", "prims.iota.default"])
def test_ops_are(name):
    assert callable(resolve(name))
