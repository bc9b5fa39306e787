"""The memory curve of plans small enough to work it out by hand."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.ir.strategies import graphs
from zgraph.cost import simulate_memory
from zgraph.cost.memory import ALLOCATION_BYTES, Moment, lifetimes, local_bytes
from zgraph.cost.workspace import NUM_THREADS, workspace_bytes
from zgraph.ir import Axis, DType, Graph, Replicate, ScalarType, Shard, TensorType, parse_graph
from zgraph.ir.symbols import symbol
from zgraph.passes import RECIPES, Context, make_plan, parse_recipe

BY_HAND = """graph "g" mesh(shard=2)
op aten.mul.Tensor
op aten.t.default views(0)
op aten.tanh.default
param %w: f32[32]<S0> "w" stage=3
input %x: f32[32]<V>
tangent %t: f32[32]<V>
fwd %s: future f32[32]<R> = all_gather_start(%w)
fwd %f: f32[32]<R> = wait(%s)
fwd %v: f32[32]<R> = aten.t.default(%f)
fwd %y: f32[32]<V> = aten.mul.Tensor(%x, %v)
fwd release(%f)
fwd %z: f32[32]<V> = aten.tanh.default(%y)
bwd %u: f32[32]<V> = aten.mul.Tensor(%t, %y)
bwd %g: f32[32]<V> = aten.mul.Tensor(%u, %x)
bwd %g_pending: f32[32]<P(mean)> = pending(%g, reduce="mean")
bwd %rs: future f32[32]<S0> = reduce_scatter_start(%g_pending)
bwd %h: f32[64]<V> = aten.mul.Tensor(%x, %x)
bwd %gm: f32[32]<S0> = wait(%rs)
return fwd output %z
return bwd grad "w" %gm
return bwd grad "x" %h
"""

# Every value but a shard (64 bytes) and %h (256) has 128 bytes; inputs and what lies at rest do not count.
CURVE = [
    ("s", {"gathered": 128}),
    ("f", {"gathered": 128}),
    ("v", {"gathered": 128}),
    ("y", {"gathered": 128, "activations": 128}),
    ("release", {"gathered": 128, "activations": 128}),
    ("z", {"activations": 128, "temporaries": 128}),
    ("u", {"activations": 128, "temporaries": 128 + 128}),  # %t, %u; %z is gone with the call
    ("g", {"temporaries": 128 + 128}),  # %u, %g
    ("rs", 128 + 64),  # %g, and what the other rank sends, which becomes the mean
    ("h", 128 + 64 + 256),
    ("gm", 64 + 256),  # %g is let go
]


def test_the_curve_is_the_one_worked_out_by_hand():
    moments = simulate_memory(make_plan(parse_graph(BY_HAND)), {}).moments
    assert [m.node for m in moments] == [name for name, _ in CURVE]
    for moment, (name, wanted) in zip(moments, CURVE, strict=True):
        if isinstance(wanted, dict):
            assert {k: v for k, v in moment.bytes_by_category.items() if v} == wanted, name
        else:
            assert moment.total_bytes == wanted, name


def test_the_peak_is_the_first_of_the_highest_moments():
    curve = simulate_memory(make_plan(parse_graph(BY_HAND)), {})
    assert (curve.peak.node, curve.peak.phase, curve.peak.total_bytes) == ("h", "bwd", 448)
    assert type(curve)(()).peak == Moment("", "", {})
    assert type(curve)((Moment("a", "fwd", {"x": 3}), Moment("b", "fwd", {"x": 1, "y": 2}))).peak.node == "a"


def test_what_is_left_at_the_end_are_gradients():
    text = BY_HAND.replace("return bwd grad", "bwd %end: f32[16]<V> = aten.tanh.default(%h)\nreturn bwd grad", 1)
    last = simulate_memory(make_plan(parse_graph(text)), {}).moments[-1]
    assert last.bytes_by_category["gradients"] == 64
    assert last.bytes_by_category.get("buckets", 0) == 0
    assert last.total_bytes == 64 + 256 + 64


@pytest.mark.parametrize(
    ("kind", "num_bytes"),
    [
        (TensorType(DType.f32, (16,)), 64),
        (TensorType(DType.f32, (17,)), 128),
        (TensorType(DType.bf16, (100,)), 256),
        (TensorType(DType.f32, ()), 64),
        (TensorType(DType.f32, (0, 8)), 0),
        (TensorType(DType.f32, (64,), placement=(Replicate(),)), 256),
        (TensorType(DType.f32, (64,), placement=(Shard(0),)), 128),
        (TensorType(DType.f32, (65,), placement=(Shard(0),)), 192),
        (TensorType(DType.f32, (65,), placement=(Replicate(),), future=True), 320),  # 2 chunks of 33, padded
        (TensorType(DType.f32, (4, 100), strides=(0, 1)), 448),
        (TensorType(DType.f32, (100, 4), strides=(1, 100)), 1600),
        (TensorType(DType.f32, (symbol("s0"), 32)), 5 * 128),
        (ScalarType("int"), 0),
    ],
    ids=str,
)
def test_bytes_of_one_ranks_part(kind, num_bytes):
    assert local_bytes(kind, (Axis("shard", 2),), {"s0": 5}) == num_bytes


@settings(max_examples=60, deadline=None)
@given(graphs(), st.sampled_from(list(RECIPES.values())), st.integers(1, 3))
def test_bytes_never_go_below_zero_and_come_in_whole_allocations(graph, recipe, num_ranks):
    plan = make_plan(parse_recipe(recipe).run(graph, Context((Axis("shard", num_ranks),))))
    curve = simulate_memory(plan, {})
    for moment in curve.moments:
        assert all(v >= 0 for v in moment.bytes_by_category.values())
        assert moment.total_bytes % ALLOCATION_BYTES == 0
    assert len(curve.moments) == len(plan.forward.instructions) + len(
        (plan.loss_only or (plan.backward,))[0].instructions
    )


def deep(num_layers: int) -> Graph:
    """Linear layers with many parameters and few activations."""
    lines = ['graph "deep"', "op aten.mm.default", "op aten.t.default views(0)"]
    lines += [f'param %w{i}: f32[256, 256] "w{i}"' for i in range(num_layers)]
    lines += ["input %h0: f32[1, 256]", f"tangent %t{num_layers}: f32[1, 256]"]
    lines += [f"fwd %h{i + 1}: f32[1, 256] = aten.mm.default(%h{i}, %w{i})" for i in range(num_layers)]
    for i in reversed(range(num_layers)):
        lines += [
            f"bwd %x{i}: f32[256, 1 | 1, 256] = aten.t.default(%h{i})",
            f"bwd %g{i}: f32[256, 256] = aten.mm.default(%x{i}, %t{i + 1})",
            f"bwd %v{i}: f32[256, 256 | 1, 256] = aten.t.default(%w{i})",
            f"bwd %t{i}: f32[1, 256] = aten.mm.default(%t{i + 1}, %v{i})",
        ]
    lines += [f"return fwd output %h{num_layers}"]
    lines += [f'return bwd grad "w{i}" %g{i}' for i in range(num_layers)]
    return parse_graph("\n".join(lines))


def test_gathering_for_each_use_needs_the_least():
    peaks = []
    for recipe in RECIPES.values():
        alone = parse_recipe(recipe.replace("bucket", "bucket(pack_below_bytes=1)"))
        plan = make_plan(alone.run(deep(6), Context((Axis("shard", 4),))))
        peaks.append(simulate_memory(plan, {}).peak.total_bytes)
    assert peaks[3] < min(peaks[:3])


@pytest.mark.parametrize(
    ("sizes", "is_dense", "num_threads", "forward_bytes", "backward_bytes"),
    [  # as torch's allocator was asked for them
        ((4, 4, 17, 16), False, 1, 2380, 2312 + 68),
        ((4, 4, 17, 16), True, 2, 4760, 17408 + 4624 + 68),
        ((2, 4, 300, 16), False, 1, 81408, 153600 + 256),
        ((2, 4, 1000, 64), True, 1, 591872, 2048000 + 1048576 + 1024),
    ],
)
def test_what_attention_on_processors_takes(sizes, is_dense, num_threads, forward_bytes, backward_bytes):
    batch, heads, tokens, size = sizes
    kind = f"f32[{batch}, {heads}, {tokens}, {size}"
    kind += "]" if is_dense else f" | {tokens * heads * size}, {size}, {heads * size}, 1]"
    name = "aten._scaled_dot_product_flash_attention_for_cpu"
    graph = parse_graph(
        f'graph "g"\nop {name}.default multi\nop {name}_backward.default multi\ninput %q: {kind}\n'
        f"fwd %o: {kind}, %l: f32[{batch}, {tokens}, {heads}] = {name}.default(%q, %q, %q)\n"
        f"fwd %a: {kind}, %b: {kind}, %c: {kind} = {name}_backward.default(%q, %q, %q, %q, %o, %l, 0.0, false)\n"
    )
    hints = {NUM_THREADS: num_threads}
    assert [workspace_bytes(n, hints) for n in graph.nodes] == [forward_bytes, backward_bytes]


def test_lifetimes_add_up_to_the_curve():
    plan = make_plan(parse_graph(BY_HAND))
    lives = lifetimes(plan, {})
    for at, moment in enumerate(simulate_memory(plan, {}).moments):
        alive = {life.name for life in lives if life.born <= at < life.freed}
        assert sum(life.num_bytes for life in lives if life.name in alive) == moment.total_bytes, moment
    assert {(life.name, life.category, life.num_bytes) for life in lives if life.name in "sy"} == {
        ("s", "gathered", 128),
        ("y", "activations", 128),
    }
