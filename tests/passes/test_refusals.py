"""What passes refuse, and what they leave as it is, with the whole of what they say."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import ClassVar

import pytest

from tests.passes.programs import graph_of
from zgraph.errors import BudgetError, ContractError, PlacementError, QuantisationError
from zgraph.ir import Axis, DType, Graph, Partial, Replicate, Shard, TensorType, parse_graph
from zgraph.passes import Context, Pass, parse_recipe
from zgraph.passes.compress import AUTO, Compress
from zgraph.passes.core.budgeted import Budgeted
from zgraph.passes.fit import Fit
from zgraph.passes.float8 import Float8
from zgraph.passes.fuse import Fuse
from zgraph.passes.keep import Keep
from zgraph.passes.offload import Offload
from zgraph.passes.partition import Partition
from zgraph.passes.place import Place, cut_inputs
from zgraph.passes.placements import Search
from zgraph.passes.placements.prices import Prices
from zgraph.passes.plan.make_plan import over_budget
from zgraph.passes.quantise import Quantise
from zgraph.passes.recompute import Recompute
from zgraph.passes.schedule import Schedule

TENSOR = Context((Axis("tensor", 2), Axis("shard", 1)))

OPTIONS: dict[str, Callable[[], object]] = {
    "weights must be int8 or int4": lambda: Quantise("int2"),  # type: ignore[arg-type]
    "activations must be wide or int8": lambda: Quantise(activations="int4"),  # type: ignore[arg-type]
    "activations=int8 needs weights=int8": lambda: Quantise("int4", "int8"),
    "group must be one of 32, 64, 128": lambda: Quantise("int4", group=96),
    "outliers must be 0 or more, and needs activations=int8": lambda: Quantise(outliers=16),
    "calibrated is for weights=int4": lambda: Quantise(calibrated=True),
    "recipe must be tensorwise or rowwise": lambda: Float8("columnwise"),  # type: ignore[arg-type]
    "axis must be one of tensor, context, expert, not shard": lambda: Place("shard"),
    "search must be values or all, not some": lambda: Place(search="some"),
    "what is searched decides where the sequence is cut: leave sequence out": lambda: Place(
        sequence=True, search="all"
    ),
    "matmuls must be never, auto or always": lambda: Fuse(matmuls="some"),  # type: ignore[arg-type]
    "num_ahead must be 0 or more": lambda: Keep(-1),
    "num_bytes and min_bytes must be 0 or more": lambda: Offload(0, -1),
    "stage must be 0, 1, 2 or 3, not 4": lambda: Partition(4),
    "keep_bytes must be 0 or more": lambda: Recompute(keep_bytes=-1),
    "num_ahead, slack and effort must be 0 or more": lambda: Schedule(slack=float("inf")),
}


@pytest.mark.parametrize("says", OPTIONS)
def test_options_that_are_none(says: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(says)}$"):
        OPTIONS[says]()


def test_options_at_their_limits() -> None:
    Keep(0), Offload(0, 0), Recompute(keep_bytes=0), Schedule(0, 0.0, 0)
    for wrong in (lambda: Offload(-1), lambda: Schedule(-1), lambda: Schedule(effort=-1), lambda: Schedule(slack=-0.1)):
        with pytest.raises(ValueError, match="must be 0 or more"):
            wrong()


def test_a_codec_that_is_none() -> None:
    with pytest.raises(ValueError, match="q9"):
        Compress("q9(block=8)")
    assert Compress("auto").gradients == "auto"
    assert Compress("q8").gradients == "q8(block=256)"


# --- layers ------------------------------------------------------------------------------------------------------

LAYER = """graph "g"
op aten.mm.default
op aten.t.default views(0)
KIND %w: DTYPE[OUT, IN] "lin.weight"
input %x: DTYPE[ROWS, IN]
fwd %t: DTYPE[IN, OUT | 1, IN] = aten.t.default(%w)
fwd %y: DTYPE[ROWS, OUT] = aten.mm.default(%x, %t)WHERE
return fwd output %y
"""


def layer(
    outputs: int, columns: int, dtype: str = "f32", rows: object = 32, kind: str = "param", where: str = ' @ "lin"'
) -> Graph:
    words = {"KIND": kind, "DTYPE": dtype, "OUT": outputs, "IN": columns, "ROWS": rows, "WHERE": where}
    text = LAYER
    for word, value in words.items():
        text = text.replace(word, str(value))
    return parse_graph(text)


@pytest.mark.parametrize(
    ("graph", "group", "says"),
    [
        (
            layer(16, 40),
            64,
            "1 of 1 layers cannot be kept in int4, first lin: groups of 64 do not divide its 40 columns; keep it in "
            "int8, by its name in wider= or weights=int8",
        ),
        (
            layer(16, 96, where=""),
            64,
            "1 of 1 layers cannot be kept in int4, first w: groups of 64 do not divide its 96 columns; pass group=32",
        ),
        (
            layer(16, 64),
            128,
            "1 of 1 layers cannot be kept in int4, first lin: groups of 128 do not divide its 64 columns; pass "
            "group=64",
        ),
        (
            layer(24, 64),
            64,
            "1 of 1 layers cannot be kept in int4, first lin: its 24 outputs are no multiple of 16; keep it in int8, "
            "by its name in wider=",
        ),
    ],
)
def test_layers_that_int4_does_not_hold(graph: Graph, group: int, says: str) -> None:
    with pytest.raises(QuantisationError, match=f"^{re.escape(says)}$"):
        Quantise("int4", group=group).run(graph, Context())
    wide = Quantise("int4", group=group, wider="lin+").run(graph, Context())
    assert [n.op for n in wide.nodes].count("zgraph.to_int8.default") == 2


@pytest.mark.parametrize("graph", [layer(16, 64, "f64"), layer(16, 64, kind="constant"), layer(16, 64, "i64")])
def test_what_is_no_layer_of_floats_stays(graph: Graph) -> None:
    assert Quantise().run(graph, Context()) is graph
    assert Quantise().layers(graph) == {}


@pytest.mark.parametrize(
    ("graph", "says"),
    [
        (layer(16, 64, "f64"), "computed in f64"),
        (layer(24, 64), "24 is no multiple of 16"),
        (layer(16, 40), "40 is no multiple of 16"),
        (layer(16, 64, rows=0), "0 is no multiple of 16"),
        (layer(16, 64, rows="s0"), "a size changes from call to call"),
        (layer(16, 40, rows="s0"), "a size changes from call to call"),
        (layer(16, 64, where=' @ "model.lm_head"'), "excluded by name"),
    ],
)
def test_layers_that_are_left_out_of_float8(graph: Graph, says: str) -> None:
    assert list(Float8().left_out(graph).values()) == [says]
    assert Float8().layers(graph) == []
    assert Float8().run(graph, Context()) is graph


def test_layers_of_float8() -> None:
    assert Float8().layers(layer(16, 64)) == ["lin"]
    assert Float8().left_out(layer(16, 64)) == {}
    assert Float8().layers(layer(16, 64, "f16")) == Float8().layers(layer(16, 64, "bf16")) == ["lin"]


# --- meshes ------------------------------------------------------------------------------------------------------

WRITES = """graph "g"
op aten.add_.Tensor writes(0) views(0)
op aten.mm.default
param %w: f32[4, 4] "lin.weight" tensor=S1
input %x: f32[4, 4]
fwd %y: f32[4, 4] = aten.mm.default(%x, %w)
fwd %z: f32[4, 4] = aten.add_.Tensor(%y, %x)WHERE
return fwd output %z
"""


@pytest.mark.parametrize(("where", "of"), [(' @ "lin"', "lin"), ("", "the model")])
def test_what_writes_to_memory_is_not_cut(where: str, of: str) -> None:
    says = (
        f"aten.add_.Tensor of {of} writes to memory, which parts of values on other ranks do not see; leave tensor "
        "parallelism out, or write the model without it"
    )
    with pytest.raises(PlacementError, match=f"^{re.escape(says)}$"):
        Place().run(parse_graph(WRITES.replace("WHERE", where)), TENSOR)


def test_a_cut_that_does_not_divide() -> None:
    graph = cut_inputs(graph_of("bf16"), "tensor", {"up.weight": Shard(0)})
    says = (
        "up.weight of shape (9, 6) does not divide into S0 on 2 ranks of tensor; place it on another dim, keep it "
        "whole, or take another number of ranks"
    )
    with pytest.raises(PlacementError, match=f"^{re.escape(says)}$"):
        Place().run(graph, TENSOR)


def test_a_search_of_what_is_placed() -> None:
    graph = Place().run(graph_of("tied"), TENSOR)
    says = (
        "a search along tensor begins with whole tensors, and the graph is placed along tensor, shard: search along "
        "the first axis, and state the others"
    )
    with pytest.raises(PlacementError, match=f"^{re.escape(says)}$"):
        Search(graph, Axis("tensor", 2), TENSOR, {})


def test_codes_go_along_data_axes() -> None:
    context = Context((Axis("tensor", 2), Axis("shard", 2)))
    graph = parse_graph('graph "g" mesh(tensor=2, shard=2)\nparam %a: f32[4, 2]<S1, S0> "a" stage=3\n')
    says = (
        "compress codes gradients along one or two data axes of ranks, and the mesh has tensor, shard; leave compress "
        "out of the recipe, or take such a mesh"
    )
    with pytest.raises(ContractError, match=f"^{re.escape(says)}$"):
        Compress().run(graph, context)
    alone = parse_recipe("partition(stage=2)").run(graph_of("tied"), Context((Axis("shard", 1),)))
    assert Compress().run(alone, context) is alone


def test_the_codec_that_auto_takes() -> None:
    mild, strong = AUTO
    chosen = Compress.chosen
    assert chosen({"": 100.0, mild: 95.0, strong: 95.0}) == ""
    assert chosen({"": 100.0, mild: 94.9, strong: 100.0}) == mild
    assert chosen({"": 100.0, mild: 51.0, strong: 50.0}) == mild
    assert chosen({"": 100.0, mild: 51.1, strong: 50.0}) == strong


def test_a_mesh_that_nothing_was_placed_along() -> None:
    says = "the mesh has tensor, but the graph is placed along none; put place before partition"
    with pytest.raises(ContractError, match=f"^{re.escape(says)}$"):
        Partition(3).run(graph_of("tied"), replace(TENSOR, mesh=(Axis("tensor", 2), Axis("shard", 2))))


def test_prices_of_what_stays_or_is_gathered() -> None:
    prices = Prices(graph_of("llama"), Axis("tensor", 2), TENSOR)
    kind = TensorType(DType.f32, (8, 6))
    assert prices.moved_us(kind, Shard(0), Shard(0)) == prices.moved_us(kind, Replicate(), Replicate()) == 0.0
    assert prices.sent_bytes(kind, Replicate(), Shard(0)) == 0
    assert prices.sent_bytes(kind, Shard(0), Replicate()) == 8 * 6 * 4 // 2
    assert prices.moved_us(kind, Partial("sum"), Shard(0)) < prices.moved_us(kind, Partial("sum"), Replicate())


# --- budgets -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Needs(Pass):
    """Needs so much above rest as a function of what it is to go by, and notes what that was."""

    least: Callable[[int], int] = max
    seen: list[int] = field(default_factory=list)
    name: ClassVar[str] = "needs"

    def run(self, graph: Graph, context: Context) -> Graph:
        aim = context.fitting.step_bytes
        assert aim is not None
        self.seen.append(aim)
        found = max(self.least(aim), context.update_bytes)
        if context.step_bytes is not None and found > context.step_bytes:
            raise over_budget(context, found, f"%{found}")
        return graph


def tried(least: Callable[[int], int], budget: int, **options: int) -> tuple[list[int], object]:
    """What a step goes by in turn, and how that ends."""
    step = Needs(least)
    context = Context(memory_budget=budget, **options)
    try:
        list(Budgeted((step,), graph_of("tied"), context).run())
    except BudgetError as error:
        return step.seen, (error.needed_bytes, error.where)
    return step.seen, None


def test_what_is_tried_within_a_budget() -> None:
    assert tried(lambda aim: 640, 640) == ([640], None)
    assert tried(lambda aim: 640, 1000, rest_bytes=360) == ([640], None)
    assert tried(lambda aim: aim + 128, 640) == ([640, 512], None)
    seen, end = tried(lambda aim: 640, 639)
    assert end == (640, "%640")
    assert seen == [576, 512, 0, 320, 384, 512, 576, 576, 512]
    seen, end = tried(lambda aim: 6400 - aim if aim < 2560 else 5120, 3000, rest_bytes=40, update_bytes=100)
    assert end == (5160, "%5120")
    assert seen == [2944, 768, 0, 3200, 4160, 5120, 5760, 5056, 4992]


def test_a_step_that_needs_less_where_it_aims_higher() -> None:
    needs = {0: 6400}
    seen, end = tried(lambda aim: needs.get(aim, 1920 + abs(aim - 2048)), 1024)
    assert seen == [1024, 0, 3200, 4160, 5120, 5760, 3008, 2752, 2432, 1984, 1408, 256, 1920, 1792]
    assert end == (1984, "%1984")


def test_a_budget_that_is_no_number_of_allocations() -> None:
    context = Context(memory_budget=1063, rest_bytes=40)
    assert context.step_bytes == 1023
    assert context.fitting.memory_budget == 960
    assert replace(context, fit_bytes=500).fitting.memory_budget == 448
    assert replace(context, rest_bytes=2000).fitting.memory_budget == 0
    assert (context.fitting.rest_bytes, context.fitting.fit_bytes) == (0, None)
    assert Context().fitting == Context()


def test_what_a_refusal_says() -> None:
    error = over_budget(Context(memory_budget=12345, rest_bytes=1000), 20000, "%y, forward")
    assert (error.needed_bytes, error.where) == (21000, "%y, forward")
    assert str(error) == (
        "a memory budget of 12,345 bytes cannot hold this step: with 1,000 at rest and 20,000 at its peak (%y, "
        "forward), 21,000 is the smallest that can; offload the optimizer or the parameters (offload=), shard over "
        "more ranks, or make the batch smaller"
    )


def test_without_a_backward_there_is_nothing_to_fit() -> None:
    graph = layer(16, 64)
    assert Fit().run(graph, Context(memory_budget=1)) is graph
    assert Fit().run(graph, Context(recomputes="always")) is graph
