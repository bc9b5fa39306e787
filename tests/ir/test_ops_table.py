"""Every row of the ops table says all that the compiler asks of it, and every other table has the row too."""

import pytest

from zgraph.errors import VerifyError
from zgraph.interpreter import RULES
from zgraph.ir import OPS, Axis, Graph, Node, TensorType, parse_graph, print_graph, verify
from zgraph.ir.op_rows import LANES
from zgraph.ir.ops import is_pure, views
from zgraph.ir.ranked_rows import ROUNDS
from zgraph.ir.type_rules import TypeRuleError
from zgraph.runtime.collectives import EXECUTORS

VALUES = """graph "g" mesh(shard=2)
op aten.mm.default
op aten.t.default views(0)
op aten.bernoulli.p random
param %s: f32[4, 2]<S0> "s"
param %s2: f32[3]<S0> "s2"
param %sd: f64[4, 2]<S0> "sd"
param %s1: f32[4, 2]<S1> "s1"
input %v: f32[4, 2]<V>
input %v2: f32[3]<V>
input %m: f32[4, 2]<P(mean)>
input %m2: f32[3]<P(mean)>
input %sum: f32[4, 2]<P(sum)>
input %root: f32[4, 2]<P(root)>
input %h: f32[4, 2]<V>@host
param %sh: f32[4, 2]<S0>@host "sh"
input %r: f32[4, 2]<R>
input %bucket: f32[14]<R>
input %b: f32[10]<S0>
input %codes: u8[2, 10]<S1>
input %rows: u8[2, 10]<S0>
input %w: bf16[4, 2]<S0>
input %coded: u8[64]<S0>
input %all: u8[64]<R>
input %n: int
input %largest: f32[2]<R>
input %one: f32[]<R>
input %own: f32[]<V>
fwd %f: future f32[4, 2]<R> = all_gather_start(%s)
"""

ALONG = """graph "g" mesh(tensor=2, shard=2)
op aten.silu.default
input %w: f32[4, 6]<R, V>
input %s: f32[2, 6]<S0, V>
input %c: f32[4, 3]<S1, V>
input %p: f32[4, 6]<P(sum), V>
input %i: i64[4, 6]<R, V>
input %n: i64[4]<R, V>
input %g: f32[]<R, V>
input %h: f32[4, 6, 6]<R, V>
input %at: i64[8]<R, V>
input %ends: i32[4]<R, V>
input %rows: f32[8, 6]<G0, V>
input %others: f32[8, 3]<G0, V>
input %columns: f32[6, 8]<G1, V>
input %matrices: f32[2, 6, 3]<S0, V>
input %table: i8[2, 6]<S0, V>
input %scale: f32[2, 1]<S0, V>
input %one: f32[4, 1]<R, V>
input %q: f32[1, 3, 2, 4]<S2, V>
input %l: f32[1, 3, 2]<S2, V>
"""
"""Values along a model axis."""

AXIS_NODES = {
    "all_to_all_start": (
        '%a: future f32[4, 3]<S1, V> = all_to_all_start(%s, axis="tensor", dim=1)',
        '%a: future f32[4, 3]<S1, V> = all_to_all_start(%s, axis="shard", dim=1)',
        '%a: future f32[4, 3]<S1, V> = all_to_all_start(%w, axis="tensor", dim=1)',
        '%a: future f32[2, 6]<S0, V> = all_to_all_start(%s, axis="tensor", dim=0)',
        '%a: future f32[4, 3]<S1, V> = all_to_all_start(%s, axis="tensor")',
        '%a: f32[4, 3]<S1, V> = all_to_all_start(%s, axis="tensor", dim=1)',
    ),
    "slice": (
        '%a: f32[4, 3]<S1, V> = slice(%w, axis="tensor", dim=1)',
        '%a: f32[4, 6]<S1, V> = slice(%w, axis="tensor", dim=1)',
        '%a: f32[4, 3]<S1/3, V> = slice(%w, axis="tensor", dim=1)',
        '%a: f32[4, 3]<S1, V> = slice(%w, axis="tensor", dim=1, blocks=[1, 2])',
        '%a: f32[4, 3]<S1, V> = slice(%p, axis="tensor", dim=1)',
        '%a: f32[4, 3]<S1, V> = slice(%w, axis="context", dim=1)',
    ),
    "first_rank": (
        '%a: f32[4, 6]<P(sum), V> = first_rank(%w, axis="tensor")',
        '%a: f32[4, 6]<P(sum), V> = first_rank(%p, axis="tensor")',
        '%a: f32[4, 6]<P(mean), V> = first_rank(%w, axis="tensor")',
        '%a: i64[4, 6]<P(sum), V> = first_rank(%i, axis="tensor")',
    ),
    "part_embedding": (
        '%a: f32[4, 6, 6]<P(sum), V> = part_embedding(%s, %i, axis="tensor")',
        '%a: f32[4, 6, 6]<R, V> = part_embedding(%s, %i, axis="tensor")',
        '%a: f32[4, 6, 3]<S2, V> = part_embedding(%c, %i, axis="tensor")',
        '%a: f32[4, 6, 6]<P(sum), V> = part_embedding(%w, %i, axis="tensor")',
        '%a: f32[4, 6]<P(sum), V> = part_embedding(%s, %i, axis="tensor")',
        '%a: f32[4, 6, 6]<P(sum), R> = part_embedding(%s, %i, axis="tensor")',
        '%a: f32[4, 6, 6]<P(sum), V> = part_embedding(%s, %i, axis="context")',
        '%a: f32[4, 6, 6]<P(sum), V> = part_embedding(%s, axis="tensor")',
    ),
    "part_int8_embedding": (
        '%a: f32[4, 6, 6]<P(sum), V> = part_int8_embedding(%table, %i, %scale, axis="tensor")',
        '%a: f32[4, 6, 6]<R, V> = part_int8_embedding(%table, %i, %scale, axis="tensor")',
        '%a: f32[4, 6, 6]<P(sum), V> = part_int8_embedding(%table, %i, %one, axis="tensor")',
        '%a: f32[4, 6, 6]<P(sum), V> = part_int8_embedding(%table, %i, axis="tensor")',
        '%a: i8[4, 6, 6]<P(sum), V> = part_int8_embedding(%table, %i, %scale, axis="tensor")',
    ),
    "part_embedding_backward": (
        '%a: f32[5, 6]<S0, V> = part_embedding_backward(%h, %i, 5, -1, false, axis="tensor")',
        '%a: f32[5, 6]<R, V> = part_embedding_backward(%h, %i, 5, -1, false, axis="tensor")',
        '%a: f32[5, 6]<S0, V> = part_embedding_backward(%h, %i, 10, -1, false, axis="tensor")',
        '%a: f32[5, 6]<S0, V> = part_embedding_backward(%h, %i, 5, -1, true, axis="tensor")',
        '%a: f32[5, 6]<S0, V> = part_embedding_backward(%h, %i, axis="tensor")',
    ),
    "part_nll_loss": (
        '%a: f32[]<P(sum), V>, %b: f32[]<R, V> = part_nll_loss(%c, %n, none, 1, -100, axis="tensor")',
        '%a: f32[]<P(sum), V>, %b: f32[]<P(sum), V> = part_nll_loss(%c, %n, none, 1, -100, axis="tensor")',
        '%a: f32[]<R, V>, %b: f32[]<R, V> = part_nll_loss(%w, %n, none, 1, -100, axis="tensor")',
        '%a: f32[4]<P(sum), V>, %b: f32[]<R, V> = part_nll_loss(%c, %n, none, 1, -100, axis="tensor")',
        '%a: f32[]<P(sum), V> = part_nll_loss(%c, %n, none, 1, -100, axis="tensor")',
    ),
    "part_nll_loss_backward": (
        '%a: f32[4, 3]<S1, V> = part_nll_loss_backward(%g, %c, %n, none, 1, -100, %g, axis="tensor")',
        '%a: f32[4, 6]<R, V> = part_nll_loss_backward(%g, %w, %n, none, 1, -100, %g, axis="tensor")',
        '%a: f32[4, 6]<S1, V> = part_nll_loss_backward(%g, %c, %n, none, 1, -100, %g, axis="tensor")',
    ),
    "part_grouped_mm": (
        '%a: f32[8, 3]<G0, V> = part_grouped_mm(%rows, %matrices, %ends, axis="tensor")',
        '%a: f32[8, 3]<R, V> = part_grouped_mm(%rows, %matrices, %ends, axis="tensor")',
        '%a: f32[4, 3]<G0, V> = part_grouped_mm(%rows, %matrices, %ends, axis="tensor")',
        '%a: f32[4, 3]<S0, V> = part_grouped_mm(%w, %matrices, %ends, axis="tensor")',
        '%a: f32[6, 3]<R, V> = part_grouped_mm(%columns, %others, %ends, axis="tensor")',
        '%a: f32[8, 3]<G0, V> = part_grouped_mm(%rows, %matrices, %ends, axis="context")',
    ),
    "part_grouped_mm_fallback": (
        '%a: f32[2, 6, 3]<S0, V> = part_grouped_mm_fallback(%columns, %others, %ends, axis="tensor")',
        '%a: f32[4, 6, 3]<S0, V> = part_grouped_mm_fallback(%columns, %others, %ends, axis="tensor")',
        '%a: f32[2, 6, 3]<R, V> = part_grouped_mm_fallback(%columns, %others, %ends, axis="tensor")',
    ),
    "part_grouped_mm_fallback_backward": (
        "%a: f32[8, 6]<G0, V>, %b: f32[2, 6, 3]<S0, V> = "
        'part_grouped_mm_fallback_backward(%rows, %matrices, %ends, %others, axis="tensor")',
        "%a: f32[8, 6]<G0, V>, %b: f32[2, 6, 3]<R, V> = "
        'part_grouped_mm_fallback_backward(%rows, %matrices, %ends, %others, axis="tensor")',
        '%a: f32[8, 6]<G0, V> = part_grouped_mm_fallback_backward(%rows, %matrices, %ends, %others, axis="tensor")',
    ),
    "ring_attention": (
        '%a: f32[1, 3, 2, 4]<S2, V>, %b: f32[1, 3, 2]<S2, V> = ring_attention(%q, %q, %q, 0.0, true, axis="tensor")',
        '%a: f32[1, 3, 2, 4]<R, V>, %b: f32[1, 3, 2]<S2, V> = ring_attention(%q, %q, %q, 0.0, true, axis="tensor")',
        '%a: f32[1, 3, 2, 4]<S2, V>, %b: f32[1, 3, 2]<S2, V> = ring_attention(%q, %q, %q, 0.5, true, axis="tensor")',
        '%a: f32[1, 3, 2, 4]<S2, V> = ring_attention(%q, %q, %q, 0.0, true, axis="tensor")',
        '%a: bf16[1, 3, 2, 4]<S2, V>, %b: f32[1, 3, 2]<S2, V> = ring_attention(%q, %q, %q, axis="tensor")',
    ),
    "ring_attention_backward": (
        "%a: f32[1, 3, 2, 4]<S2, V>, %b: f32[1, 3, 2, 4]<S2, V>, %d: f32[1, 3, 2, 4]<S2, V> = "
        'ring_attention_backward(%q, %q, %q, %q, %q, %l, 0.0, true, axis="tensor")',
        "%a: f32[1, 3, 2, 4]<S2, V>, %b: f32[1, 3, 2, 4]<P(sum), V>, %d: f32[1, 3, 2, 4]<S2, V> = "
        'ring_attention_backward(%q, %q, %q, %q, %q, %l, 0.0, true, axis="tensor")',
    ),
    "index_rows_start": (
        '%a: future f32[8, 6]<G0, V> = index_rows_start(%s, %at, %ends, axis="tensor")',
        '%a: f32[8, 6]<G0, V> = index_rows_start(%s, %at, %ends, axis="tensor")',
        '%a: future f32[8, 6]<S0, V> = index_rows_start(%s, %at, %ends, axis="tensor")',
        '%a: future f32[8, 6]<G0, V> = index_rows_start(%w, %at, %ends, axis="tensor")',
        '%a: future f32[8, 6]<G0, V> = index_rows_start(%s, %at, axis="tensor")',
        '%a: future f32[8, 6]<G0, V> = index_rows_start(%s, %w, %ends, axis="tensor")',
        '%a: future f32[8, 6]<G0, V> = index_rows_start(%s, %at, %ends, axis="shard")',
        '%a: future f32[8, 6]<G0, R> = index_rows_start(%s, %at, %ends, axis="tensor")',
    ),
    "put_rows_start": (
        '%a: future f32[2, 6]<S0, V> = put_rows_start(%s, %at, %rows, %ends, axis="tensor")',
        '%a: future f32[2, 6]<G0, V> = put_rows_start(%s, %at, %rows, %ends, axis="tensor")',
        '%a: future f32[4, 6]<R, V> = put_rows_start(%w, %at, %rows, %ends, axis="tensor")',
        '%a: future f32[2, 6]<S0, V> = put_rows_start(%s, %n, %rows, %ends, axis="tensor")',
        '%a: future f32[8, 6]<G0, V> = put_rows_start(%rows, %at, %rows, %ends, axis="tensor")',
        '%a: future f32[2, 6]<S0, V> = put_rows_start(%s, %at, %others, %ends, axis="tensor")',
    ),
}
"""The same as `NODES` of ops that are along a model axis alone."""

ALONG_AXIS = (
    ('%a: future f32[4, 6]<R, V> = all_reduce_start(%p, axis="tensor")', 96),
    ('%a: future f32[4, 6]<R, V> = all_gather_start(%c, axis="tensor")', 48),
    ('%a: future f32[2, 6]<S0, V> = reduce_scatter_start(%p, axis="tensor", dim=0)', 48),
    ('%a: future f32[4, 3]<S1, V> = all_to_all_start(%s, axis="tensor", dim=1)', 24),
    ('%a: future f32[8, 6]<G0, V> = index_rows_start(%s, %at, %ends, axis="tensor")', 48),
    ('%a: future f32[4, 6]<S0, V> = index_rows_start(%rows, %at, %ends, axis="tensor")', 48),
    ('%a: future f32[8, 6]<G0, V> = put_rows_start(%rows, %n, %s, %ends, axis="tensor")', 24),
    ("%a: f32[4, 6]<R, V> = reshard(%p)", 0),
    ("%a: f32[2, 6]<S0/2, V> = reshard(%w)", 0),
)
"""What is along a model axis, with the bytes that a rank sends."""

NOT_ALONG_AXIS = (
    '%a: future f32[4, 6]<R, V> = all_reduce_start(%s, axis="tensor")',
    '%a: future f32[4, 6]<R, R> = all_reduce_start(%p, axis="tensor")',
    '%a: future f32[4, 6]<R, V> = all_gather_start(%w, axis="tensor")',
    "%a: bf16[4, 6]<P(sum), V> = cast(%p, dtype=bf16)",
    "%a: f32[4, 6]<S0, V> = reshard(%w)",
    "%a: f32[4, 6]<P(mean), V> = reshard(%w)",
    "%a: f32[8, 6]<R, V> = reshard(%rows)",
    "%a: f32[8, 6]<R, V> = aten.silu.default(%rows)",
)

# For each op a node that its type rule takes, and nodes that it does not.
NODES = {
    "reshard": (
        "%a: f32[4, 2]<R>, %c: f32[3]<R> = reshard(%s, %s2)",
        "%a: f32[4, 2]<S0> = reshard(%s)",
        "%a: f32[4, 2]<V>@host = reshard(%h)",
        "%a: f32[4, 2]<R> = reshard(%s, %s2)",
        "%a: int = reshard(%n)",
        "%a: f32[4, 2]<V> = reshard(%s)",
        '%a: f32[4, 2]<R> = reshard(%root, reduce="root")',
        "%a: f32[4, 2]<R> = reshard(%v)",
        "%a: f32[4, 2]<S0> = reshard(%v)",
        "%a: f32[4, 2]<P(mean)> = reshard(%v)",
        "%a: f32[4, 2]<V> = reshard(%m)",
        "%a: f32[4, 2]<P(sum)> = reshard(%m)",
        "%a: f32[4, 2]<S1> = reshard(%m)",
        "%a: f32[4, 2]<S0> = reshard(%root)",
        "%a: f32[4, 2]<P(mean)> = reshard(%r)",
        "%a: f32[4, 2]<V> = reshard(%r)",
        "%a: f32[4, 2]<S0> = reshard(%r)",
    ),
    "all_gather_start": (
        "%a: future f32[4, 2]<R> = all_gather_start(%s)",
        "%a: future f32[4, 2]<R> = all_gather_start(%v)",
        "%a: future f32[4, 2]<R>@host = all_gather_start(%sh)",
        "%a: future f32[4, 2]<R> = all_gather_start(%s1)",
        "%a: future f32[4, 2]<R> = all_gather_start(%s, %s)",
        '%a: future f32[4, 2]<R> = all_gather_start(%s, codec="delta")',
        '%a: future u8[64]<R> = all_gather_start(%coded, codec="q8(block=256)", dtype=f32)',
        '%a: future u8[64]<R> = all_gather_start(%coded, codec="difference(q8(block=256))")',
        '%a: future u8[64]<R> = all_gather_start(%coded, codec="nothing")',
        "%a: f32[4, 2]<R> = all_gather_start(%s)",
    ),
    "reduce_scatter_start": (
        "%a: future f32[4, 2]<S0> = reduce_scatter_start(%m)",
        "%a: future f32[4, 2]<S0> = reduce_scatter_start(%s)",
        "%a: future f32[4, 2]<S0> = reduce_scatter_start(%n)",
        "%a: future f32[4, 2]<R> = reduce_scatter_start(%m)",
        "%a: future f32[4, 2]<S0> = reduce_scatter_start(%v)",
        "%a: future f32[4, 2]<S0> = reduce_scatter_start(%r)",
        "%a: future f32[4, 2]<S0> = reduce_scatter_start(%root)",
        "%a: future f32[4, 2]<S0>, %c: future f32[4, 2]<S0> = reduce_scatter_start(%m, %sum)",
    ),
    "all_reduce_start": (
        "%a: future f32[4, 2]<R> = all_reduce_start(%sum)",
        "%a: future f32[4, 2]<R> = all_reduce_start(%s)",
        "%a: future f32[4, 2]<R> = all_reduce_start(%f)",
        "%a: future f32[4, 2]<R> = all_reduce_start(%v)",
        "%a: future f32[4, 2]<R> = all_reduce_start(%root)",
    ),
    "broadcast_start": (
        "%a: future f32[4, 2]<R> = broadcast_start(%root)",
        "%a: future f32[4, 2]<R> = broadcast_start(%s)",
        "%a: future f32[4, 2]<R> = broadcast_start(%v)",
        "%a: future f32[4, 2]<R> = broadcast_start(%m)",
        "%a: future f32[4, 2]<R> = broadcast_start(%sum)",
    ),
    "offload_start": (
        "%a: future f32[4, 2]<V>@host = offload_start(%v)",
        "%a: future f32[4, 2]<V> = offload_start(%v)",
        "%a: future f32[4, 2]<V>@host = offload_start(%h)",
        "%a: f32[4, 2]<V>@host = offload_start(%v)",
        "%a: future f32[4, 2]<R>@host = offload_start(%f)",
    ),
    "reload_start": (
        "%a: future f32[4, 2]<V> = reload_start(%h)",
        "%a: future f32[4, 2]<V>@host = reload_start(%h)",
        "%a: future f32[4, 2]<V> = reload_start(%v)",
        "%a: future f32[4, 2]<V> = reload_start(%h, %h)",
    ),
    "wait": (
        "%a: f32[4, 2]<R> = wait(%f)",
        "%a: f32[4, 2]<R> = wait(%r)",
        "%a: int = wait(%n)",
        "%a: future f32[4, 2]<R> = wait(%f)",
    ),
    "pack": (
        "%a: f32[12]<S0> = pack(%s, %s2)",
        "%a: f32[12]<S0> = pack(%s, %sd)",
        "%a: f32[16]<S0> = pack(%s, %sh)",
        "%a: f32[12]<S0> = pack(%s, %v2)",
        "%a: f32[12]<P(sum)> = pack(%sum, %m2)",
        "%a: f32[12]<V> = pack(%m, %m2)",
        "%a: f32[11]<S0> = pack(%s, %s2)",
        "%a: f32[0]<S0> = pack()",
    ),
    "unpack": (
        "%a: f32[4, 2]<S0>, %c: f32[1]<S0> = unpack(%b)",
        "%a: f32[4, 2]<S0>, %c: f64[1]<S0> = unpack(%b)",
        "%a: f32[4, 2]<S0>, %c: f32[9]<S0> = unpack(%b)",
        "%a: f32[4, 2]<R>, %c: f32[1]<R> = unpack(%b)",
        "%a: f32[4, 2]<S0>, %c: int = unpack(%b)",
    ),
    "cast": (
        "%a: bf16[4, 2]<S0> = cast(%s, dtype=bf16)",
        "%a: bf16[4, 2]<S0> = cast(%s)",
        "%a: bf16[4, 2]<S0> = cast(%s, dtype=f64)",
        '%a: bf16[4, 2]<S0> = cast(%s, dtype="bf16")',
    ),
    "amax": (
        "%a: f32[2]<S0> = amax(%s)",
        "%a: f32[1]<S0> = amax(%s)",
        "%a: f32[2]<R> = amax(%s)",
        "%a: f32[2]<S0> = amax(%v)",
        "%a: f32[2]<S0> = amax(%s1)",
        "%a: f32[2]<S0> = amax(%sd)",
        "%a: f32[2]<S0> = amax(%sh)",
        "%a: f32[2]<S0> = amax(%s, %s)",
        "%a: f32[2]<S0> = amax(%n)",
    ),
    "float8_scale": (
        "%a: f32[]<R> = float8_scale(%largest, dtype=f8e4m3)",
        "%a: f32[]<R> = float8_scale(%largest)",
        "%a: f32[]<R> = float8_scale(%largest, dtype=bf16)",
        "%a: f32[]<V> = float8_scale(%largest, dtype=f8e4m3)",
        "%a: f32[]<R> = float8_scale(%r, dtype=f8e4m3)",
        "%a: f32[]<R> = float8_scale(%n, dtype=f8e4m3)",
        "%a: f32[]<R> = float8_scale(%largest, %largest, dtype=f8e4m3)",
    ),
    "float8_cast": (
        "%a: f8e4m3[4, 2]<S0> = float8_cast(%s, %one, dtype=f8e4m3)",
        "%a: f8e4m3[4, 2]<S0> = float8_cast(%s, %one, dtype=f8e5m2)",
        "%a: f8e4m3[4, 2]<R> = float8_cast(%s, %one, dtype=f8e4m3)",
        "%a: f8e4m3[4, 2]<S0> = float8_cast(%s, %own, dtype=f8e4m3)",
        "%a: f8e4m3[4, 2]<S0> = float8_cast(%s, %largest, dtype=f8e4m3)",
        "%a: f8e4m3[4, 2]<S0> = float8_cast(%s, dtype=f8e4m3)",
        "%a: f8e4m3[4, 2]<R> = float8_cast(%r, %one, dtype=f8e4m3)",
        "%a: bf16[4, 2]<S0> = float8_cast(%s, %one, dtype=bf16)",
    ),
    "encode": (
        '%a: u8[2, 10]<S0> = encode(%m, codec="q8(block=256)", feedback=["s"])',
        '%a: u8[10]<S0> = encode(%m, codec="q8(block=256)")',
        '%a: u8[2, 10]<S0> = encode(%m, codec="q9")',
        "%a: u8[2, 10]<S0> = encode(%m)",
        '%a: u8[2, 10]<S0> = encode(%v, codec="q8(block=256)")',
        '%a: u8[2, 10]<S0> = encode(%root, codec="q8(block=256)")',
        '%a: u8[2, 10]<S0> = encode(%m, codec="q8(block=256)", feedback=["s", "s"])',
        '%a: u8[2, 10]<S0> = encode(%m, codec="q8(block=256)", feedback="s")',
        '%a: u8[10]<S0> = encode(%sd, codec="q8(block=256)")',
        '%a: u8[10]<S0> = encode(%sh, codec="q8(block=256)")',
        '%a: u8[64]<S0> = encode(%w, codec="delta")',
        '%a: u8[64]<S0> = encode(%w, codec="delta", copies=["w", "w"])',
        '%a: u8[64]<S0> = encode(%w, codec="exponent", copies=["w"])',
        '%a: u8[80]<S0> = encode(%s, codec="delta", copies=["s"])',
        '%a: u8[64]<R> = encode(%w, codec="exponent")',
        '%a: u8[72]<R> = encode(%r, codec="delta", copies=["r"])',
    ),
    "decode": (
        '%a: f32[4, 2]<S0> = decode(%codes, codec="q8(block=256)", reduce="mean")',
        '%a: f32[4, 2]<S0> = decode(%codes, codec="q4(block=128)", reduce="mean")',
        '%a: f32[4, 2]<R> = decode(%codes, codec="q8(block=256)")',
        '%a: f32[4, 2]<S0> = decode(%codes, codec="q8(block=256)", reduce="root")',
        '%a: f32[5, 2]<S0> = decode(%codes, codec="q8(block=256)", reduce="mean")',
        '%a: i32[4, 2]<S0> = decode(%codes, codec="q8(block=256)", reduce="mean")',
        '%a: f32[4, 2]<S0> = decode(%codes, reduce="mean")',
        '%a: f32[4, 2]<S0> = decode(%rows, codec="q8(block=256)", reduce="mean")',
        '%a: bf16[4, 2]<R> = decode(%all, codec="delta")',
        '%a: bf16[4, 2]<R> = decode(%coded, codec="exponent")',
        '%a: bf16[4, 2]<R> = decode(%all, codec="exponent", reduce="mean")',
        '%a: f16[4, 2]<R> = decode(%all, codec="exponent")',
        '%a: bf16[5, 2]<R> = decode(%all, codec="exponent")',
    ),
    "copy": (
        "%a: f32[4, 2]<V> = copy(%v)",
        "%a: f32[4, 2]<S0> = copy(%v)",
        "%a: f32[2, 4]<V> = copy(%v)",
        "%a: f32[4, 2]<V> = copy()",
    ),
    "accumulate": (
        '%a: f32[4, 2]<P(mean)> = accumulate(%m, target="s")',
        "%a: f32[4, 2]<P(mean)> = accumulate(%m)",
        '%a: f64[4, 2]<P(mean)> = accumulate(%m, target="s")',
        '%a: f32[4, 2]<V> = accumulate(%v, target="s")',
        '%a: f32[4, 2]<P(root)> = accumulate(%root, target="s")',
        '%a: f32[4, 2]<R> = accumulate(%r, target="s")',
    ),
    "pending": (
        '%a: f32[4, 2]<P(mean)> = pending(%v, reduce="mean")',
        '%a: f32[4, 2]<P(sum)> = pending(%v, reduce="mean")',
        '%a: f32[4, 2]<P(mean)> = pending(%v, reduce="max")',
        "%a: f32[4, 2]<P(mean)> = pending(%v)",
        '%a: f32[4, 2]<P(mean)> = pending(%r, reduce="mean")',
        '%a: f32[4, 2]<P(mean)> = pending(%m, reduce="mean")',
        '%a: f32[4, 2]<P(mean)> = pending(%s, reduce="mean")',
        '%a: f32[4, 2]<P(mean)> = pending(%f, reduce="mean")',
        '%a: f32[4, 2]<P(mean)> = pending(%n, reduce="mean")',
    ),
    "release": (
        "release(%r)",
        "release(%n)",
        "release(%r, %v)",
        "%a: f32[4, 2]<R> = release(%r)",
    ),
}

OUTSIDE = """graph "g" mesh(replicate=2, shard=2)
input %m: f32[4, 2]<P(mean), P(mean)>
input %half: f32[4, 2]<R, P(mean)>
input %inner: f32[4, 2]<P(mean), S0>
input %own: u8[12]<V, S0>
input %part: f32[4]<V, S0>
input %code: u8[6]<V, S0>
input %all: u8[12]<R, S0>
input %odd: u8[9]<V, S0>
"""
"""Values on rows of ranks that have all shards, and their codes."""

OUTSIDE_NODES = {
    "inner_reduce_scatter_start": (
        "%a: future f32[4, 2]<P(mean), S0> = inner_reduce_scatter_start(%m)",
        "%a: future f32[4, 2]<R, S0> = inner_reduce_scatter_start(%half)",
        "%a: future f32[4, 2]<P(mean), S0> = inner_reduce_scatter_start(%inner)",
        "%a: f32[4, 2]<P(mean), S0> = inner_reduce_scatter_start(%m)",
    ),
    "outer_all_to_all_start": (
        "%a: future u8[12]<V, S0> = outer_all_to_all_start(%own)",
        "%a: future u8[12]<R, S0> = outer_all_to_all_start(%all)",
        "%a: future f32[4]<V, S0> = outer_all_to_all_start(%part)",
        "%a: future u8[9]<V, S0> = outer_all_to_all_start(%odd)",
        "%a: future u8[12]<V, S0> = outer_all_to_all_start(%own, dim=0)",
    ),
    "outer_all_gather_start": (
        "%a: future u8[12]<R, S0> = outer_all_gather_start(%code)",
        "%a: future u8[6]<R, S0> = outer_all_gather_start(%code)",
        "%a: future u8[24]<R, S0> = outer_all_gather_start(%all)",
    ),
}
CODED_OUTSIDE = (
    '%a: u8[12]<V, S0> = encode(%inner, codec="q8(block=256)", feedback=["a"])',
    '%a: f32[4]<V, S0> = decode(%own, codec="q8(block=256)", reduce="mean")',
    '%a: u8[6]<V, S0> = encode(%part, codec="q8(block=256)", feedback=["a"])',
    '%a: f32[4, 2]<R, S0> = decode(%all, codec="q8(block=256)")',
)
NOT_CODED_OUTSIDE = (
    '%a: u8[12]<V, S0> = encode(%m, codec="q8(block=256)")',
    '%a: f32[4]<V, S0> = decode(%all, codec="q8(block=256)", reduce="mean")',
    '%a: f32[4, 2]<R, S0> = decode(%own, codec="q8(block=256)")',
    '%a: f32[2, 2]<V, S0> = decode(%own, codec="q8(block=256)", reduce="mean")',
    '%a: f32[6]<V, S0> = decode(%own, codec="q8(block=256)", reduce="mean")',
    '%a: f32[5, 2]<R, S0> = decode(%all, codec="q8(block=256)")',
)

EXCHANGED = (
    "%a: future u8[2, 10]<S1> = all_to_all_start(%rows)",
    "%a: future u8[2, 10]<S1> = all_to_all_start(%codes)",
    "%a: future f32[4, 2]<S1> = all_to_all_start(%s)",
    "%a: future u8[2, 10]<S1> = all_to_all_start(%rows, dim=1)",
    "%a: u8[2, 10]<S1> = all_to_all_start(%rows)",
)
"""Codes that are exchanged along a data axis, and what is not."""

each_op = pytest.mark.parametrize("name", OPS)


def node(line: str, values: str = VALUES) -> tuple[Graph, Node]:
    graph = parse_graph(f"{values}fwd {line}\n")
    return graph, graph.nodes[-1]


def good(name: str) -> tuple[Graph, Node]:
    for lines, values in ((AXIS_NODES, ALONG), (OUTSIDE_NODES, OUTSIDE), (NODES, VALUES)):
        if name in lines:
            return node(lines[name][0], values)
    raise AssertionError(f"{name} has no line")


def test_the_cases_are_those_of_the_table():
    assert {*NODES, *AXIS_NODES, *OUTSIDE_NODES} == set(OPS)


@pytest.mark.parametrize(("line", "sent_bytes"), ALONG_AXIS)
def test_what_is_moved_along_a_model_axis(line, sent_bytes):
    graph, made = node(line, ALONG)
    assert OPS[made.op].rule(made, graph.mesh) == tuple(r.type for r in made.results)
    assert OPS[made.op].wire_bytes(made, graph.mesh) == sent_bytes


def test_codes_are_exchanged_along_the_data_axis():
    graph, made = node(EXCHANGED[0])
    assert OPS[made.op].rule(made, graph.mesh) == tuple(r.type for r in made.results)
    assert OPS[made.op].wire_bytes(made, graph.mesh) == 5
    for line in EXCHANGED[1:-1]:
        graph, made = node(line)
        with pytest.raises(TypeRuleError):
            OPS[made.op].rule(made, graph.mesh)
    graph, made = node(EXCHANGED[-1])
    assert OPS[made.op].rule(made, graph.mesh) != tuple(r.type for r in made.results)


@pytest.mark.parametrize("line", CODED_OUTSIDE)
def test_codes_along_the_outer_axis(line):
    graph, made = node(line, OUTSIDE)
    assert OPS[made.op].rule(made, graph.mesh) == tuple(r.type for r in made.results)


@pytest.mark.parametrize("line", [*NOT_CODED_OUTSIDE, *(line for _, *bad in OUTSIDE_NODES.values() for line in bad)])
def test_no_codes_along_the_outer_axis(line):
    graph, made = node(line, OUTSIDE)
    try:
        wanted = OPS[made.op].rule(made, graph.mesh)
    except TypeRuleError:
        return
    assert wanted != tuple(r.type for r in made.results)


@pytest.mark.parametrize("line", [*NOT_ALONG_AXIS, *(line for _, *bad in AXIS_NODES.values() for line in bad)])
def test_what_is_not_moved_along_a_model_axis(line):
    with pytest.raises(VerifyError):
        verify(node(line, ALONG)[0])


@pytest.mark.parametrize(
    ("line", "wrong"),
    [
        ("%a: f32[4, 6]<P(sum), V> = aten.silu.default(%p)", "cannot make"),
        ("%a: f32[4, 3]<S0, V> = aten.silu.default(%c)", "cannot make"),
        ("%a: f32[4, 3]<R, V> = aten.silu.default(%c)", "cannot make"),
        ("%a: f32[4, 6]<S1, V> = aten.silu.default(%w)", "is not broadcast"),
    ],
)
def test_an_op_that_breaks_its_sharding_rule_is_refused(line, wrong):
    with pytest.raises(VerifyError, match=wrong):
        verify(node(line, ALONG)[0])
    verify(node("%a: f32[4, 3]<S1, V> = aten.silu.default(%c)", ALONG)[0])


@pytest.mark.parametrize(
    ("mesh", "wrong"), [("shard=2, tensor=2", "model axes come first"), ("tensor=2", "has no data axis")]
)
def test_a_mesh_has_its_model_axes_first(mesh, wrong):
    with pytest.raises(VerifyError, match=wrong):
        verify(parse_graph(f'graph "g" mesh({mesh})\n'))


@each_op
def test_a_row_has_its_own_name_and_a_line_of_doc(name):
    op = OPS[name]
    assert op.name == name
    assert op.doc.endswith(".")
    assert "\n" not in op.doc
    assert op.lane in LANES


@each_op
def test_the_type_rule_takes_a_good_node(name):
    graph, made = good(name)
    assert OPS[name].rule(made, graph.mesh) == tuple(r.type for r in made.results)


@pytest.mark.parametrize("line", [line for _, *bad in NODES.values() for line in bad])
def test_the_type_rule_refuses_a_bad_node(line):
    graph, made = node(line)
    try:
        wanted = OPS[made.op].rule(made, graph.mesh)
    except (TypeRuleError, ValueError):
        return
    assert wanted != tuple(r.type for r in made.results)


@each_op
def test_the_costs_are_numbers(name):
    graph, made = good(name)
    sent, scratch = OPS[name].wire_bytes(made, graph.mesh), OPS[name].scratch_bytes(made, graph.mesh)
    assert isinstance(sent, int)
    assert isinstance(scratch, int)
    assert (sent > 0) == (OPS[name].lane == "comm" or name in ROUNDS)
    assert scratch >= 0


@each_op
def test_only_what_leaves_the_compute_lane_promises(name):
    _, made = good(name)
    promised = [isinstance(r.type, TensorType) and r.type.future for r in made.results]
    assert all(promised) == any(promised) or not promised
    assert any(promised) == (OPS[name].lane != "compute")


@each_op
def test_it_can_be_interpreted_and_executed(name):
    assert name in RULES or name in ("accumulate", "encode", "release")
    assert (name in EXECUTORS) or name in ("release", "reshard", "pending")


@each_op
def test_it_comes_back_from_text(name):
    graph, _ = good(name)
    assert parse_graph(print_graph(graph)) == graph


@each_op
def test_views_and_purity_can_be_asked(name):
    graph, made = good(name)
    operands = {v.name for v in made.operands}
    assert set(views(graph, made)) <= operands
    assert is_pure(graph, made) == OPS[name].pure
    assert not (OPS[name].pure and (OPS[name].lane != "compute" or OPS[name].consumes))


def test_views_and_purity_of_foreign_ops_are_those_declared():
    graph, made = node("%a: f32[2, 4]<V> = aten.t.default(%v)")
    assert views(graph, made) == ("v",)
    assert is_pure(graph, made)
    graph, made = node("%a: f32[4, 2]<V> = aten.bernoulli.p(%v, 0.5)")
    assert views(graph, made) == ()
    assert not is_pure(graph, made)


def test_an_unpacked_shard_is_a_view_and_an_unpacked_whole_is_not():
    graph, made = good("unpack")
    assert views(graph, made) == ("b",)
    graph, made = node("%a: f32[4, 2]<R>, %c: f32[3]<R> = unpack(%bucket)")
    assert views(graph, made) == ()
    unplaced = parse_graph(
        'graph "g"\ninput %x: f32[8]\nfwd %a: f32[4], %b: f32[4] = unpack(%x)\nreturn fwd output %a\n'
    )
    verify(unplaced)


@pytest.mark.parametrize(
    ("line", "sent_bytes"),
    [
        ("%a: future f32[4, 2]<R> = all_gather_start(%s)", 16),
        ("%a: future f32[3]<R> = all_gather_start(%s2)", 8),  # 4 rows with its padding
        ("%a: future f32[4, 2]<S0> = reduce_scatter_start(%m)", 16),
        ("%a: future f32[4, 2]<S0> = reduce_scatter_start(%sum)", 16),
        ("%a: future f32[4, 2]<R> = all_reduce_start(%m)", 32),
        ("%a: future f32[4, 2]<R> = all_reduce_start(%sum)", 32),
    ],
)
def test_bytes_on_the_wire(line, sent_bytes):
    _, made = node(line)
    assert OPS[made.op].wire_bytes(made, (Axis("shard", 2),)) == sent_bytes
    assert OPS[made.op].wire_bytes(made, (Axis("shard", 1),)) == 0


ROWS = """graph "g" mesh(replicate=2, shard=2)
param %s: f32[4, 2]<R, S0> "s"
param %t: f32[3]<R, S0> "t"
param %d: f64[3]<R, S0> "d"
input %v: f32[4, 2]<V, V>
input %w: f32[4, 2]<R, V>
input %m: f32[4, 2]<P(mean), P(mean)>
input %one: f32[4, 2]<R, P(sum)>
input %mixed: f32[4, 2]<P(sum), P(mean)>
input %half: f32[4, 2]<V, P(sum)>
input %other: f32[4, 2]<P(sum), R>
input %part: f32[4, 2]<S0, P(sum)>
input %both: f32[4, 2]<P(root), P(mean)>
"""


@pytest.mark.parametrize(
    ("line", "sent_bytes"),
    [
        ("%a: future f32[4, 2]<R, R> = all_gather_start(%s)", 16),
        ("%a: future f32[4, 2]<R, R>, %b: future f32[3]<R, R> = all_gather_start(%s, %t)", 24),
        ("%a: future f32[4, 2]<R, S0> = reduce_scatter_start(%m)", 32),  # 16 to its row, 16 to its column
        ("%a: future f32[4, 2]<R, S0> = reduce_scatter_start(%one)", 32),
        ("%a: future f32[4, 2]<R, R> = all_reduce_start(%m)", 48),
    ],
)
def test_bytes_on_the_wire_where_two_ranks_hold_a_shard(line, sent_bytes):
    graph = parse_graph(f"{ROWS}fwd {line}\n")
    (made,) = graph.nodes
    assert OPS[made.op].rule(made, graph.mesh) == tuple(r.type for r in made.results)
    assert OPS[made.op].wire_bytes(made, graph.mesh) == sent_bytes


@pytest.mark.parametrize("name", ["mixed", "half", "other", "part", "both", "v", "w"])
@pytest.mark.parametrize("op", ["reduce_scatter_start", "all_reduce_start", "broadcast_start", "accumulate"])
def test_what_is_not_pending_alike_along_the_axes_is_not_reduced(op, name):
    graph = parse_graph(f'{ROWS}fwd %a: f32[4, 2]<R, R> = {op}(%{name}, target="s")\n')
    with pytest.raises(TypeRuleError, match="its operand must be placed P"):
        OPS[op].rule(graph.nodes[0], graph.mesh)


@pytest.mark.parametrize(
    ("name", "placement"),
    [("v", "<P(sum), P(sum)>"), ("w", "<R, P(sum)>"), ("half", "<P(sum), P(sum)>")],
)
def test_what_is_pending_is_so_along_each_axis_that_varied(name, placement):
    graph = parse_graph(f'{ROWS}fwd %a: f32[4, 2]{placement} = pending(%{name}, reduce="sum")\n')
    (made,) = graph.nodes
    assert OPS["pending"].rule(made, graph.mesh) == tuple(r.type for r in made.results)


def test_what_varies_is_told_how_to_be_reduced():
    graph = parse_graph(f"{ROWS}fwd %a: f32[4, 2]<R, R> = reshard(%v)\n")
    with pytest.raises(TypeRuleError, match="say with pending what the ranks' own values are together"):
        OPS["reshard"].rule(graph.nodes[0], graph.mesh)


@pytest.mark.parametrize("operands", ["%s, %d", "%s, %v", ""])
def test_a_grouped_call_moves_tensors_of_one_dtype_and_placement(operands):
    graph = parse_graph(f"{ROWS}fwd %a: future f32[4, 2]<R, R> = all_gather_start({operands})\n")
    with pytest.raises(TypeRuleError):
        OPS["all_gather_start"].rule(graph.nodes[0], graph.mesh)


@pytest.mark.parametrize(
    "line",
    [
        '%a: u8[64]<S0> = encode(%w, codec="delta", copies=["w"])',
        '%a: u8[64]<S0> = encode(%w, codec="exponent")',
        '%a: future u8[64]<R> = all_gather_start(%coded, codec="delta")',
        '%a: bf16[4, 2]<R> = decode(%all, codec="delta", copies=["w"])',
        '%a: bf16[4, 2]<R> = decode(%all, codec="exponent")',
    ],
)
def test_codes_of_variable_length_have_room_for_the_longest(line):
    graph = parse_graph(f"{VALUES}fwd {line}\n")
    made = graph.nodes[-1]
    assert OPS[made.op].rule(made, graph.mesh) == (made.results[0].type,)
    assert parse_graph(print_graph(graph)) == graph


def test_what_a_gather_of_codes_sends_is_estimated():
    graph = parse_graph(f'{VALUES}fwd %a: future u8[64]<R> = all_gather_start(%coded, codec="delta")\n')
    assert OPS["all_gather_start"].wire_bytes(graph.nodes[-1], graph.mesh) == 24 + 1
