"""Sequences in parts over the ranks of a context: what the whole computes, and what is exchanged for it."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch import nn

import small
import zgraph
from tests.deep import deep
from tests.interp.test_placed import TOKENS, VOCABULARY, captured, error, inputs, planned
from zgraph.bridge import ring
from zgraph.bridge.aten import FROM_TORCH
from zgraph.capture.fake import trace
from zgraph.certify.certificate import certify
from zgraph.debugging.dtypes import in_dtype
from zgraph.errors import PlacementError
from zgraph.interpreter import Interpreter
from zgraph.ir import OPS, Axis, DType, Graph, InputKind, Mesh, Node, Replicate, Shard, TensorType, Value, verify
from zgraph.ir.axis_rules import collective
from zgraph.ir.parts import part_shape
from zgraph.passes import Context, parse_recipe
from zgraph.passes.place import Place


class Loss(nn.Module):
    """A model that returns its loss alone, and none of its logits."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids=input_ids, labels=labels).loss


def placed(graph: Graph, mesh: Mesh) -> Graph:
    """The graph on the mesh, every pass of which computes what the graph before it did."""
    context = Context(mesh=mesh)
    steps = [("captured", graph)]
    along = "".join(f",place(axis={axis.name})" for axis in mesh)
    for step in parse_recipe(f"canonicalize{along}").passes:
        steps.append((step.name, step.run(steps[-1][1], context)))
    verify(steps[-1][1])
    certify(steps, context)
    return steps[-1][1]


def at_rest(graph: Graph, num_ranks: int) -> Graph:
    """The graph with parameters sharded over the ranks of a context too, behind other cuts."""
    found = []
    for entry in graph.inputs:
        shape = entry.value.tensor.shape
        for _, place in entry.cuts:
            shape = part_shape(shape, place, 3)
        divides = entry.kind is InputKind.param and shape and Shard(0).divides(shape[0], num_ranks)
        found.append(replace(entry, cuts=(*entry.cuts, ("context", Shard(0)))) if divides else entry)
    return replace(graph, inputs=tuple(found))


def moves(graph: Graph, axis: int) -> Counter[str]:
    """How often each collective goes over the wire along an axis, by phase."""
    found: Counter[str] = Counter()
    for node in graph.nodes:
        if node.op == "reshard":
            old, new = (v.tensor.placement[axis] for v in (node.operands[0], node.results[0]))
            how = collective(old, new)
            found[f"{node.phase.value} {how.removesuffix('_start')}"] += how.endswith("_start")
    return +found


def exact(graph: Graph, made: Graph, name: str) -> bool:
    given = inputs(name)
    return error(made, Interpreter().run(made, given), graph, Interpreter().run(graph, given)) < 1e-12


@pytest.mark.parametrize(("name", "num_ranks"), [("llama", 3), ("fused", 2), deep("llama", 2), deep("fused", 3)])
def test_attention_exchanges_the_sequence_for_heads(name: str, num_ranks: int) -> None:
    graph = captured(name)
    made = placed(graph, (Axis("context", num_ranks),))
    assert exact(graph, made, name)
    found = moves(made, 0)
    assert found["fwd all_to_all"] == 4  # queries, keys and values, and what attention makes of them
    assert found["fwd all_reduce"] == 2  # the sum of losses, and how many labels count
    assert found["fwd all_gather"] == (name == "llama")  # the logits, which it returns


@pytest.mark.parametrize("name", ["fused", deep("llama")])
def test_parameters_are_sharded_over_the_ranks_of_a_context(name: str) -> None:
    graph = at_rest(captured(name), 2)
    made = placed(graph, (Axis("context", 2),))
    assert exact(graph, made, name)
    cut = [entry.value.tensor.placement[0] for entry in made.params]
    assert cut.count(Shard(0)) == len(cut)
    found = moves(made, 0)
    assert found["bwd reduce_scatter"] >= len(cut)
    assert "bwd all_reduce" not in found


@pytest.mark.parametrize("name", ["llama", deep("fused")])
def test_it_goes_with_tensor_parallelism(name: str) -> None:
    graph = planned(name)
    words = {"llama": ("model.embed_tokens.weight", "lm_head.weight"), "fused": ("embed.weight", "head.weight")}[name]
    tables = tuple(replace(i, cuts=(("tensor", Shard(0)),)) if i.target in words else i for i in graph.inputs)
    graph = at_rest(replace(graph, inputs=tables), 2)
    made = placed(graph, (Axis("tensor", 3), Axis("context", 2)))
    assert exact(graph, made, name)
    assert moves(made, 1)["fwd all_to_all"] == 4
    gathered = moves(made, 1)["fwd all_gather"] - sum(bool(i.cuts) for i in graph.params)
    assert gathered == (name == "llama")  # its logits alone, of what is no parameter


def loss_of(model: nn.Module, tokens: torch.Tensor) -> Graph:
    torch.manual_seed(0)
    return in_dtype(zgraph.trace(Loss(model), input_ids=tokens, labels=tokens), DType.f64)


def test_what_a_rank_sends_shrinks_with_the_ranks() -> None:
    graph = loss_of(small.llama(32, 1, VOCABULARY, num_heads=4, num_kv_heads=4, inner=48), TOKENS)
    sent = {}
    for count in (2, 4):
        made = placed(graph, (Axis("context", count),))
        assert "fwd all_gather" not in moves(made, 0)
        exchanged = [n.operands[0].tensor for n in made.nodes if n.op == "reshard" and "all_to_all" in _how(n)]
        sent[count] = sum(int(kind.numel) * (count - 1) // count for kind in exchanged)
    hidden = 2 * 12 * 32
    assert sent == {count: 8 * hidden * (count - 1) // count**2 for count in (2, 4)}  # Ulysses, section 3.2


def _how(node: Node) -> str:
    return collective(*(v.tensor.placement[0] for v in (node.operands[0], node.results[0])))


class Heads(nn.Module):
    """Attention of three heads."""

    def __init__(self, mask: str = "causal") -> None:
        super().__init__()
        self.qkv, self.mask = nn.Linear(12, 36), mask

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (t.reshape(2, 12, 3, 4).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        at = torch.arange(12)
        mask = {
            "window": ((at - at.unsqueeze(1)).abs() < 2)[None, None],
            "nothing": (at >= 4).unsqueeze(1).expand(12, 12),
            "large": torch.where(at.unsqueeze(1) < 4, -1e9, 0.0).expand(12, 12).to(torch.float32),
            "added": torch.linspace(-1, 1, 144).view(12, 12).masked_fill(at > at.unsqueeze(1), -torch.inf).to(x.dtype),
        }.get(self.mask)
        made = nn.functional.scaled_dot_product_attention(q, k, v, mask, is_causal=self.mask == "causal")
        return made.square().sum()


@pytest.mark.parametrize("num_ranks", [2, 3, 4])
@pytest.mark.parametrize("mask", ["causal", "window", "nothing", "large", "added", "none"])
def test_keys_and_values_go_round(mask: str, num_ranks: int) -> None:
    graph = in_dtype(zgraph.trace(Heads(mask), torch.rand(2, 12, 12)), DType.f64)
    context = Context(mesh=(Axis("context", num_ranks),))
    steps = [("captured", graph)]
    for step in parse_recipe("canonicalize,place(axis=context,ring=true)").passes:
        steps.append((step.name, step.run(steps[-1][1], context)))
    made = steps[-1][1]
    verify(made)
    certify(steps, context)
    assert [n.op for n in made.nodes if "attention" in n.op] == ["ring_attention", "ring_attention_backward"]
    assert not {"fwd all_to_all", "fwd all_gather", "bwd all_to_all", "bwd all_gather"} & moves(made, 0).keys()
    given = {i.value.name: torch.randn([int(d) for d in i.value.tensor.shape]).double() for i in graph.inputs}
    assert error(made, Interpreter().run(made, given), graph, Interpreter().run(graph, given)) < 1e-12


@pytest.mark.parametrize("value", [torch.finfo(torch.float32).min, -1e9, -1e4, 1e3, 0.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_mask_of_large_numbers_hides_rows_as_on_one_rank(value: float, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    q, k, v, gradient = torch.randn(4, 2, 4, 12, 8).to(dtype)
    mask = torch.randn(2, 1, 12, 12).to(dtype)
    mask[:, :, :5] = value
    op = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    wanted = op(q, k, v, attn_mask=mask)
    of_wanted = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        gradient, q, k, v, *wanted, 0.0, False, attn_mask=mask
    )
    placed_at = (Shard(2), Replicate())
    kind, logs, of_mask = (
        TensorType(FROM_TORCH[t.dtype], tuple(t.chunk(3, 2)[0].shape), None, placed_at) for t in (q, wanted[1], mask)
    )
    x, given = Value("x", kind), Value("m", of_mask)
    options = (("attn_mask", given), ("axis", "context"))
    made = Node("ring_attention", (x, x, x), (Value("y", kind), Value("l", logs)), options)
    args = (x, x, x, x, x, Value("l", logs), 0.0, False)
    back = Node("ring_attention_backward", args, tuple(Value(f"g{n}", kind) for n in range(3)), options)
    mesh = (Axis("context", 3), Axis("shard", 1))
    out, sums = ring.on_ranks(made, [t.chunk(3, 2) for t in (q, k, v, mask)], mesh)
    tensors = [t.chunk(3, 2) for t in (gradient, q, k, v)]
    found = ring.on_ranks(back, [*tensors, out, sums, mask.chunk(3, 2)], mesh)
    near = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float64: 1e-11}[dtype]
    assert torch.allclose(torch.cat(out, 2), wanted[0], rtol=near, atol=near)
    for got, want in zip(found, of_wanted, strict=True):
        assert torch.allclose(torch.cat(got, 2).double(), want.double(), rtol=near, atol=near * want.abs().max().item())


def test_a_rank_that_fails_ends_the_others() -> None:
    kind = TensorType(DType.f32, (1, 1, 4, 8), None, (Shard(2), Replicate()))
    x = Value("x", kind)
    node = Node("ring_attention", (x, x, x), (Value("y", kind), Value("z", kind)), (("axis", "context"),))
    wrong = [torch.randn(1, 1, 4, 8), torch.randn(1, 1, 4, 9)]
    with pytest.raises(RuntimeError):
        ring.on_ranks(node, [wrong] * 3, (Axis("context", 2), Axis("shard", 1)))


def test_what_goes_round_is_counted() -> None:
    graph = zgraph.trace(Heads(), torch.rand(2, 12, 12))
    made = placed(graph, (Axis("context", 4),))
    sent = {n.op: OPS[n.op].wire_bytes(n, made.mesh) for n in made.nodes if n.op.startswith("ring_")}
    numbers = 2 * 2 * 12 * 12 // 4  # of a rank's keys and values
    assert sent == {"ring_attention": 3 * 4 * numbers, "ring_attention_backward": 3 * 4 * numbers + 4 * 4 * numbers}


def test_a_ring_is_of_contexts() -> None:
    with pytest.raises(ValueError, match="leave ring out"):
        Place(axis="tensor", ring=True)


def test_what_does_not_divide_is_refused() -> None:
    graph = captured("llama")
    with pytest.raises(PlacementError, match=r"\(2, 12\) does not divide over 5 ranks of context; pad it"):
        placed(graph, (Axis("context", 5),))
    heads = trace(Heads(), torch.rand(2, 12, 12), capability=(9, 0))
    with pytest.raises(PlacementError, match=r"3 heads of queries and 3 of keys, which do not divide over 2 ranks"):
        placed(heads, (Axis("context", 2),))
    assert any(n.op == "reshard" and "all_to_all" in _how(n) for n in placed(heads, (Axis("context", 3),)).nodes)
    graph = in_dtype(zgraph.trace(nn.Linear(4, 4), torch.rand(4)), DType.f64)
    with pytest.raises(PlacementError, match="no input has a sequence"):
        placed(graph, (Axis("context", 2),))


def test_what_is_searched_is_refused() -> None:
    for options in ("sequence=true", "search=all"):
        with pytest.raises(Exception, match="along context, what is cut is the sequence"):
            parse_recipe(f"place(axis=context,{options})")
