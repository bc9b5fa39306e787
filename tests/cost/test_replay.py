"""A replay is the clock of the simulator, at any costs."""

import pytest

from tests.cost.test_simulator import STEP, table
from zgraph.cost import AlphaBeta, CostTable, Replay, hardware, simulate
from zgraph.ir import parse_graph
from zgraph.passes import make_plan


@pytest.mark.parametrize("slowdown", [1.0, 1.5])
def test_a_replay_takes_as_long_as_the_simulation(slowdown):
    graph = parse_graph(STEP.strip() + "\n")
    plan = make_plan(graph)
    replay = Replay.of(plan, {})
    costs = table(graph, slowdown)
    slow = costs.model_copy(update={"transfers": {"all_gather": AlphaBeta(latency_us=9.0, bytes_per_s=1e6)}})
    for some in (costs, slow, CostTable(hardware=hardware("8x8-h100"))):
        assert replay.step_us(some) == pytest.approx(simulate(plan, some, {}).step_us, rel=1e-12)


def test_nodes_of_one_kind_are_costed_once():
    graph = parse_graph(STEP.strip() + "\n")
    replay = Replay.of(make_plan(graph), {})
    assert len(replay.nodes) < len(replay.steps)
    assert sum(node.op == "all_gather_start" for node in replay.nodes) == 1
