"""What the backward needs of the forward, as blocks: what a budget that is just met gives way for."""

from tests.passes.test_decisions import CHAIN
from zgraph.ir import parse_graph
from zgraph.passes import Context
from zgraph.passes.analysis.forward import Forward


def test_what_just_fits_gives_way_for_nothing():
    forward = Forward(parse_graph(CHAIN), Context())
    assert [c.num_bytes for c in forward.choices(3 * 256)] == [3 * 256]
    assert [c.num_bytes for c in forward.choices(3 * 256 - 1)] == [256]
