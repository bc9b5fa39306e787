"""Which algorithm is the cheapest when."""

import pytest

from zgraph.cost import Network, hardware


def test_small_messages_take_few_rounds_and_large_ones_the_whole_width():
    network = Network.of(hardware("16x8-a100-80"), 128)
    assert network.quote("all_gather", 1e4).algorithm == "recursive halving"
    assert network.quote("all_gather", 1e9).algorithm == "ring"
    assert network.quote("all_reduce", 1e4).us < network.quote("all_reduce", 1e9).us


def test_where_one_link_joins_the_hosts_the_hierarchy_crosses_it_once():
    profile = hardware("4x6-h100")
    network = Network.of(profile, 24)
    quotes = {q.algorithm: q.us for q in network.quotes("all_gather", 1e5)}
    assert "recursive halving" not in quotes, "24 is no power of two"
    assert quotes["hierarchical"] < quotes["ring"]


@pytest.mark.parametrize("op", ["all_gather", "reduce_scatter", "all_reduce", "broadcast"])
def test_one_rank_sends_nothing(op):
    assert Network.of(hardware("h100"), 1).quote(op, 1e9).us == 0


@pytest.mark.parametrize("num_ranks", [2, 4, 8])
def test_a_ring_on_one_host_is_worked_out_by_hand(num_ranks):
    profile = hardware("1x8-h100")
    (ring, *_) = Network.of(profile, num_ranks).quotes("all_gather", 8e9)
    share = (num_ranks - 1) / num_ranks
    wanted = (num_ranks - 1) * profile.within.latency_us + 1e6 * 8e9 * share / profile.within.rate
    assert ring.us == pytest.approx(wanted)


def test_an_all_reduce_is_two_scatters():
    network = Network.of(hardware("h100"), 8)
    rings = [
        next(q.us for q in network.quotes(op, 1e8) if q.algorithm == "ring") for op in ("all_reduce", "all_gather")
    ]
    assert rings[0] == pytest.approx(2 * rings[1])
