"""Kernels in captured steps: the same numbers, fewer bytes, and what may not be fused is not."""

from copy import deepcopy
from functools import cache
from statistics import median

import pytest
import torch
import transformers as hf
from torch import nn
from torch.utils.checkpoint import checkpoint

import small
import zgraph
from tests.deep import deep
from zgraph.bridge.aten import TO_TORCH
from zgraph.codegen.spec import KernelSpec
from zgraph.cost import simulate_memory
from zgraph.cost.work import work
from zgraph.debugging.known import Reference
from zgraph.debugging.numbers import Numbers
from zgraph.errors import UsageError
from zgraph.estimate.trace import traced
from zgraph.ir import DType, Graph, Node, Phase, TensorType, Value, parse_graph, print_graph, verify
from zgraph.ir.external_ops import (
    LOSS,
    LOSS_BACKWARD,
    MATMUL,
    PROJECTED_LOSS,
    PROJECTED_LOSS_BACKWARD,
    ROTARY,
    ROWS,
    SEED,
)
from zgraph.passes import RECIPES, Context, fusing, make_plan, parse_recipe

from .trained import MODELS, Trained, batch, losses, plain

BEFORE = parse_recipe("canonicalize")
FUSED = parse_recipe("canonicalize,fuse")


def t5() -> nn.Module:
    model = MODELS["t5"]()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        elif isinstance(getattr(module, "dropout", None), float):
            module.dropout = 0.0
    return model


def neox() -> nn.Module:
    """A quarter of each head's columns are turned."""
    config = hf.GPTNeoXConfig(
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=128,
        vocab_size=300,
        use_cache=False,
        bos_token_id=0,
        eos_token_id=0,
    )
    return hf.GPTNeoXForCausalLM(config)


ALL = {**MODELS, "t5": t5, "gpt2": lambda: small.gpt2(dropout=0.0), "neox": neox}
"""Without dropout: kernels draw other numbers."""


@cache
def captured(name: str, dtype: torch.dtype | None) -> Graph:
    torch.compiler.reset()
    inputs = batch(name, 0)
    if dtype is not None:
        inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items()}
    return zgraph.trace(ALL[name]().train(), **inputs, param_dtype=dtype)


class LikelyNumbers(Numbers):
    """Numbers as a model has them when training begins; with others rounding is all that gradients are made of."""

    def tensor(self, kind: TensorType, dtype: DType | None = None) -> torch.Tensor:
        drawn = super().tensor(kind, dtype)
        if not drawn.is_floating_point():
            return drawn
        around = 1.0 if drawn.ndim == 1 else 0.0
        return (torch.randn(drawn.shape, generator=self.random) / 10 + around).to(drawn.dtype)

    def weight(self, kind: TensorType, dtype: DType | None = None) -> torch.Tensor:
        return self.tensor(kind, dtype)


class InSingle(Numbers):
    """The numbers of another graph in fp32."""

    def __init__(self, graph: Graph, numbers: Numbers) -> None:
        super().__init__(graph, numbers.num_ranks, 0, {})
        self.numbers = numbers
        self.rest = {name: single(value) for name, value in numbers.rest.items()}

    def batch(self, number: int) -> dict[str, list]:
        return {name: [single(v) for v in ranks] for name, ranks in self.numbers.batch(number).items()}


def single(value: object) -> object:
    return value.float() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def likely(graph: Graph) -> Reference:
    return Reference(graph, 1, numbers=LikelyNumbers(graph, 1, 0, {}))


def kernels(graph: Graph) -> list[Node]:
    return [node for node in graph.nodes if node.op == ROWS]


def spec(node: Node) -> KernelSpec:
    return KernelSpec.parse(str(node.args[1]))


def fused_and_not(name: str, dtype: torch.dtype | None) -> tuple[Graph, Graph]:
    return BEFORE.run(captured(name, dtype), Context()), FUSED.run(captured(name, dtype), Context())


def floats(reference: Reference, graph: Graph) -> list[torch.Tensor]:
    """Outputs of a graph on one rank, where they are numbers."""
    made = [ranks[0] for ranks in reference.run(graph) if ranks is not None]
    return [t.double() for t in made if isinstance(t, torch.Tensor) and t.is_floating_point()]


@pytest.mark.parametrize("name", ALL)
def test_a_fused_step_gives_the_same_numbers(name):
    graph, fused = fused_and_not(name, None)
    verify(fused)
    assert print_graph(parse_graph(print_graph(fused))) == print_graph(fused)
    assert {n.phase for n in kernels(fused)} == {Phase.forward, Phase.backward}
    reference = likely(graph)
    pairs = list(zip(floats(reference, graph), floats(reference, fused), strict=True))
    largest = max(wanted.norm() for wanted, _ in pairs)
    for wanted, made in pairs:  # some gradients are nothing but rounding
        assert (made - wanted).norm() <= 1e-4 * (wanted.norm() + largest / 1000)


@pytest.mark.parametrize("name", ALL)
def test_matmuls_with_what_follows_them_give_the_same_numbers(name):
    """In the backward the gradient of an activation, and of a bias before it, are the end of the matmul."""
    graph = BEFORE.run(captured(name, None), Context())
    fused = parse_recipe("canonicalize,fuse(matmuls=always)").run(captured(name, None), Context())
    verify(fused)
    joined = [n for n in fused.nodes if n.op == MATMUL]
    assert {n.phase for n in joined} == {Phase.forward, Phase.backward}
    if name in ("vit", "gpt2"):
        assert any("col_sum" in str(n.args[-1]) for n in joined)
    assert not any(n.op == MATMUL for n in FUSED.run(captured(name, None), Context()).nodes), "none on processors"
    reference = likely(graph)
    pairs = list(zip(floats(reference, graph), floats(reference, fused), strict=True))
    largest = max(wanted.norm() for wanted, _ in pairs)
    for wanted, made in pairs:
        assert (made - wanted).norm() <= 1e-4 * (wanted.norm() + largest / 1000)


@pytest.mark.parametrize("name", [deep(n) if n == "t5" else n for n in MODELS])
def test_in_bf16_a_fused_step_is_as_close_to_the_truth(name):
    """Kernels round less often: they are about as far from the same step in fp32 as op by op."""
    graph, fused = fused_and_not(name, torch.bfloat16)
    reference, whole = likely(graph), captured(name, None)
    truths = floats(Reference(whole, 1, numbers=InSingle(whole, reference.numbers)), whole)
    errors = [
        median(float((a - b).norm() / b.norm()) for a, b in zip(floats(reference, g), truths, strict=True))
        for g in (graph, fused)
    ]
    assert errors[1] <= 1.5 * errors[0]


@pytest.mark.parametrize(("name", "factor"), [("llama", 4), deep("gpt2", 4.5)])
def test_the_glue_of_a_block_moves_fewer_bytes(name, factor):
    """The time that one more layer adds, at 1,024 tokens of a model of some width, matmuls and attention left out."""
    found = []
    for recipe in (BEFORE, FUSED):
        one, two = (recipe.run(wide(name, layers), Context()) for layers in (1, 2))
        found.append(glue_bytes(two) - glue_bytes(one))
    assert found[0] >= factor * found[1]


@cache
def wide(name: str, num_layers: int) -> Graph:
    torch.compiler.reset()
    ids = torch.zeros(1, 1024, dtype=torch.int64)
    with torch.device("meta"):
        if name == "llama":
            model = small.llama(1024, num_layers, 1000, num_heads=16, num_kv_heads=4, inner=2816)
        else:
            model = small.gpt2(1024, num_layers, 1000, dropout=0.0)
    return zgraph.trace(model, input_ids=ids, labels=ids, param_dtype=torch.bfloat16)


def glue_bytes(graph: Graph) -> int:
    return sum(w.num_bytes for n in graph.nodes if not (w := work(graph, n)).flop)


def test_norms_keep_one_number_a_row():
    """Of a layer's norms the backward reads the residual and the root, and each is one kernel."""
    fused = FUSED.run(captured("llama", torch.bfloat16), Context())
    specs = [str(spec(n)) for n in kernels(fused) if n.phase is Phase.backward and "layers.0" in n.origin.module]
    norms = [text for text in specs if "col_sum" in text]
    assert len(norms) == 2
    assert all("f32[M,N]" not in text for text in norms)


@pytest.mark.parametrize(("name", "dtype"), [("llama", torch.bfloat16), ("neox", None)])
def test_rotary_embeddings_are_one_op(name, dtype):
    """Of queries and of keys, in the forward and in the backward; they lie as the graph says."""
    graph, fused = fused_and_not(name, dtype)
    turning = [n for n in fused.nodes if n.op == ROTARY]
    assert [n.phase for n in turning] == 4 * [Phase.forward] + 4 * [Phase.backward]
    assert [n.args[4] for n in turning] == 4 * [False] + 4 * [True]
    assert in_attention(graph, "slice_backward", "cat", "neg")
    kept = ["cat"] if name == "neox" else []  # the gradient of queries, keys and values that are one tensor
    assert {n.op for n in in_attention(fused, "slice_backward", "cat", "neg")} == {f"aten.{op}.default" for op in kept}
    for node in turning:
        x, cos, sin = (on_meta(v) for v in node.operands)
        made = torch.ops.zgraph.rotary(x, cos, sin, list(node.args[3]), node.args[4])
        assert made.stride() == on_meta(node.results[0]).stride()


def in_attention(graph: Graph, *ops: str) -> list[Node]:
    return [n for n in graph.nodes if ".layers." in n.origin.module and n.op.split(".")[1] in ops]


def on_meta(value: Value) -> torch.Tensor:
    kind = value.tensor
    made = torch.empty(kind.shape, dtype=TO_TORCH[kind.dtype], device="meta")
    return made if kind.strides is None else torch.empty_strided(kind.shape, kind.strides, device="meta")


def test_repeated_layers_share_their_kernels():
    fused = FUSED.run(captured("llama", None), Context())
    texts = [str(n.args[1]) for n in kernels(fused)]
    assert len(set(texts)) < 0.7 * len(texts)


@pytest.mark.parametrize("stage", [0, 3])
def test_training_with_kernels(stage):
    """The tangent that is never there does not cost a step its backward of the loss only."""
    fused = Trained("llama", stage=stage, kernels="triton")
    assert fused.losses == pytest.approx(plain("llama").losses, rel=1e-5)
    (entry,) = fused.report.entries
    assert kernels(entry.plan.graph)
    assert entry.plan.zero_tangents
    assert fused.predicted == pytest.approx(fused.peak, rel=0.05)


class Long(nn.Module):
    """Rows that no program holds whole, and the approximation of a GELU."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(4, 9000), nn.LayerNorm(9000)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.gelu(self.norm(self.first(x)), approximate="tanh").mean()


def test_long_rows_and_approximations_are_fused():
    torch.compiler.reset()
    graph = BEFORE.run(zgraph.trace(Long(), torch.ones(3, 4)), Context())
    fused = FUSED.run(graph, Context())
    assert not any("gelu" in n.op or "layer_norm" in n.op for n in fused.nodes)
    assert {n.phase for n in kernels(fused) if spec(n).is_looped} == {Phase.forward, Phase.backward}
    reference = likely(graph)
    for wanted, made in zip(floats(reference, graph), floats(reference, fused), strict=True):
        assert (made - wanted).norm() <= 1e-4 * wanted.norm()


class Dropping(nn.Module):
    """A residual, a norm and two dropouts; what comes in and out of the first is returned."""

    def __init__(self, probability: float) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(64, 64), nn.Linear(64, 1)
        self.norm = nn.LayerNorm(64)
        self.probability = probability

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        dropped = nn.functional.dropout(x, self.probability)
        hidden = self.norm(self.first(dropped) + nn.functional.dropout(x, self.probability))
        return self.last(hidden).mean(), dropped.sum()


def test_what_a_dropout_keeps_is_drawn_again_and_not_kept():
    graph = BEFORE.run(captured_dropping(), Context())
    fused = FUSED.run(graph, Context())
    verify(fused)
    assert not any("native_dropout" in n.op for n in fused.nodes)
    assert sum(n.op == SEED for n in fused.nodes) == 2
    read = {v.name for n in fused.nodes if n.phase is Phase.backward for v in n.operands}
    masks = [r for n in fused.nodes for r in n.results if isinstance(r.type, TensorType) and r.type.dtype is DType.bool]
    assert not [m for m in masks if m.name in read]


def captured_dropping() -> Graph:
    torch.compiler.reset()
    return zgraph.trace(Dropping(0.25).train(), torch.ones(96, 64, requires_grad=True))


def test_the_backward_of_a_dropout_keeps_what_the_forward_kept():
    torch.compiler.reset()
    torch.manual_seed(3)
    model = zgraph.compile(Dropping(0.25).train(), kernels="triton")
    results = []
    for seed in (0, 0, 1):
        x = torch.ones(96, 64, requires_grad=True)
        torch.manual_seed(seed)
        _, kept = model(x)
        kept.backward()
        assert x.grad is not None
        share = float((x.grad != 0).float().mean())
        assert share == pytest.approx(0.75, abs=0.03)
        assert torch.allclose(x.grad[x.grad != 0], torch.tensor(1 / 0.75))
        assert kept.item() == pytest.approx(float(x.grad.sum()), rel=1e-5)
        results.append(x.grad)
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


def test_dropouts_computed_again_keep_the_same():
    """Under a budget kernels with dropouts run again, and the losses stay."""
    losses = []
    for recompute in (False, True):
        torch.compiler.reset()
        torch.manual_seed(0)
        model = zgraph.compile(Dropping(0.25).train(), kernels="triton", recompute=recompute)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        losses.append([])
        for step in range(4):
            torch.manual_seed(step)
            loss, _ = model(torch.randn(96, 64, generator=torch.Generator().manual_seed(step), requires_grad=True))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[-1].append(loss.item())
    assert losses[0] == losses[1]


class LossOnly(nn.Module):
    """A model that returns its loss and nothing else."""

    def __init__(self) -> None:
        super().__init__()
        self.model = MODELS["llama"]()

    def forward(self, **inputs: torch.Tensor) -> torch.Tensor:
        return self.model(**inputs).loss


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["f32", "bf16"])
def test_logits_that_are_not_returned_are_never_whole(dtype):
    torch.compiler.reset()
    graph = zgraph.trace(LossOnly(), **batch("llama", 0), param_dtype=dtype)
    before, fused = BEFORE.run(graph, Context()), FUSED.run(graph, Context())
    verify(fused)
    losses = [n for n in fused.nodes if "cross_entropy" in n.op]
    assert [n.op for n in losses] == [PROJECTED_LOSS, PROJECTED_LOSS_BACKWARD]
    assert {work(fused, n).dtype for n in losses} == {"f32" if dtype is None else "bf16"}
    assert whole_logits(before)
    assert not whole_logits(fused)
    reference = likely(before)
    for wanted, made in zip(floats(reference, before), floats(reference, fused), strict=True):
        assert (made - wanted).norm() <= (1e-4 if dtype is None else 6e-2) * wanted.norm()


def whole_logits(graph: Graph) -> list[str]:
    shapes = {r.name: r.type.shape for n in graph.nodes for r in n.results if isinstance(r.type, TensorType)}
    return [name for name, shape in shapes.items() if shape[-2:] in ((96, 300), (48, 300), (300, 96))]


@pytest.mark.parametrize("name", ["llama", "gpt2", "vit"])
def test_logits_that_are_returned_are_all_that_is_as_large(name):
    fused = FUSED.run(captured(name, torch.bfloat16), Context())
    assert [n.op for n in fused.nodes if "cross_entropy" in n.op] == [LOSS, LOSS_BACKWARD]
    assert not any(n.op.startswith(("aten._log_softmax", "aten.nll_loss")) for n in fused.nodes)
    made = [r.type for n in fused.nodes for r in n.results if isinstance(r.type, TensorType)]
    assert not {t.shape[-2:] for t in made if t.dtype is DType.f32} & {(96, 300), (48, 300)}


class Classes(nn.Module):
    """A loss of logits in their own dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(16, 32)

    def forward(self, x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(self.last(x), target)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_loss_has_the_dtype_of_its_logits(dtype):
    torch.compiler.reset()
    model, target = Classes().to(dtype), torch.arange(8)
    x = torch.randn(8, 16, generator=torch.Generator().manual_seed(0)).to(dtype)
    expected = model(x, target)
    (wanted,) = torch.autograd.grad(expected, model.last.bias)
    fused = zgraph.compile(model, kernels="triton")
    loss = fused(x, target)
    loss.backward()
    (entry,) = zgraph.report(fused).entries
    assert any(n.op == LOSS for n in entry.plan.graph.nodes)
    assert loss.dtype is dtype
    tolerance = {"rtol": 1e-2, "atol": 1e-3} if dtype is torch.bfloat16 else {"rtol": 1e-12, "atol": 1e-15}
    assert torch.allclose(loss, expected, **tolerance)
    assert torch.allclose(model.last.bias.grad, wanted, **tolerance)


def test_training_on_the_loss_alone():
    found = []
    for kernels_of in ("aten", "triton"):
        torch.compiler.reset()
        torch.manual_seed(0)
        model = zgraph.compile(LossOnly(), kernels=kernels_of)
        found.append(losses(model, (batch("llama", step % 2) for step in range(4))))
    assert found[1] == pytest.approx(found[0], rel=1e-5)
    assert found[0][2] < found[0][0]


def test_fifty_steps_stay_together():
    found = []
    for kernels_of in ("aten", "triton"):
        torch.compiler.reset()
        torch.manual_seed(0)
        model = zgraph.compile(small.llama(32, 1, 61), kernels=kernels_of)
        words = (torch.randint(61, (2, 16), generator=torch.Generator().manual_seed(step)) for step in range(50))
        found.append(losses(model, ({"input_ids": ids, "labels": ids} for ids in words)))
    assert found[1] == pytest.approx(found[0], rel=1e-4)


def test_a_budget_and_kernels_go_together():
    roomy = Trained("llama", kernels="triton")
    tight = Trained("llama", int(0.95 * roomy.predicted), kernels="triton")
    assert tight.losses == roomy.losses
    assert tight.peak <= int(0.95 * roomy.predicted) + 64


def test_options_that_mean_nothing():
    with pytest.raises(UsageError, match='kernels must be "auto", "aten", "triton" or "inductor"'):
        zgraph.compile(nn.Linear(2, 2), kernels="cuda")
    with pytest.raises(UsageError, match="put fuse in it"):
        zgraph.compile(nn.Linear(2, 2), kernels="triton", passes=RECIPES[3])
    assert "fuse" in fusing(RECIPES[0])


class Marked(nn.Module):
    """A region that the user wants computed again, with a norm and a dropout in it."""

    def __init__(self, probability: float) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(16, 64), nn.LayerNorm(64), nn.Linear(64, 1)
        self.probability = probability

    def body(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.dropout(torch.tanh(self.norm(self.first(x))), self.probability)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(checkpoint(self.body, x, use_reentrant=False)).mean()


def gradients(model: nn.Module, *inputs: dict[str, torch.Tensor]) -> list[float]:
    """Losses and norms of gradients, one call after the other."""
    found = []
    for kwargs in inputs:
        loss = model(**kwargs)
        loss = loss if isinstance(loss, torch.Tensor) else loss.loss
        loss.backward()
        found += [loss.item(), *(float(p.grad.norm()) for p in model.parameters())]
        model.zero_grad()
    return found


def test_regions_that_the_user_marked():
    x = {"x": torch.randn(8, 16, generator=torch.Generator().manual_seed(0))}
    found = []
    for options in ({"kernels": "aten"}, {"kernels": "triton"}):
        torch.compiler.reset()
        torch.manual_seed(0)
        found.append(gradients(zgraph.compile(Marked(0.0), **options), x))
    assert found[1] == pytest.approx(found[0], rel=1e-4, abs=1e-6)
    torch.compiler.reset()
    graph = zgraph.compile(Marked(0.25).train(), kernels="triton")
    gradients(graph, x)
    (entry,) = zgraph.report(graph).entries
    assert sum(n.op == SEED for n in entry.plan.graph.nodes) == 1, "what is computed again keeps the same"


class Turning(nn.Module):
    """Rotary embeddings whose angles are learned."""

    def __init__(self) -> None:
        super().__init__()
        self.angles = nn.Parameter(torch.randn(5, 8))
        self.query = nn.Linear(24, 24)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        query = self.query(x).view(2, 5, 3, 8).transpose(1, 2)
        low, high = query[..., :4], query[..., 4:]
        turned = query * self.angles.cos()[None, None] + torch.cat([-high, low], -1) * self.angles.sin()[None, None]
        return turned.square().sum() + turned[..., 0].sum()


def test_angles_that_are_learned_get_their_gradients():
    torch.compiler.reset()
    torch.manual_seed(0)
    graph = zgraph.trace(Turning(), torch.randn(2, 5, 24))
    before, fused = BEFORE.run(graph, Context()), FUSED.run(graph, Context())
    verify(fused)
    assert [n.phase for n in fused.nodes if n.op == ROTARY] == [Phase.backward]  # the forward keeps what is inside
    reference = likely(before)
    for wanted, made in zip(floats(reference, before), floats(reference, fused), strict=True):
        assert (made - wanted).norm() <= 1e-5 * wanted.norm()


@pytest.mark.parametrize("dynamic", [None, deep(True)])
def test_sizes_that_change(dynamic):
    calls = [
        {"input_ids": ids, "labels": ids}
        for ids in (
            torch.randint(50, shape, generator=torch.Generator().manual_seed(1)) for shape in ((2, 12), (3, 17))
        )
    ]
    torch.manual_seed(0)
    eager = small.llama(32, 1, 50)
    model = zgraph.compile(deepcopy(eager), kernels="triton", dynamic=dynamic)
    assert gradients(model, *calls) == pytest.approx(gradients(eager, *calls), rel=1e-4, abs=1e-6)
    assert all(kernels(entry.plan.graph) for entry in zgraph.report(model).entries)
    assert all(sum(n.op == ROTARY for n in entry.plan.graph.nodes) == 4 for entry in zgraph.report(model).entries)


def test_what_is_computed_again_is_computed_where_it_is_read():
    """With kernels as without: of layers under checkpoint no more than one is there at a time."""
    ids = torch.zeros(8, 64, dtype=torch.long)
    model = small.llama(64, 4, 61)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    inputs = {"input_ids": ids, "labels": ids}
    run = traced(model.train(), inputs, parse_recipe(RECIPES[3]), hardware="h100", num_ranks=8)
    fused = parse_recipe(fusing(RECIPES[3])).run(run.graph("captured"), run.context)
    peaks = (simulate_memory(make_plan(g, only_step=True), {}).peak.total_bytes for g in (fused, run.graph()))
    assert next(peaks) <= next(peaks)
