"""The backward's needs of the forward, as blocks: what running again costs, and what gives way for a budget."""

import pytest

from tests.passes.test_decisions import CHAIN
from zgraph.cost import CostTable, hardware
from zgraph.cost.table import AlphaBeta
from zgraph.ir import HOST, Axis, Graph, Phase, parse_graph, verify
from zgraph.passes import Context
from zgraph.passes.analysis.forward import Forward

GATHERED = """graph "g" mesh(shard=2)
op aten.mul.Tensor
param %w: f32[1001]<S0>{space} "w" stage=3
input %x: f32[1001]<V>
tangent %t: f32[1001]<V>
fwd %w_full: f32[1001]<R> = reshard(%w{keep})
fwd %y: f32[1001]<V> = aten.mul.Tensor(%x, %w_full)
fwd %z: f32[1001]<V> = aten.mul.Tensor(%y, %y)
{again}bwd %g: f32[1001]<V> = aten.mul.Tensor(%t, %y)
return fwd output %z
return bwd grad "x" %g
"""
AGAIN = "bwd %w_again: f32[1001]<R> = reshard(%w)\nbwd %u: f32[1001]<V> = aten.mul.Tensor(%t, %w_again)\n"

COSTS = CostTable(
    hardware=hardware("h100"), per_host=1, transfers={"all_gather": AlphaBeta(latency_us=100.0, bytes_per_s=1e6)}
)


def gather_us(graph: Graph) -> float:
    """The cost of making %y again beside the op itself."""
    context = Context((Axis("shard", 2),), costs=COSTS)
    ((block, names),) = Forward(graph, context).blocks
    maker = block.makers[block.maker_of[names.index("y")]]
    return maker.us - COSTS.node_us(graph, graph.producers["y"], {})


def test_what_is_computed_again_from_a_parameter_pays_its_gather():
    """Unless the backward gathers it anyhow, or it stays."""
    plain = {"space": "", "keep": "", "again": ""}
    assert gather_us(parse_graph(GATHERED.format(**plain))) == pytest.approx(100.0 + 2 * 501 * 4)
    assert gather_us(parse_graph(GATHERED.format(**{**plain, "again": AGAIN}))) == 0
    assert gather_us(parse_graph(GATHERED.format(**{**plain, "keep": ", keep=true"}))) == 0
    on_host = parse_graph(GATHERED.format(**{**plain, "space": "@" + HOST}))
    copied = COSTS.copy_us(501 * 4)
    assert copied > 0
    assert gather_us(on_host) == pytest.approx(100.0 + 2 * 501 * 4 + copied)


@pytest.mark.parametrize("is_first", [True, False], ids=["made before", "made later"])
def test_the_backwards_own_gather_serves_what_is_computed_again(is_first):
    """It stays where it is made in time, and comes forward where it is not; there is never a second one."""
    text = GATHERED.format(space="", keep="", again=AGAIN if is_first else "")
    if not is_first:
        text = text.replace("return fwd", f"{AGAIN}return fwd", 1)
    graph = parse_graph(text)
    found = Forward(graph, Context((Axis("shard", 2),), costs=COSTS)).computing_again(frozenset(["y"]))
    verify(found)
    backward = [n.name for n in found.nodes if n.phase is Phase.backward]
    assert backward == (["w_again", "u", "y_again", "g"] if is_first else ["w_again", "y_again", "g", "u"])
    assert [v.name for v in found.producers["y_again"].operands] == ["x", "w_again"]


def test_what_runs_again_reads_what_does_not_stay():
    ((block, names),) = Forward(parse_graph(CHAIN), Context()).blocks
    read = {names[m.makes[0]]: [names[v] for v in m.reads] for m in block.makers}
    graph = parse_graph(CHAIN)
    stays = {i.value.name for i in graph.inputs}
    assert read == {n: [v.name for v in graph.producers[n].operands if v.name not in stays] for n in read}
    assert any(read.values())


def test_what_just_fits_gives_way_for_nothing():
    forward = Forward(parse_graph(CHAIN), Context())
    assert [c.num_bytes for c in forward.choices(3 * 256)] == [3 * 256]
    assert [c.num_bytes for c in forward.choices(3 * 256 - 1)] == [256]


def test_what_a_byte_may_cost_says_what_is_kept():
    forward = Forward(parse_graph(CHAIN), Context())
    choices = [forward.choices_at(price) for price in (0.0, *forward.prices())]
    assert [[c.num_bytes for c in found] for found in choices] == [[768], [256], [0]]
    assert choices[0][0].us == 0


def test_the_last_price_is_above_all_at_which_a_choice_changes(monkeypatch):
    """However slow an op is."""
    monkeypatch.setattr(CostTable, "node_us", lambda *_: 1e6)
    forward = Forward(parse_graph(CHAIN), Context())
    assert [c.num_bytes for c in forward.choices_at(forward.prices()[-1])] == [0]


def test_layers_are_blocks_and_small_parts_go_with_the_one_before():
    """Regions that the user marked stay whole, whatever layers they are in."""

    def parts(*layers: tuple[str, int]) -> list[int]:
        lines = [
            f"fwd %v{i}: f32[4] = aten.exp.default(%{f'v{i - 1}' if i else 'x'})"
            + (f" checkpoint={region}" if region else "")
            + f' @ "{layer}"'
            for i, (layer, region) in enumerate(layers)
        ]
        text = "\n".join(['graph "g"', "op aten.exp.default", "input %x: f32[4]", *lines]) + "\n"
        return [len(part) for part in Forward(parse_graph(text), Context()).parts]

    first, second = ("layers.0", 0), ("layers.1", 0)
    assert parts(*[first] * 24, *[second] * 24) == [24, 24]
    assert parts(*[first] * 23, *[second] * 23) == [46]
    assert parts(*[first] * 23, *[second] * 24) == [23, 24]
    assert parts(*[first] * 24, *[second] * 23) == [24, 23]
    assert parts(*[("layers.0", 1)] * 24, *[("layers.1", 1)] * 24) == [48]
    assert parts(*[("layers.0", 1)] * 24, *[("layers.1", 2)] * 24) == [24, 24]
    assert parts(*[("layers.0", 1)] * 24, *[("layers.0", 2)] * 24) == [48]
