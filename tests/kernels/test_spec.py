"""Specifications of kernels: text and back, and what does not hold together."""

import pytest

from zgraph.codegen.spec import KernelSpec
from zgraph.errors import KernelError

from .specs import SPECS, swiglu


@pytest.mark.parametrize("name", SPECS)
def test_a_spec_comes_back_from_its_text(name):
    spec = SPECS[name](96, "bf16")
    assert KernelSpec.parse(str(spec)) == spec


FAULTS = {
    "expected NAME COLUMNS": "swiglu: gate f32[M,N] -> y f32[M,N]",
    "expected an operand": "k 4: x f99[M,N] -> x f32[M,N]",
    "expected a step": "k 4: x f32[M,N] -> y f32[M,N]; y == x",
    "expected a name or a number": "k 4: x f32[M,N] -> y f32[M,N]; y = mul(x, X)",
    "is no operation": "k 4: x f32[M,N] -> y f32[M,N]; y = cube(x)",
    "reads z, which is not there": "k 4: x f32[M,N] -> y f32[M,N]; y = mul(x, z)",
    "writes a value twice": "k 4: x f32[M,N] -> y f32[M,N], y bf16[M,N]; y = neg(x)",
    "y is made twice": "k 4: x f32[M,N] -> y f32[M,N]; y = neg(x); y = exp(x)",
    "two inputs of k share": "k 4: x f32[M,N], x f32[N] -> x f32[M,N]",
    "reduces what has no rows": "k 4: x f32[M,1] -> y f32[M,1]; y = row_sum(x)",
    "writes y f32": "k 4: x f32[M,N] -> y f32[M,1]; y = neg(x)",
    "has no rows": "k 4: x f32[M,N], w f32[N] -> y f32[M,N], v f32[N]; y = neg(x); v = neg(w)",
    "must write something": "k 0: x f32[M,N] -> y f32[M,N]; y = neg(x)",
}


@pytest.mark.parametrize("words", FAULTS)
def test_what_does_not_hold_together_is_refused(words):
    with pytest.raises(KernelError, match=words):
        KernelSpec.parse(FAULTS[words])


def test_a_sum_over_rows_is_written_and_not_read():
    with pytest.raises(KernelError, match="reads s, which is not there"):
        KernelSpec.parse("k 4: x f32[M,N] -> y f32[M,N]; s = col_sum(x); y = mul(x, s)")


def test_extents_are_those_of_what_a_value_is_made_of():
    found = {name: extent.value for name, extent in swiglu(8).extents.items()}
    assert found == {"gate": "M,N", "up": "M,N", "s": "M,N", "a": "M,N", "y": "M,N"}
