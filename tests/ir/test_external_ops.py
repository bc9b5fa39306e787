"""Each fact of the table of external ops is what torch does; each kind of rule has its rule."""

from typing import get_args

import pytest
import torch
from torch.utils.flop_counter import flop_registry

from zgraph.bridge.aten import effects, resolve
from zgraph.codegen import library as _kernels  # noqa: F401 - registers the ops
from zgraph.cost import CostTable, hardware
from zgraph.cost.device_workspace import _RULES as DEVICE_RULES
from zgraph.cost.work import _RULES as WORK_RULES
from zgraph.cost.work import work
from zgraph.cost.workspace import _RULES as SCRATCH_RULES
from zgraph.ir import Arg, DType, Graph, Node, TensorType, Value
from zgraph.ir.external_ops import CAST, EXTERNAL_OPS, DeviceScratch, Elements, Facts, Indexing, Scratch, Work, facts
from zgraph.ir.names import refusal

X = torch.arange(1, 13).reshape(3, 4)
"""Twelve numbers, each once, of a matrix that every op of elements takes."""

I = torch.tensor([[0, 2], [1, 0]])  # noqa: E741 - indices of both rows and columns

ARGUMENTS = {
    "aten._reshape_alias.default": (X, [4, 3], [3, 1]),
    "aten._unsafe_view.default": (X, [2, 6]),
    "aten.as_strided.default": (X, [2, 2], [4, 1]),
    "aten.cat.default": ([X, -X],),
    "aten.chunk.default": (X, 2),
    "aten.constant_pad_nd.default": (X, [1, 1], 99),
    "aten.copy.default": (X, -X),
    "aten.expand.default": (X, [2, 3, 4]),
    "aten.flip.default": (X, [1]),
    "aten.gather.default": (X, 1, I),
    "aten.index.Tensor": (X, [None, I]),
    "aten.index_select.default": (X, 1, I[0]),
    "aten.masked_fill.Scalar": (X, X > 5, 99),
    "aten.masked_fill.Tensor": (X, X > 5, torch.tensor(99)),
    "aten.permute.default": (X, [1, 0]),
    "aten.repeat.default": (X, [2, 1]),
    "aten.reshape.default": (X, [6, 2]),
    "aten.roll.default": (X, [1], [0]),
    "aten.select.int": (X, 1, 2),
    "aten.slice.Tensor": (X, 1, 1, 3),
    "aten.split.Tensor": (X, 2),
    "aten.split_with_sizes.default": (X, [1, 2]),
    "aten.squeeze.dim": (X[None], 0),
    "aten.squeeze.dims": (X[None], [0]),
    "aten.stack.default": ([X, -X],),
    "aten.to.dtype": (X, torch.int32),
    "aten.transpose.int": (X, 0, 1),
    "aten.unfold.default": (X, 0, 2, 1),
    "aten.unsqueeze.default": (X, 1),
    "aten.view.default": (X, [4, 3]),
    "aten.where.ScalarOther": (X > 5, X, 99),
    "aten.where.ScalarSelf": (X > 5, 99, X),
    "aten.where.self": (X > 5, X, -X),
}
"""Arguments of ops of elements, where they are not `X` alone."""

A, B = torch.ones(4, 4), torch.ones(4, 4) * 2
TURN = (torch.ones(1, 1, 4, 4), torch.ones(1, 1, 4, 4), torch.ones(1, 1, 4, 4) * 2, [0, 1, 2, 3], False)

MORE = {
    "aten.bmm.default": (B[None],),
    "aten.clone.default": (),
    "aten.neg.default": (),
    "aten.select_backward.default": ([4, 2, 4], 1, 1),
    "aten.slice_backward.default": ([4, 8], 1, 0, 4, 1),
    "aten.sum.default": (),
    "aten.sum.dim_IntList": ([1],),
    "zgraph.rotary.default": TURN[1:],
    CAST: (),
}
"""Arguments behind the first of ops that may be zero; a matrix where nothing is said."""


def rows(column: str) -> list:
    return [pytest.param(row, id=row.name) for row in EXTERNAL_OPS.values() if getattr(row, column)]


def call(row: Facts) -> tuple[tuple, list[torch.Tensor]]:
    args = ARGUMENTS.get(row.name, (X,))
    made = resolve(row.name)(*args)
    return args, list(made) if isinstance(made, list | tuple) else [made]


def numbers(*tensors: torch.Tensor) -> set[int]:
    return {int(n) for t in tensors for n in t.flatten()}


@pytest.mark.parametrize("row", rows("elements"))
def test_elements_are_from_where_the_row_says(row):
    args, made = call(row)
    found = numbers(*made)
    match row.elements:
        case "itself" | "reshaped" | "copied":
            (result,) = made
            assert result.flatten().tolist() == X.flatten().tolist()
            assert (row.elements == "itself") <= (result.shape == X.shape and result.dtype == X.dtype)
            assert (row.elements == "reshaped") <= (result.dtype == X.dtype)
        case "chosen":
            assert found <= numbers(X)
        case "padded":
            assert len(found - numbers(X)) == 1
        case "source":
            assert found == numbers(-X)
        case "joined":
            assert found == numbers(*args[0])
        case "either":
            condition, one, other = args
            assert torch.equal(made[0], torch.where(condition, one, other))
        case "filled":
            source, condition, number = args
            assert torch.equal(made[0], torch.where(condition, number, source))
        case _:
            pytest.fail(f"nothing is known of {row.elements}")


def zeros_like_all(row: Facts, first: torch.Tensor, args: tuple) -> bool:
    return not resolve(row.name)(first, *args).any()


@pytest.mark.parametrize("row", rows("zero"))
def test_results_are_zero_where_the_row_says(row):
    rest = MORE.get(row.name, (B if "Scalar" not in row.name else 2.0,))
    first = TURN[0] if row.name.startswith("zgraph.rotary") else A[None] if "bmm" in row.name else A
    assert not zeros_like_all(row, first, rest)
    if row.zero == "all":
        assert not zeros_like_all(row, first * 0, rest)
        assert not zeros_like_all(row, first, (rest[0] * 0,))
        assert zeros_like_all(row, first * 0, (rest[0] * 0,))
    else:
        assert zeros_like_all(row, first * 0, rest)
        assert row.zero == "first" or zeros_like_all(row, first, (rest[0] * 0,))


@pytest.mark.parametrize("row", rows("commutes"))
def test_operands_change_places_where_the_row_says(row):
    a, b = torch.randn(3), torch.randn(3)
    assert torch.equal(resolve(row.name)(a, b), resolve(row.name)(b, a))


@pytest.mark.parametrize("row", rows("options_in_types"))
def test_options_are_what_types_say(row):
    """Dtype, device and layout are in a type; whether a copy waits is no matter of numbers."""
    said = {"dtype", "layout", "device", "pin_memory", "non_blocking", "memory_format"}
    assert {a.name for a in resolve(row.name)._schema.arguments if a.kwarg_only} <= said


@pytest.mark.parametrize("row", rows("keeps_rows"))
def test_what_keeps_rows_is_a_view(row):
    args, _ = call(row)
    assert effects(resolve(row.name), row.name, args, {}, multi=False).views == (0,)


@pytest.mark.parametrize("row", rows("hides_view"))
def test_a_hidden_view_is_in_the_memory_of_its_argument(row):
    (source, *_), (result,) = call(row)
    assert result.untyped_storage().data_ptr() == source.untyped_storage().data_ptr()
    assert all(r.alias_info is None for r in resolve(row.name)._schema.returns)


@pytest.mark.parametrize("row", rows("takes_epilogue"))
def test_the_last_two_operands_of_a_matmul_are_the_matrices(row):
    a, b = torch.randn(2, 3, 4), torch.randn(2, 4, 5)
    if "bmm" not in row.name:
        a, b = a[0], b[0]
    bias = [torch.randn(5)] if row.work == "sum and product" else []
    made = resolve(row.name)(*bias, a, b)
    torch.testing.assert_close(made, a @ b + sum(bias))


ALIKE = {
    "aten._unsafe_view.default": ([3, 4],),
    "aten.expand.default": ([-1, 4],),
    "aten.slice.Tensor": (1, 0, 2**62),
    "aten.view.default": ([-1, 4],),
}


@pytest.mark.parametrize("row", rows("is_first_if_alike"))
def test_a_view_of_the_same_type_is_the_first_operand(row):
    for source in (X, X.t().contiguous().t()):
        try:
            made = resolve(row.name)(source, *ALIKE.get(row.name, ()))
        except RuntimeError:
            continue  # a view that torch refuses
        assert torch.equal(made, source)
        assert made.data_ptr() == source.data_ptr()


@pytest.mark.parametrize("row", rows("undoes_itself"))
def test_a_second_call_undoes_the_first(row):
    rest = () if row.name == "aten.t.default" else (0, 1)
    once = resolve(row.name)(X, *rest)
    twice = resolve(row.name)(once, *rest)
    assert once.shape != X.shape
    assert (twice.data_ptr(), twice.stride()) == (X.data_ptr(), X.stride())
    assert torch.equal(twice, X)


@pytest.mark.parametrize("row", rows("unit"))
def test_the_unit_leaves_the_first_operand(row):
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        source = torch.randn(64).to(dtype)
        assert torch.equal(resolve(row.name)(source, row.unit), source)
        assert not torch.equal(resolve(row.name)(source, row.unit + 1), source)


@pytest.mark.parametrize("row", rows("by_tensor"))
def test_a_number_may_be_a_tensor(row):
    """Bit for bit, in the dtypes and numbers for which ops that run together take it so."""
    for dtype, numbers in ((torch.float32, (0.1, 1e-6, 3, 1e300, -(2**24))), (torch.float64, (0.1, 7))):
        source = torch.randn(257, dtype=dtype)
        for number in numbers:
            made = resolve(row.by_tensor)(source, torch.tensor(number, dtype=dtype))
            assert torch.equal(resolve(row.name)(source, number), made)


@pytest.mark.parametrize("row", rows("opens_files"))
def test_what_opens_files_is_refused(row):
    assert "opens files" in refusal(f"{row.name}.default")


QUERY = torch.randn(2, 3, 8, 16)
IMAGE, WEIGHT, CONVOLVED = torch.randn(2, 3, 9, 9), torch.randn(4, 3, 3, 3), torch.randn(2, 4, 7, 7)
OPTIONS = (None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1)
PRODUCT = (torch.randn(4, 5), torch.randn(5, 6))

EVEN = torch.randn(2, 8, 8, 16)
"""As many heads as tokens: torch's counter takes these operands for [batch, heads, tokens, size], whatever they are."""

BY_TOKENS = (None, None, 8, 8, 0.0, False)

OPERANDS = {
    "product": PRODUCT,
    "sum and product": (torch.randn(6), *PRODUCT),
    "attention by tokens": (EVEN, EVEN, EVEN, *BY_TOKENS),
    "attention by tokens backward": (EVEN,) * 5 + (EVEN[..., 0], *BY_TOKENS),
    "attention": (QUERY, QUERY, QUERY),
    "attention backward": (QUERY, QUERY, QUERY, QUERY),
    "convolution": (IMAGE, WEIGHT, *OPTIONS),
    "convolution backward": (CONVOLVED, IMAGE, WEIGHT, *OPTIONS, [True, True, False]),
}
"""Arguments of an op whose FLOP are counted so; those of a batch have one more dim."""


def value(arg: object) -> Arg:
    return Value("x", TensorType(DType.f32, tuple(arg.shape))) if isinstance(arg, torch.Tensor) else arg


def packet(op: str) -> torch._ops.OpOverloadPacket | None:
    """The op, None where this torch has none of that name."""
    namespace, name, *_ = op.split(".")
    return getattr(getattr(torch.ops, namespace), name, None)


ARGUMENTS_OF = {
    "aten._scaled_mm": (*PRODUCT, torch.ones(()), torch.ones(())),
    "aten._efficient_attention_forward": (EVEN, EVEN, EVEN, None, None, None, 8, 8, 0.0, 0, True),
    "aten._efficient_attention_backward": (EVEN,) * 4 + (None, EVEN, None, None, 8, 8, EVEN[..., 0], 0.0, X, X, 0),
}
"""Arguments of an op that takes others than those that are counted like it."""


def flop(op: str, args: tuple, made: object) -> object:
    """FLOP, by the cost table, of an op that has made this of these arguments."""
    results = tuple(value(t) for t in (made if isinstance(made, tuple | list) else (made,)) if torch.is_tensor(t))
    name = op if op.count(".") == 2 else f"{op}.{packet(op).overloads()[0]}"
    held = tuple(tuple(map(value, a)) if isinstance(a, list) else value(a) for a in args)
    return work(Graph("g"), Node(name, held, results)).flop


@pytest.mark.parametrize("row", [p for p in rows("work") if packet(p.values[0].name) in flop_registry])
def test_flop_are_those_that_torch_counts(row):
    args = ARGUMENTS_OF.get(row.name) or OPERANDS[row.work]
    if "bmm" in row.name:
        args = tuple(t[None].expand(2, *t.shape) for t in args)
    made = (IMAGE, WEIGHT, None) if row.work == "convolution backward" else CONVOLVED
    options = {}
    if row.work.startswith("attention by tokens"):
        names = [a.name for a in packet(row.name).default._schema.arguments]
        args, options = (), dict(zip((n.rstrip("_") for n in names), args, strict=False))
    given = args or tuple(options.values())
    assert flop(row.name, given, made) == flop_registry[packet(row.name)](*args, **options, out_val=made)


def test_every_op_that_torch_counts_has_a_rule_or_is_refused():
    """Higher-order ops are in no graph."""
    for op in flop_registry:
        if isinstance(op, torch._ops.OpOverloadPacket):
            assert all(facts(f"{op}.{overload}").work for overload in op.overloads()), op
        else:
            assert refusal(str(op)), op


def test_a_transposed_convolution_counts_its_input():
    options = (None, [2, 2], [0, 0], [1, 1], True, [0, 0], 1)
    weight = torch.randn(3, 4, 3, 3)
    made = torch.ops.aten.convolution(IMAGE, weight, *options)
    for name in ("aten.convolution", "aten._convolution", "aten.convolution_overrideable"):
        counted = flop_registry[packet(name)](IMAGE, weight, *options, out_val=made)
        assert flop(name, (IMAGE, weight, *options), made) == counted
    args, back = (made, IMAGE, weight, *options, [True, True, False]), (IMAGE, weight, None)
    counted = flop_registry[packet("aten.convolution_backward")](*args, out_val=back)
    assert flop("aten.convolution_backward", args, back) == counted


def test_a_group_multiplies_its_own_rows_columns_or_inner_dim():
    """Ragged rows, ragged columns, ragged inner dims, and a batch, by the numbers that each result is a sum of."""
    tokens, inner, columns, groups = 12, 5, 6, 3
    a, b = torch.randn(tokens, inner), torch.randn(inner, tokens)
    stack, other = torch.randn(groups, columns, inner), torch.randn(groups, inner, columns)
    made = 2 * tokens * inner * columns
    for name in ("aten._grouped_mm", "aten._scaled_grouped_mm", "aten._scaled_grouped_mm_v2"):
        assert flop(name, (a, other), torch.randn(tokens, columns)) == made
        assert flop(name, (stack, b), torch.randn(columns, tokens)) == made
        assert flop(name, (a.t(), torch.randn(tokens, columns)), torch.randn(groups, inner, columns)) == made
        assert flop(name, (stack, other), torch.randn(groups, columns, columns)) == 2 * stack.numel() * columns


def test_packed_products_lists_and_vectors_count_what_they_multiply():
    rows, weight = torch.randn(2, 4, 5), torch.randn(6, 5)
    for name in ("aten.linear", "aten._weight_int8pack_mm", "aten._weight_int4pack_mm", "aten._mixed_dtypes_linear"):
        assert flop(name, (rows, weight), torch.randn(2, 4, 6)) == 2 * 2 * 4 * 5 * 6
    pairs = ([PRODUCT[0], X.float()], [PRODUCT[1], X.float().t()])
    assert flop("aten._foreach_mm", pairs, [PRODUCT[0], X]) == 2 * 4 * 5 * 6 + 2 * 3 * 4 * 3
    assert flop("aten.mv", (X, X[0]), X[:, 0]) == flop("aten.addmv", (X[:, 0], X, X[0]), X[:, 0]) == 2 * 12
    assert flop("aten.dot", (X[0], X[1]), X[0, 0]) == 2 * 4
    assert flop("aten._int_mm", (X, X.t()), X) == 2 * 3 * 4 * 3


def test_a_product_in_float8_counts_its_matrices():
    a, b = torch.randn(16, 32), torch.randn(32, 48)
    scales = torch.ones(16, 1), torch.ones(1, 48)
    made = torch.randn(16, 48)
    assert flop("zgraph.float8_mm", (a, scales[0], b, scales[1]), made) == 2 * 16 * 32 * 48
    assert flop("zgraph.float8_mm", (a, torch.ones(()), b, torch.ones(())), made) == 2 * 16 * 32 * 48


def test_fp8_is_at_the_rate_of_fp8_and_its_bytes():
    """The scales count as well."""
    left, right = (Value(n, TensorType(DType.f8e4m3, (4096, 4096))) for n in "ab")
    scale = Value("s", TensorType(DType.f32, ()))
    made = Value("y", TensorType(DType.bf16, (4096, 4096)))
    node = Node("aten._scaled_mm.default", (left, right, scale, scale), (made,))
    found = work(Graph("g"), node)
    assert (found.flop, found.dtype) == (2 * 4096**3, "f8e4m3")
    assert found.num_bytes == (1 + 1 + 2) * 4096**2 + 2 * 4
    costs, device = CostTable(hardware=hardware("h100")), hardware("h100").device
    us = costs.roofline_us(Graph("g"), node, {})
    share = device.sustained * 4096 / (4096 + device.matmul_half_dim)
    assert us == pytest.approx(4 + 1e6 * (2 * 4096**3 / share + 1e10) / 1.4e15)


def test_a_dtype_without_a_rate_has_that_of_its_like():
    h100, a100, v100 = (hardware(name).device for name in ("h100", "a100-80", "v100"))
    assert h100.rate("f8e5m2") == h100.rate("i8") == h100.rate("f8e4m3") > h100.rate("bf16")
    assert a100.rate("i8") == a100.rate("bf16")
    assert v100.rate("bf16") == v100.rate("f32") < v100.rate("f16"), "it has no units for bf16"


CAUSAL = {
    "aten._scaled_dot_product_flash_attention.default": lambda causal: (QUERY,) * 3 + (0.0, causal, False),
    "aten._scaled_dot_product_efficient_attention.default": lambda causal: (QUERY,) * 3 + (None, True, 0.0, causal),
    "aten._scaled_dot_product_cudnn_attention.default": lambda causal: (QUERY,) * 3 + (None, True, 0.0, causal),
    "aten._efficient_attention_forward.default": (
        lambda causal: (QUERY,) * 3 + (None, None, None, None, None, 0.0, int(causal), True)
    ),
}


@pytest.mark.parametrize("name", CAUSAL)
def test_a_causal_kernel_does_half_and_no_other(name):
    """Whether it keeps the logarithms of its sums for the backward or not."""
    whole, half = (flop(name, CAUSAL[name](causal), QUERY) for causal in (False, True))
    assert whole == 2 * half
    assert whole in (4 * 2 * 3 * 8 * 8 * 16, 4 * 2 * 3 * 8 * 3 * 16)


def test_every_kind_of_rule_has_its_rule():
    assert WORK_RULES.keys() == set(get_args(Work))
    assert SCRATCH_RULES.keys() == set(get_args(Scratch))
    assert DEVICE_RULES.keys() == set(get_args(DeviceScratch))
    assert {row.indexing for row in EXTERNAL_OPS.values() if row.indexing} == set(get_args(Indexing))
    assert {row.elements for row in EXTERNAL_OPS.values() if row.elements} == set(get_args(Elements))


def test_every_row_names_an_op_and_says_something():
    for name, row in EXTERNAL_OPS.items():
        assert row != Facts(name)
        packet(name)
        if name.count(".") == 2:
            resolve(name)


def test_an_overload_has_its_own_row_or_that_of_all():
    assert facts("aten.mm.default").takes_epilogue
    assert facts("aten.mm.dtype").work == "product"
    assert not facts("aten.mm.dtype").takes_epilogue
    assert facts("aten.erfinv.default") == facts("wait") == Facts("")
