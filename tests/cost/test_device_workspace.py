"""What ops take on GPUs while they run, against sizes worked out by hand from torch's sources."""

import pytest

from zgraph.codegen import library as _kernels  # noqa: F401 - registers the ops
from zgraph.cost.workspace import NUM_THREADS, workspace_bytes
from zgraph.ir import Node, parse_graph

MIB = 1 << 20


def node(text: str, *inputs: str) -> Node:
    """The only node of a graph with these inputs."""
    op = text.partition(" = ")[2].partition("(")[0]
    lines = ['graph "g"', f"op {op} multi" if text.count("%") - text.partition(" = ")[2].count("%") > 1 else f"op {op}"]
    (found,) = parse_graph("\n".join([*lines, *(f"input {i}" for i in inputs), f"fwd {text}"])).nodes
    return found


def attention_backward(kind: str, queries: str, keys: str) -> Node:
    name = f"aten._scaled_dot_product_{kind}_attention{'_for_cpu' if kind == 'cpu' else ''}_backward.default"
    name = name.replace("cpu_attention_for_cpu", "flash_attention_for_cpu")
    return node(
        f"%dq: {queries}, %dk: {keys}, %dv: {keys} = {name}(%g, %q, %k, %k)",
        f"%g: {queries}",
        f"%q: {queries}",
        f"%k: {keys}",
    )


@pytest.mark.parametrize("kind", ["flash", "efficient", "cudnn", "cpu"])
def test_the_backward_of_attention_adds_up_in_fp32(kind):
    """8,192 tokens of width 4,096, also where it was captured on a processor; 500 tokens are rounded up to 512."""
    queries = "bf16[1, 32, 8192, 128]"
    assert workspace_bytes(attention_backward(kind, queries, queries), {}) == 128 * MIB + MIB
    queries = "bf16[2, 4, 500, 80]"
    assert workspace_bytes(attention_backward(kind, queries, queries), {}) == 2 * 4 * 512 * (96 + 1) * 4


def test_heads_that_share_keys_and_values_have_their_gradients_apart():
    queries, keys = "bf16[1, 32, 8192, 128]", "bf16[1, 8, 8192, 128]"
    found = workspace_bytes(attention_backward("flash", queries, keys), {})
    assert found == 129 * MIB + 2 * 32 * 8192 * 128 * 2


def test_attention_of_packed_sequences_takes_as_much():
    tokens = "bf16[8192, 32, 128]"
    made = node(
        f"%dq: {tokens}, %dk: {tokens}, %dv: {tokens} = aten._flash_attention_backward.default(%g, %q, %q, %q)",
        f"%g: {tokens}",
        f"%q: {tokens}",
    )
    assert workspace_bytes(made, {}) == 129 * MIB


@pytest.mark.parametrize(("tokens", "num_bytes"), [(8192, 8192 * 4096 * 4 + 64 * 8192), (3072, 0)])
def test_the_gradient_of_an_embedding_is_sorted_and_added_up_in_fp32(tokens, num_bytes):
    text = "%w: bf16[128256, 4096] = aten.embedding_dense_backward.default(%g, %i, 128256, -1, false)"
    made = node(text, f"%g: bf16[2, {tokens // 2}, 4096]", f"%i: i64[2, {tokens // 2}]")
    assert workspace_bytes(made, {}) == num_bytes


@pytest.mark.parametrize(("adds", "num_bytes"), [("true", 64 * 5000), ("false", 0)])
def test_what_is_added_at_indices_is_sorted(adds, num_bytes):
    text = f"%y: f32[100, 8] = aten.index_put.default(%x, [%i], %v, {adds})"
    made = node(text, "%x: f32[100, 8]", "%i: i64[5000]", "%v: f32[5000, 8]")
    assert workspace_bytes(made, {}) == num_bytes


def test_a_projected_loss_takes_as_much_on_a_gpu_as_elsewhere():
    """Blocks of logits in fp32 and in bf16, and the gradient of what is projected."""
    name = "zgraph.linear_cross_entropy_backward.default"
    made = node(
        f"%dx: bf16[8192, 4096], %dw: bf16[128256, 4096] = {name}(%t, %x, %w, %i, %n, %l, -100, true)",
        "%t: f32[]",
        "%x: bf16[8192, 4096]",
        "%w: bf16[128256, 4096]",
        "%i: i64[8192]",
        "%n: f32[]",
        "%l: f32[8192]",
    )
    found = workspace_bytes(made, {})
    assert found == workspace_bytes(made, {NUM_THREADS: 1})
    assert found == 64 * MIB * 3 // 2 + 8192 * 4096 * 6


def test_kernels_take_their_sums_over_rows_and_nothing_else():
    """Each program writes its own; on a processor the reference holds every step."""
    kinds = "x f32[M,N], w f32[N]"
    norm = f"norm 256: {kinds} -> y f32[M,N]; s = mul(x, x); y = mul(s, w)"
    plain = node(f'%y: f32[4096, 256] = zgraph.rows.default([%x, %w], "{norm}")', "%x: f32[4096, 256]", "%w: f32[256]")
    assert workspace_bytes(plain, {}) == 0
    assert workspace_bytes(plain, {NUM_THREADS: 1}) > 0
    grad = f"grad 256: {kinds} -> y f32[M,N], b f32[N]; y = mul(x, w); b = col_sum(y)"
    summed = node(
        f'%y: f32[4096, 256], %b: f32[256] = zgraph.rows.default([%x, %w], "{grad}")',
        "%x: f32[4096, 256]",
        "%w: f32[256]",
    )
    assert workspace_bytes(summed, {}) == 4 * 512 * 256
    mm = "mm 256: acc f32[M,N] -> y f32[M,N], b f32[N]; y = copy(acc); b = col_sum(y)"
    product = node(
        f'%y: f32[3, 1000, 256], %b: f32[256] = zgraph.matmul.default(%l, %r, [], "{mm}")',
        "%l: f32[3, 1000, 64]",
        "%r: f32[3, 64, 256]",
    )
    assert workspace_bytes(product, {}) == 4 * 3 * 8 * 256
