"""What `fuse` makes of random programs: valid, the same numbers, and no more kernels or bytes than it once made."""

from __future__ import annotations

from dataclasses import replace
from random import Random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.deep import DEEP
from zgraph.cost import CostTable, hardware
from zgraph.debugging.known import Reference
from zgraph.ir import DType, Graph, Phase, parse_graph, verify
from zgraph.ir.external_ops import COMPILED, DROPOUT, MATMUL, ROWS, SEED, facts
from zgraph.passes import Context
from zgraph.passes.dce import DeadCode
from zgraph.passes.fuse import Fuse, candidates
from zgraph.passes.fusion.rows import FOREIGN

CONTEXT = Context()

OPS = """op aten._softmax.default
op aten._to_copy.default
op aten.add.Tensor
op aten.addmm.default
op aten.alias.default views(0)
op aten.cumsum.default
op aten.expand.default views(0)
op aten.mm.default
op aten.mul.Tensor
op aten.native_dropout.default random multi
op aten.native_dropout_backward.default
op aten.relu.default
op aten.relu_.default writes(0)
op aten.sigmoid.default
op aten.sub.Tensor
op aten.sum.dim_IntList
op aten.t.default views(0)
op aten.tanh.default
op aten.view.default views(0)
"""


def program(*lines: str) -> Graph:
    """A graph of these lines, with the ops that they use."""
    text = "\n".join(lines) + "\n"
    used = [line for line in OPS.splitlines(keepends=True) if f"{line.split()[1]}(" in text]
    graph = parse_graph('graph "g"\n' + "".join(used) + text)
    verify(graph)
    return graph


class Sketch:
    """A random program over rows of 8 or 16 columns: forward and backward, with several readers of most values."""

    def __init__(self, seed: int) -> None:
        self.dice = Random(seed)
        self.lines: list[str] = []
        self.kinds: dict[str, tuple[str, tuple[int, ...]]] = {}
        self.returned: list[str] = []
        self.masks: list[str] = []
        self.phase, self.checkpoint = "fwd", 0
        self.narrow = self.dice.choice(["f32", "bf16"])

    def graph(self) -> Graph:
        for number, shape in enumerate([(6, 8), (6, 8), (2, 3, 8), (8,), (6, 1), ()]):
            self.lines.append(f"input %x{number}: f32{list(shape)}")
            self.kinds[f"x{number}"] = "f32", shape
        self.lines += ["input %w: f32[8, 8]", "input %t: f32[6, 8]"]
        self.lines[-1] = self.lines[-1].replace("input", "tangent")
        for _ in range(self.dice.randint(4, 14)):
            self.op()
        self.output((6, 8))
        forward, self.phase, self.checkpoint = list(self.kinds), "bwd", 0
        self.kinds["t"] = "f32", (6, 8)
        for _ in range(self.dice.randint(0, 14)):
            self.op()
        made = [name for name in self.kinds if name not in forward and name != "t"]
        outputs = [f"return fwd output %{name}" for name in self.returned]
        outputs += [f"return bwd output %{name}" for name in made[-1:] + made[:-1:3]]
        return DeadCode().run(program(*self.lines, *outputs), CONTEXT)

    def output(self, shape: tuple[int, ...]) -> None:
        fitting = [n for n, kind in self.kinds.items() if kind == ("f32", shape) and n.startswith("v")]
        if not fitting:
            fitting = [self.add("aten.tanh.default", "(%x0)", "f32", shape)]
        made = [n for n in self.kinds if n.startswith("v")]
        self.returned = list(dict.fromkeys([fitting[-1], *self.dice.sample(made, min(2, len(made)))]))

    def add(self, op: str, call: str, dtype: str, shape: tuple[int, ...], strides: str = "") -> str:
        name = f"v{len(self.lines)}"
        mark = f" checkpoint={self.checkpoint}" if self.checkpoint and self.phase == "fwd" else ""
        dims = ", ".join(map(str, shape)) + strides
        self.lines.append(f"{self.phase} %{name}: {dtype}[{dims}] = {op}{call}{mark}")
        self.kinds[name] = dtype, shape
        return name

    def pick(self, *shapes: tuple[int, ...], dtype: str = "") -> str | None:
        """A value, late ones the more often; any shape where none is asked for."""
        found = [n for n, (d, s) in self.kinds.items() if (not shapes or s in shapes) and (not dtype or d == dtype)]
        if not found:
            return None
        return self.dice.choice(found[-3:] if self.dice.random() < 0.6 else found)

    def op(self) -> None:
        if self.dice.random() < 0.1:
            self.checkpoint = self.dice.choice([0, 1, 2])
        kinds = [self.unary] * 4 + [self.binary] * 5 + [self.cast, self.sum, self.view, self.view, self.softmax]
        self.dice.choice([*kinds, self.matmul, self.matmul, self.foreign, self.dropout])()

    def unary(self) -> None:
        name = self.pick((6, 8), (2, 3, 8), (6, 1), (8, 6)) or "x0"
        op = self.dice.choice(["tanh", "sigmoid", "relu"])
        self.add(f"aten.{op}.default", f"(%{name})", *self.kinds[name])

    def binary(self) -> None:
        name = self.pick((6, 8), (2, 3, 8)) or "x0"
        dtype, shape = self.kinds[name]
        others = [shape, (8,), ()] + ([(6, 1)] if shape == (6, 8) else [])
        other = self.pick(self.dice.choice(others), dtype=dtype) or self.pick(shape, dtype=dtype)
        pair = [name, other] if self.dice.random() < 0.7 else [other, name]
        op = self.dice.choice(["add", "mul", "sub"])
        self.add(f"aten.{op}.Tensor", "(" + ", ".join(f"%{n}" for n in pair) + ")", dtype, shape)

    def cast(self) -> None:
        name = self.pick((6, 8), (2, 3, 8)) or "x0"
        dtype, shape = self.kinds[name]
        to = self.narrow if dtype == "f32" else "f32"
        if to != dtype:
            self.add("aten._to_copy.default", f"(%{name}, dtype={to})", to, shape)

    def sum(self) -> None:
        name = self.pick((6, 8)) or "x0"
        dim, shape = self.dice.choice([(1, (6, 1)), (0, (1, 8))])
        self.add("aten.sum.dim_IntList", f"(%{name}, [{dim}], true)", self.kinds[name][0], shape)

    def softmax(self) -> None:
        name = self.pick((6, 8), (2, 3, 8)) or "x0"
        dtype, shape = self.kinds[name]
        self.add("aten._softmax.default", f"(%{name}, {len(shape) - 1}, false)", dtype, shape)

    def view(self) -> None:
        if (name := self.pick((6, 1))) and self.dice.random() < 0.3:
            made = self.add("aten.expand.default", f"(%{name}, [6, 8])", self.kinds[name][0], (6, 8), " | 1, 0")
            dtype, shape = self.kinds.pop(made)
            other = self.pick((6, 8), dtype=dtype) or "x0"
            if self.kinds[other][0] == dtype:
                self.add("aten.mul.Tensor", f"(%{other}, %{made})", dtype, shape)
            return
        name = self.pick((6, 8), (2, 3, 8), (8, 6)) or "x0"
        dtype, shape = self.kinds[name]
        if self.dice.random() < 0.2:
            self.add("aten.alias.default", f"(%{name})", dtype, shape)
            return
        to = self.dice.choice([s for s in [(6, 8), (2, 3, 8), (2, 3, 8), (6, 8), (8, 6)] if s != shape])
        self.add("aten.view.default", f"(%{name}, {list(to)})", dtype, to)

    def matmul(self) -> None:
        name = self.pick((6, 8), dtype="f32") or "x0"
        if self.dice.random() < 0.5:
            self.add("aten.mm.default", f"(%{name}, %w)", "f32", (6, 8))
        else:
            made = self.add("aten.addmm.default", f"(%x3, %{name}, %w)", "f32", (6, 8))
            if self.dice.random() < 0.5:
                self.add("aten.relu.default", f"(%{made})", "f32", (6, 8))

    def foreign(self) -> None:
        name = self.pick((6, 8), (2, 3, 8)) or "x0"
        self.add("aten.cumsum.default", f"(%{name}, 0)", *self.kinds[name])

    def dropout(self) -> None:
        name = self.pick((6, 8), dtype="f32") or "x0"
        if self.phase == "fwd":
            made = self.add("aten.native_dropout.default", f"(%{name}, 0.25, true)", "f32", (6, 8))
            self.lines[-1] = self.lines[-1].replace(" =", f", %m{made}: bool[6, 8] =", 1)
            self.masks.append(f"m{made}")
        elif self.masks:
            mask = self.dice.choice(self.masks)
            self.add("aten.native_dropout_backward.default", f"(%{name}, %{mask}, 1.3333333333333333)", "f32", (6, 8))


def check(graph: Graph, fuse: Fuse, context: Context = CONTEXT) -> Graph:
    """The graph fused: valid, and in float64 the same numbers, whoever compiles the kernels."""
    fused = fuse.run(graph, context)
    verify(fused)
    reference = Reference(graph, 1, dtype=DType.f64)
    kernels = fused.with_nodes([replace(n, op=ROWS) if n.op == COMPILED else n for n in fused.nodes])
    run = replace(kernels, foreign={**kernels.foreign, ROWS: FOREIGN[ROWS]})
    for wanted, got in zip(reference.raw, reference.run(run), strict=True):
        for a, b in zip(wanted or (), got or (), strict=True):
            torch.testing.assert_close(b, a, rtol=1e-6, atol=1e-6)
    return fused


def measured(graph: Graph, dice: Random) -> Context:
    """A machine on which some way to run each group, any, was the fastest."""
    groups = {}
    for found in candidates(graph, CONTEXT):
        us = dict.fromkeys(found.nodes, 2.0)
        groups[found.key] = {**us, dice.choice(sorted(us)): 1.0}
    return Context(costs=CostTable(hardware=hardware("cpu"), per_host=1, groups=groups))


@settings(max_examples=2000 if DEEP else 40, deadline=None)
@given(seed=st.integers(0, 1 << 32), matmuls=st.sampled_from(["never", "auto", "always"]))
def test_what_is_fused_gives_the_same_numbers(seed, matmuls):
    check(Sketch(seed).graph(), Fuse(matmuls=matmuls))


@settings(max_examples=2000 if DEEP else 60, deadline=None)
@given(seed=st.integers(0, 1 << 32))
def test_each_way_to_run_a_group_gives_the_same_numbers(seed):
    graph = Sketch(seed).graph()
    check(graph, Fuse(), measured(graph, Random(seed)))


def moved_bytes(graph: Graph) -> int:
    """What all nodes read and write but for views, which move nothing."""
    total = 0
    for node in graph.nodes:
        if not facts(node.op).keeps_rows and node.op != SEED:
            total += sum(int(v.tensor.numel) * v.tensor.dtype.itemsize for v in {*node.operands, *node.results})
    return total


@pytest.mark.parametrize(("matmuls", "most_nodes", "most_bytes"), [("never", 928, 467_172), ("always", 853, 444_348)])
def test_no_more_runs_and_moves_than_once_did(matmuls, most_nodes, most_bytes):
    """Of 150 programs altogether. Fewer is better: lower the numbers then."""
    nodes = num_bytes = 0
    for seed in range(150):
        fused = Fuse(matmuls=matmuls).run(Sketch(seed).graph(), CONTEXT)
        nodes += sum(not facts(n.op).keeps_rows and n.op != SEED for n in fused.nodes)
        num_bytes += moved_bytes(fused)
    assert nodes <= most_nodes
    assert num_bytes <= most_bytes


# --- one decision each ----------------------------------------------------------------------------------------------

X, U, W = "input %x: f32[6, 8]", "input %u: f32[6, 8]", "input %w: f32[8, 8]"
EXP = "fwd %a: f32[6, 8] = aten.tanh.default(%x)"


def kernels(graph: Graph, matmuls: str = "never") -> list[list[str]]:
    """What each kernel writes, in order."""
    fused = check(graph, Fuse(matmuls=matmuls))
    return [[r.name.removesuffix("_rows") for r in n.results] for n in fused.nodes if n.op in (ROWS, MATMUL)]


def test_a_group_is_closed_by_what_writes_to_memory():
    """It would run where its last op stood, behind the write."""
    graph = program(
        X,
        W,
        EXP,
        "fwd %b: f32[6, 8] = aten.sigmoid.default(%a)",
        "fwd %r: f32[6, 8] = aten.relu_.default(%x)",
        "fwd %z: f32[6, 8] = aten.mm.default(%r, %w)",
        "fwd %y: f32[6, 8] = aten.mul.Tensor(%b, %z)",
        "fwd %q: f32[6, 8] = aten.tanh.default(%y)",
        "return fwd output %q",
    )
    fused = Fuse(matmuls="never").run(graph, CONTEXT)
    verify(fused)
    order = [n.op for n in fused.nodes]
    assert order.index(ROWS) < order.index("aten.relu_.default")
    assert kernels(graph) == [["b"], ["q"]]


def test_a_reader_of_what_a_merged_group_reads_joins_it():
    """Although it was another group that had read it, and a third reads something else."""
    graph = program(
        X,
        U,
        "input %s: f32[6, 8]",
        EXP,
        "fwd %b: f32[6, 8] = aten.sigmoid.default(%u)",
        "fwd %o: f32[6, 8] = aten.tanh.default(%s)",
        "fwd %p: f32[6, 8] = aten.sigmoid.default(%o)",
        "fwd %y: f32[6, 8] = aten.add.Tensor(%a, %b)",
        "fwd %z: f32[6, 8] = aten.relu.default(%u)",
        "fwd %q: f32[6, 8] = aten.relu.default(%s)",
        "return fwd output %p",
        "return fwd output %y",
        "return fwd output %z",
        "return fwd output %q",
    )
    assert sorted(map(sorted, kernels(graph))) == [["p", "q"], ["y", "z"]]


@pytest.mark.parametrize(("at", "is_one"), [(2, False), (4, True)])
def test_a_matmul_joins_a_group_where_all_else_that_reads_it_comes_later(at, is_one):
    """The product would be made where the last op of the group stands."""
    lines = [
        "fwd %m: f32[6, 8] = aten.mm.default(%x, %w)",
        "fwd %a: f32[6, 8] = aten.tanh.default(%m)",
        "fwd %y: f32[6, 8] = aten.mul.Tensor(%a, %c)",
        "fwd %z: f32[6, 8] = aten.sigmoid.default(%y)",
    ]
    lines[2] = lines[2] if at == 2 else lines[2].replace("%c", "%u")
    lines.insert(at, "fwd %c: f32[6, 8] = aten.cumsum.default(%m, 0)")
    graph = program(X, U, W, *lines, "return fwd output %z", "return fwd output %c")
    (found,) = [c for c in candidates(graph, CONTEXT) if len(c.group.nodes) > 1]
    assert ("matmul" in found.nodes) == is_one
    check(graph, Fuse(matmuls="always"))


@pytest.mark.parametrize(
    ("more", "output", "is_called"),
    [
        ([], "a", True),
        ([], "m", False),
        (["fwd %c: f32[6, 8] = aten.cumsum.default(%m, 0)"], "c", False),
        (["fwd %c: f32[6, 8] = aten.tanh.default(%a)"], "c", False),
    ],
    ids=["alone", "returned", "read", "with more behind it"],
)
def test_the_librarys_epilogue_is_for_one_rectifier_that_alone_reads_the_product(more, output, is_called):
    graph = program(
        X,
        W,
        "input %b: f32[8]",
        "fwd %m: f32[6, 8] = aten.addmm.default(%b, %x, %w)",
        "fwd %a: f32[6, 8] = aten.relu.default(%m)",
        *more,
        "return fwd output %a",
        *([f"return fwd output %{output}"] if output != "a" else []),
    )
    assert ["library" in c.nodes for c in candidates(graph, CONTEXT)] == [is_called]


def test_a_view_of_a_view_waits_for_the_kernel_too():
    """Neither keeps rows, so that both are for others."""
    graph = program(
        X,
        U,
        W,
        EXP,
        "fwd %v: f32[8, 6] = aten.view.default(%a, [8, 6])",
        "fwd %vv: f32[48] = aten.view.default(%v, [48])",
        "fwd %z: f32[6, 8] = aten.mm.default(%u, %w)",
        "fwd %y: f32[6, 8] = aten.mul.Tensor(%a, %z)",
        "return fwd output %y",
        "return fwd output %vv",
    )
    assert kernels(graph) == [["a", "y"]]


def test_the_seed_of_a_dropout_is_drawn_where_the_backward_alone_makes_its_results():
    graph = program(
        X,
        "tangent %t: f32[6, 8]",
        "fwd %d: f32[6, 8], %m: bool[6, 8] = aten.native_dropout.default(%x, 0.25, true)",
        "fwd %y: f32[6, 8] = aten.tanh.default(%x)",
        "bwd %g: f32[6, 8] = aten.native_dropout_backward.default(%t, %m, 1.3333333333333333)",
        "bwd %h: f32[6, 8] = aten.mul.Tensor(%g, %y)",
        "return fwd output %y",
        "return bwd output %h",
    )
    fused = check(graph, Fuse())
    assert [(n.op, n.phase) for n in fused.nodes if n.op in (SEED, DROPOUT)] == [(SEED, Phase.forward)]


def test_a_matrix_that_an_epilogue_makes_again_is_written_for_the_matmul():
    graph = program(
        "input %x: bf16[6, 8]",
        "input %w: f32[8, 8]",
        "tangent %t: f32[6, 8]",
        "fwd %c: f32[6, 8] = aten._to_copy.default(%x, dtype=f32)",
        "fwd %y: f32[6, 8] = aten.tanh.default(%c)",
        "bwd %m: f32[6, 8] = aten.mm.default(%y, %w)",
        "bwd %g: f32[6, 8] = aten.mul.Tensor(%m, %y)",
        "bwd %h: f32[6, 8] = aten.mul.Tensor(%g, %t)",
        "return fwd output %c",
        "return bwd output %h",
    )
    assert kernels(graph, "always") == [["c", "y"], ["h"]]


def test_vectors_are_no_rows():
    graph = program(
        "input %x: f32[16]",
        "fwd %a: f32[16] = aten.tanh.default(%x)",
        "fwd %y: f32[16] = aten.mul.Tensor(%a, %x)",
        "return fwd output %y",
    )
    assert kernels(graph) == []


@pytest.mark.parametrize(("columns", "is_one"), [(7, False), (8, True)])
def test_shorter_rows_are_no_rows_of_a_model(columns, is_one):
    graph = program(
        f"input %x: f32[6, {columns}]",
        f"fwd %a: f32[6, {columns}] = aten.tanh.default(%x)",
        f"fwd %y: f32[6, {columns}] = aten.mul.Tensor(%a, %x)",
        "return fwd output %y",
    )
    assert kernels(graph) == [["y"]] * is_one


@pytest.mark.parametrize(("depth", "reads"), [(13, "x"), (14, "y")])
def test_a_kernel_of_the_backward_looks_back_over_twelve_ops_and_the_maker_of_what_it_reads(depth, reads):
    ops = [f"fwd %v{n + 1}: f32[6, 8] = aten.tanh.default(%v{n})" for n in range(1, depth - 1)]
    graph = program(
        "input %x: bf16[6, 8]",
        "tangent %t: f32[6, 8]",
        "fwd %v1: f32[6, 8] = aten._to_copy.default(%x, dtype=f32)",
        *ops,
        f"fwd %y: f32[6, 8] = aten.tanh.default(%v{depth - 1})",
        "bwd %g: f32[6, 8] = aten.mul.Tensor(%t, %y)",
        "bwd %h: f32[6, 8] = aten.mul.Tensor(%g, %t)",
        "return fwd output %y",
        "return bwd output %h",
    )
    backward = check(graph, Fuse()).phase_nodes(Phase.backward)
    assert {v.name for n in backward for v in n.operands} == {"t", reads}


def test_a_product_that_is_scaled_takes_no_epilogue():
    graph = program(
        X,
        W,
        "input %b: f32[8]",
        "fwd %m: f32[6, 8] = aten.addmm.default(%b, %x, %w, alpha=2)",
        "fwd %a: f32[6, 8] = aten.relu.default(%m)",
        "return fwd output %a",
    )
    assert [list(c.nodes) for c in candidates(graph, CONTEXT)] == [["aten"]]


def test_a_kernel_of_the_forward_makes_nothing_again():
    graph = program(
        "input %x: bf16[6, 8]",
        "fwd %c: f32[6, 8] = aten._to_copy.default(%x, dtype=f32)",
        "fwd %y: f32[6, 8] = aten.tanh.default(%c)",
        "fwd %z: f32[6, 8] = aten.cumsum.default(%y, 0)",
        "fwd %p: f32[6, 8] = aten.mul.Tensor(%c, %z)",
        "fwd %q: f32[6, 8] = aten.tanh.default(%p)",
        "return fwd output %q",
    )
    *_, last = [n for n in check(graph, Fuse()).nodes if n.op == ROWS]
    assert {v.name for v in last.operands} == {"c", "z"}


def test_a_result_that_needs_a_view_of_sizes_known_at_run_time_only_is_in_no_kernel():
    """A column is written as it is wanted."""
    head = "input %s: int(s0)", "input %x: f32[s0, 3, 8]", "fwd %a: f32[s0, 3, 8] = aten.tanh.default(%x)"
    column = program(*head, "fwd %y: f32[s0, 3, 1] = aten.sum.dim_IntList(%a, [2], true)", "return fwd output %y")
    view = "fwd %v: f32[3*s0, 8] = aten.view.default(%a, [%s, 8])"
    rows = program(*head, view, "fwd %y: f32[3*s0, 8] = aten.tanh.default(%v)", "return fwd output %y")
    for graph, wanted in ((column, [ROWS]), (rows, [n.op for n in rows.nodes])):
        fused = Fuse().run(graph, CONTEXT)
        verify(fused)
        assert [n.op for n in fused.nodes] == wanted


def test_rows_that_are_made_of_columns_and_one_row_are_left():
    """A kernel takes the number of rows from something that it reads."""
    graph = program(
        "input %c: f32[6, 1]",
        "input %r: f32[8]",
        "fwd %a: f32[6, 8] = aten.add.Tensor(%c, %r)",
        "fwd %y: f32[6, 8] = aten.tanh.default(%a)",
        "return fwd output %y",
    )
    assert kernels(graph) == []
