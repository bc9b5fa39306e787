"""The cross-entropy as one op: with the projection where nothing else needs the logits, beside it where it does."""

import re

import pytest
import torch

from tests.interp.ranks import Reference
from zgraph.cost.memory import ALLOCATION_BYTES
from zgraph.ir import parse_graph, verify
from zgraph.ir.external_ops import LOSS, LOSS_BACKWARD, PROJECTED_LOSS, PROJECTED_LOSS_BACKWARD
from zgraph.passes import Context, Fuse, parse_recipe
from zgraph.passes.analysis.lookahead import step_memory
from zgraph.passes.fusion.loss import loss_nodes

TEXT = """graph "g"
op aten._log_softmax.default
op aten._log_softmax_backward_data.default
op aten._to_copy.default
op aten.exp.default
op aten.mm.default
op aten.nll_loss_backward.default
op aten.nll_loss_forward.default multi
op aten.t.default views(0)
param %w: f32[16, 8] "weight"
input %x: f32[4, 8]
input %u: f32[4, 8]
input %v: f32[16, 8]
input %vt: f32[8, 16]
input %us: f32[4, 16]
input %h: bf16[4, 16]
input %vs: f32[16, 4]
input %square: f32[8, 8]
input %target: i64[4]
tangent %d: f32[]
fwd %wt: f32[8, 16 | 1, 8] = aten.t.default(%w)
fwd %z: f32[4, 16] = aten.mm.default(%x, %wt)
fwd %p: f32[4, 16] = aten._log_softmax.default(%z, 1, false)
fwd %l: f32[], %n: f32[] = aten.nll_loss_forward.default(%p, %target, none, 1, -100)
bwd %gp: f32[4, 16] = aten.nll_loss_backward.default(%d, %p, %target, none, 1, -100, %n)
bwd %gz: f32[4, 16] = aten._log_softmax_backward_data.default(%gp, %p, 1, f32)
bwd %gt: f32[16, 4 | 1, 16] = aten.t.default(%gz)
bwd %gw: f32[16, 8] = aten.mm.default(%gt, %x)
bwd %back: f32[16, 8] = aten.t.default(%wt)
bwd %gx: f32[4, 8] = aten.mm.default(%gz, %back)
return fwd output %l
return bwd grad "w" %gw
return bwd grad "x" %gx
return bwd output none
"""
PROJECTED, BESIDE, APART = {PROJECTED_LOSS, PROJECTED_LOSS_BACKWARD}, {LOSS, LOSS_BACKWARD}, set[str]()
OUTPUT, GRADIENT = "return fwd output %l\n", 'return bwd grad "w" %gw\n'
Change = tuple[str, str]


def forward(node: str) -> list[Change]:
    """One more node of the forward, which is returned."""
    return [("bwd %gp", f"{node}\nbwd %gp"), (OUTPUT, f"{OUTPUT}return fwd output %more\n")]


def backward(node: str, of: str) -> list[Change]:
    """One more node of the backward, which is returned as this input's gradient."""
    return [(OUTPUT, f"{node}\n{OUTPUT}"), ("bwd output none\n", f'bwd grad "{of}" %more\n')]


CASES: dict[str, tuple[list[Change], set[str]]] = {
    "as it is": ([], PROJECTED),
    "a sum": ([("none, 1, -100", "none, 2, -100")], PROJECTED),
    "the weight itself": ([("(%gz, %back)", "(%gz, %w)")], PROJECTED),
    "logits returned": ([(OUTPUT, f"{OUTPUT}return fwd output %z\n")], BESIDE),
    "logits read": (forward("fwd %more: f32[4, 16] = aten.exp.default(%z)"), BESIDE),
    "gradient of logits read": (backward("bwd %more: f32[4, 16] = aten.exp.default(%gz)", "us"), BESIDE),
    "its transpose read twice": (backward("bwd %more: f32[16, 8] = aten.mm.default(%gt, %u)", "v"), BESIDE),
    "its transpose with another x": ([("mm.default(%gt, %x)", "mm.default(%gt, %u)")], BESIDE),
    "its transpose behind a matrix": ([("= aten.mm.default(%gt, %x)", "= aten.mm.default(%v, %square)")], BESIDE),
    "another weight": ([("(%gz, %back)", "(%gz, %v)")], BESIDE),
    "a transpose of another": ([("t.default(%wt)", "t.default(%vt)")], BESIDE),
    "an exponential of the weight": ([("= aten.t.default(%wt)", "= aten.exp.default(%v)")], BESIDE),
    "no gradient of the weight": ([("default(%gt, %x)", "default(%vs, %x)")], BESIDE),
    "no gradient of x": ([("mm.default(%gz, %back)", "mm.default(%us, %back)")], BESIDE),
    "probabilities read": (forward("fwd %more: f32[4, 16] = aten.exp.default(%p)"), APART),
    "probabilities returned": ([(OUTPUT, f"{OUTPUT}return fwd output %p\n")], APART),
    "their gradient read": (backward("bwd %more: f32[4, 16] = aten.exp.default(%gp)", "us"), APART),
    "a gradient in half precision": (
        [
            (
                "bwd %gt: f32[16, 4 | 1, 16] = aten.t.default(%gz)",
                "bwd %half: bf16[4, 16] = aten._to_copy.default(%gz, dtype=bf16)",
            ),
            ("aten.mm.default(%gt, %x)", "aten.mm.default(%vs, %x)"),
            ("aten.mm.default(%gz, %back)", "aten.mm.default(%us, %back)"),
            ("bwd output none\n", 'bwd grad "h" %half\n'),
        ],
        APART,
    ),
    "classes in rows": ([("(%z, 1, false)", "(%z, 0, false)"), ("(%gp, %p, 1, f32)", "(%gp, %p, 0, f32)")], APART),
}


@pytest.mark.parametrize(("changes", "wanted"), CASES.values(), ids=CASES)
def test_a_loss_takes_in_what_nothing_else_needs(changes: list[Change], wanted: set[str]) -> None:
    text = TEXT
    for before, after in changes:
        assert text.count(before) == 1 or before.startswith("none"), before
        text = text.replace(before, after)
    graph = parse_graph(text)
    verify(graph)
    fused = parse_recipe("fuse,dce").run(graph, Context())
    verify(fused)
    ops = {n.op for n in fused.nodes}
    assert ops & (PROJECTED | BESIDE) == wanted
    assert "aten._to_copy.default" not in ops, "no cast is needed in single precision"
    assert ("aten.nll_loss_forward.default" in ops) == (not wanted)
    reference = Reference(graph, 1)
    for found, true in zip(reference.run(fused), reference.run(graph), strict=True):
        for a, b in zip(found or (), true or (), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_beside_inductor_the_loss_is_one_op_where_memory_asks_for_it_at_any_of_its_nodes():
    graph = parse_graph(re.sub(r"\b16\b", "4096", TEXT))
    alive = [m.total_bytes for m in step_memory(graph, Context()).moments if m.node in loss_nodes(graph)]
    assert min(alive) < max(alive) - ALLOCATION_BYTES
    assert max(alive) % ALLOCATION_BYTES == 0
    for budget, is_fused in ((max(alive) - ALLOCATION_BYTES, True), (max(alive), False)):
        made = Fuse(only_measured=True).prepared(graph, Context(memory_budget=budget))
        assert (made is not graph) == is_fused
