"""Facts about ops that are not zgraph's own: one row an op, all that the compiler knows of it by its name.

Effects are not here: they are read off schemas at capture (`graph.ExternalOp`). Neither are scalar steps, which have a
table of their own (`zgraph.passes.fusion.patterns`). `tests/ir/test_external_ops.py` compares every row with torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

CAST = "aten._to_copy.default"
DROPOUT = "aten.native_dropout.default"
VIEW = "aten.view.default"

RECTIFIED = "aten._addmm_activation.default"
"""A matmul whose bias and rectifier are its end, as the vendor's library has it."""

ROWS = "zgraph.rows.default"
"""The op that runs a kernel over rows: what it reads, and the kernel's text."""

COMPILED = "zgraph.compiled.default"
"""The same, by what Inductor makes of the kernel's steps."""

SEED = "zgraph.seed.default"
"""The op that draws a seed from torch's generator, on the device of what it reads."""

MATMUL = "zgraph.matmul.default"
"""The op that runs a matmul with its epilogue: two matrices, what else it reads, and the epilogue's text."""

ROTARY = "zgraph.rotary.default"
"""The op that turns pairs of columns: what, cosines, sines, the order of dimensions in memory, and whether back."""

FLOAT8 = "zgraph.to_float8.default"
"""The op that casts a matrix to float8: the matrix, the dtype, and the dim that scales are taken along."""

FLOAT8_MM = "zgraph.float8_mm.default"
"""The op that multiplies two matrices in float8: each with its scales, the result's dtype, whether it may be faster."""

INT8 = "zgraph.to_int8.default"
"""The op that makes rows of int8: of what, and how many rows for each."""

INT8_MM = "zgraph.int8_mm.default"
"""The op that multiplies rows of int8: activations, a weight, the scales of both, the result's dtype."""

INT8_LINEAR = "zgraph.int8_linear.default"
"""The op that does both: activations, a weight in int8, its scales, rows of int8 for each of the first, the dtype."""

INT8_EMBEDDING = "zgraph.int8_embedding.default"
"""The op that looks rows of a table in int8 up, in fp32: the table, indices, its scales."""

INT4_LINEAR = "zgraph.int4_linear.default"
"""The op that multiplies rows with a weight of int4 that is not packed: two columns in a byte."""

INT4 = "zgraph.to_int4.default"
"""The op that makes a weight of int4: of what, and how many columns share a scale."""

INT4_PACK = "zgraph.pack_int4.default"
"""The op that brings rows of int4, two in a byte, into the order that the kernel wants."""

INT4_MM = "zgraph.int4_mm.default"
"""The op that multiplies rows with a weight of int4: rows, the weight, its scales, its group, the result's dtype."""

LOSS = "zgraph.cross_entropy.default"
LOSS_BACKWARD = "zgraph.cross_entropy_backward.default"
PROJECTED_LOSS = "zgraph.linear_cross_entropy.default"
PROJECTED_LOSS_BACKWARD = "zgraph.linear_cross_entropy_backward.default"
DISTILLATION = "zgraph.linear_distillation.default"
DISTILLATION_BACKWARD = "zgraph.linear_distillation_backward.default"
TOPK_DISTILLATION = "zgraph.linear_topk_distillation.default"
TOPK_DISTILLATION_BACKWARD = "zgraph.linear_topk_distillation_backward.default"

Elements = Literal["itself", "reshaped", "copied", "chosen", "padded", "source", "joined", "either", "filled"]
"""Where the elements of the results are from.

    itself      the result is the first operand
    reshaped    all elements of the first operand in their order, in another shape
    copied      the same in new memory, perhaps of another dtype
    chosen      elements of the first operand, each any number of times
    padded      the same, and a constant
    source      elements of the second operand, which the first is overwritten with
    joined      elements of a list of tensors
    either      elements of the second operand where the first holds, of the third where it does not
    filled      elements of the third operand where the second holds, of the first where it does not
"""

Zero = Literal["first", "any", "all"]
"""Which operands must be zero for the results to be: the first, any one, or all of them."""

Work = Literal[
    "product",
    "scaled product",
    "sum and product",
    "products",
    "grouped product",
    "packed product",
    "vector product",
    "attention",
    "attention backward",
    "attention by tokens",
    "attention by tokens backward",
    "convolution",
    "convolution backward",
    "projected loss",
    "projected loss backward",
    "projected losses backward",
    "distillation",
    "distillation backward",
]
"""How FLOP are counted, in `zgraph.cost.work`."""

Scratch = Literal[
    "attention",
    "attention backward",
    "like the first",
    "mask of the first",
    "dense first",
    "convolution",
    "convolution backward",
]
"""Memory beside operands and results on processors, in `zgraph.cost.workspace`."""

DeviceScratch = Literal["attention backward", "attention by tokens backward", "embedding backward", "sorted rows"]
"""The same on GPUs, in `zgraph.cost.device_workspace`."""

Indexing = Literal[
    "rows",
    "dim",
    "dims",
    "flat",
    "classes",
    "class",
    "class of scores",
    "logits",
    "projected",
    "distilled",
    "kept words",
]
"""Which operand holds indices, and of what, in `zgraph.debugging.ranges`."""


@dataclass(frozen=True, slots=True)
class Facts:
    """One row.

    Args:
        name: the op, `aten.add.Tensor`; or `aten.mm` for all overloads without a row.
        elements: where the elements of the results are from; None where they are computed.
        zero: which operands must be zero for the results to be; None where that is not known.
        commutes: whether the first two operands may change places.
        options_in_types: whether keyword arguments say nothing that the types do not.
        keeps_rows: whether it is a view that may leave rows as they are, which kernels look through.
        takes_epilogue: whether a generated matmul can stand in its place; the last two operands are the matrices.
        hides_view: whether its result is in the memory of its first argument, although its schema says otherwise.
        is_first_if_alike: whether its result is the first operand, as a view, where it is of the same type.
        undoes_itself: whether a second call with the same arguments behind the first gives what the first call read.
        unit: the number that, as the second argument, leaves the first as it is.
        by_tensor: the overload that takes a tensor of one number in the place of a number as the second argument.
        opens_files: whether it reads or writes files, so that no graph may have it.
        work: how FLOP are counted; None where it has no matmul.
        scratch: memory that it needs beside operands and results on processors; None where it is negligible.
        device_scratch: the same on GPUs.
        indexing: which operand holds indices; None where none does.
    """

    name: str
    elements: Elements | None = None
    zero: Zero | None = None
    commutes: bool = False
    options_in_types: bool = False
    keeps_rows: bool = False
    takes_epilogue: bool = False
    hides_view: bool = False
    is_first_if_alike: bool = False
    undoes_itself: bool = False
    unit: int | None = None
    by_tensor: str | None = None
    opens_files: bool = False
    work: Work | None = None
    scratch: Scratch | None = None
    device_scratch: DeviceScratch | None = None
    indexing: Indexing | None = None

    @property
    def keeps_elements(self) -> bool:
        """Whether the result has all elements of the first operand, in their order."""
        return self.elements in ("itself", "reshaped", "copied")


_ROWS = (
    # Other names, shapes and copies of a value.
    Facts("aten.alias.default", elements="itself", keeps_rows=True, is_first_if_alike=True),
    Facts("aten.detach.default", elements="itself", keeps_rows=True, is_first_if_alike=True),
    Facts("aten.lift_fresh.default", elements="itself"),
    Facts(VIEW, elements="reshaped", keeps_rows=True, is_first_if_alike=True),
    Facts("aten._unsafe_view.default", elements="reshaped", keeps_rows=True, hides_view=True, is_first_if_alike=True),
    Facts("aten._reshape_alias.default", elements="reshaped", keeps_rows=True),
    Facts("aten.reshape.default", elements="reshaped"),
    Facts("aten.unsqueeze.default", elements="reshaped", keeps_rows=True),
    Facts("aten.squeeze.default", elements="reshaped"),
    Facts("aten.squeeze.dim", elements="reshaped", keeps_rows=True),
    Facts("aten.squeeze.dims", elements="reshaped"),
    Facts("aten.clone.default", elements="copied", zero="first", options_in_types=True),
    Facts(CAST, elements="copied", zero="first", options_in_types=True),
    Facts("aten.to.dtype", elements="copied"),
    Facts("aten.contiguous.default", elements="copied"),
    Facts("aten.lift_fresh_copy.default", elements="copied"),
    # Elements of a value, in another order or number.
    Facts("aten.t.default", elements="chosen", undoes_itself=True),
    Facts("aten.transpose.int", elements="chosen", undoes_itself=True),
    Facts("aten.permute.default", elements="chosen"),
    Facts("aten.expand.default", elements="chosen", keeps_rows=True, is_first_if_alike=True),
    Facts("aten.repeat.default", elements="chosen"),
    Facts("aten.slice.Tensor", elements="chosen", is_first_if_alike=True),
    Facts("aten.select.int", elements="chosen"),
    Facts("aten.split.Tensor", elements="chosen"),
    Facts("aten.split_with_sizes.default", elements="chosen"),
    Facts("aten.chunk.default", elements="chosen"),
    Facts("aten.unbind.int", elements="chosen"),
    Facts("aten.unfold.default", elements="chosen"),
    Facts("aten.as_strided.default", elements="chosen"),
    Facts("aten.flip.default", elements="chosen"),
    Facts("aten.roll.default", elements="chosen"),
    Facts("aten.constant_pad_nd.default", elements="padded"),
    Facts("aten.tril.default", elements="padded"),
    Facts("aten.triu.default", elements="padded"),
    # Elements of several values.
    Facts("aten.copy.default", elements="source"),
    Facts("aten.cat.default", elements="joined"),
    Facts("aten.stack.default", elements="joined"),
    Facts("aten.where.self", elements="either"),
    Facts("aten.where.ScalarOther", elements="either"),
    Facts("aten.where.ScalarSelf", elements="either"),
    Facts("aten.masked_fill.Scalar", elements="filled"),
    Facts("aten.masked_fill.Tensor", elements="filled"),
    # Indices.
    Facts("aten.embedding.default", indexing="rows"),
    Facts(INT8_EMBEDDING, indexing="rows"),
    Facts("aten.index_select.default", elements="chosen", indexing="dim"),
    Facts("aten.gather.default", elements="chosen", indexing="dim"),
    Facts("aten.scatter.src", indexing="dim"),
    Facts("aten.scatter.value", indexing="dim"),
    Facts("aten.scatter_add.default", indexing="dim"),
    Facts("aten.scatter_reduce.two", indexing="dim"),
    Facts("aten.index_add.default", indexing="dim"),
    Facts("aten.index_copy.default", indexing="dim"),
    Facts("aten.index_fill.int_Scalar", indexing="dim"),
    Facts("aten.index.Tensor", elements="chosen", indexing="dims"),
    Facts("aten._unsafe_index.Tensor", indexing="dims"),
    Facts("aten.index_put.default", device_scratch="sorted rows", indexing="dims"),
    Facts("aten.take.default", indexing="flat"),
    Facts("aten.one_hot.default", indexing="classes"),
    Facts(
        "aten.embedding_dense_backward.default",
        scratch="dense first",
        device_scratch="embedding backward",
        indexing="class",
    ),
    Facts("aten.nll_loss_forward.default", indexing="class of scores"),
    Facts("aten.nll_loss2d_forward.default", indexing="class of scores"),
    Facts(LOSS, indexing="logits"),
    # Arithmetic.
    Facts("aten.add.Tensor", zero="all", commutes=True, by_tensor="aten.add.Tensor"),
    Facts("aten.mul.Tensor", zero="any", commutes=True, unit=1, by_tensor="aten.mul.Tensor"),
    Facts("aten.mul.Scalar", zero="first", unit=1, by_tensor="aten.mul.Tensor"),
    Facts("aten.div.Tensor", zero="first", unit=1, by_tensor="aten.div.Tensor"),
    Facts("aten.div.Scalar", zero="first", unit=1, by_tensor="aten.div.Tensor"),
    Facts("aten.sub.Tensor", by_tensor="aten.sub.Tensor"),
    Facts("aten.add.Scalar", by_tensor="aten.add.Tensor"),
    Facts("aten.sub.Scalar", by_tensor="aten.sub.Tensor"),
    Facts("aten.pow.Tensor_Scalar", unit=1),
    Facts("aten.neg.default", zero="first"),
    Facts("aten.sum.default", zero="first"),
    Facts("aten.sum.dim_IntList", zero="first"),
    Facts("aten.select_backward.default", zero="first"),
    Facts("aten.slice_backward.default", zero="first"),
    Facts(ROTARY, zero="first"),
    Facts(DROPOUT, scratch="like the first"),
    Facts("aten.native_dropout_backward", scratch="like the first"),
    Facts("aten._safe_softmax", scratch="mask of the first"),
    # Matmuls, attention and convolutions.
    Facts("aten.mm", work="product"),
    Facts("aten.mm.default", zero="any", takes_epilogue=True, work="product"),
    Facts("aten.bmm", work="product"),
    Facts("aten.bmm.default", zero="any", takes_epilogue=True, work="product"),
    Facts("aten._foreach_mm", work="products"),
    Facts("aten._scaled_mm", work="product"),
    Facts("aten._scaled_mm_v2", work="product"),
    Facts("aten._int_mm", work="product"),
    Facts("aten._grouped_mm", work="grouped product"),
    Facts("aten._scaled_grouped_mm", work="grouped product"),
    Facts("aten._scaled_grouped_mm_v2", work="grouped product"),
    Facts("aten.linear", work="packed product"),
    Facts("aten.mkldnn_linear", work="packed product"),
    Facts("aten._weight_int8pack_mm", work="packed product"),
    Facts("aten._weight_int4pack_mm", work="packed product"),
    Facts("aten._weight_int4pack_mm_for_cpu", work="packed product"),
    Facts("aten._weight_int4pack_mm_with_scales_and_zeros", work="packed product"),
    Facts("aten._dyn_quant_matmul_4bit", work="packed product"),
    Facts("aten._mixed_dtypes_linear", work="packed product"),
    Facts("aten.mv", work="vector product"),
    Facts("aten.addmv", work="vector product"),
    Facts("aten.dot", work="vector product"),
    Facts("aten.vdot", work="vector product"),
    Facts(MATMUL, work="product"),
    Facts(FLOAT8_MM, work="scaled product"),
    Facts(INT8_MM, work="packed product"),
    Facts(INT8_LINEAR, work="packed product"),
    Facts(INT4_LINEAR, work="packed product"),
    Facts(INT4_MM, work="packed product"),
    Facts("aten.addmm", work="sum and product"),
    Facts("aten.addbmm", work="sum and product"),
    Facts("aten.addmm.default", takes_epilogue=True, work="sum and product"),
    Facts("aten.baddbmm", work="sum and product"),
    Facts(RECTIFIED, work="sum and product"),
    Facts(PROJECTED_LOSS, work="projected loss", indexing="projected"),
    Facts(PROJECTED_LOSS_BACKWARD, work="projected loss backward"),
    Facts(DISTILLATION, work="distillation", indexing="distilled"),
    Facts(DISTILLATION_BACKWARD, work="distillation backward"),
    Facts(TOPK_DISTILLATION, work="projected loss", indexing="kept words"),
    Facts(TOPK_DISTILLATION_BACKWARD, work="projected losses backward"),
    Facts("aten._scaled_dot_product_flash_attention", work="attention"),
    Facts("aten._scaled_dot_product_efficient_attention", work="attention"),
    Facts("aten._scaled_dot_product_cudnn_attention", work="attention"),
    Facts("aten._scaled_dot_product_fused_attention_overrideable", work="attention"),
    Facts("aten._scaled_dot_product_flash_attention_for_cpu", work="attention", scratch="attention"),
    Facts("aten._cudnn_attention_forward", work="attention"),
    Facts("aten._flash_attention_forward", work="attention by tokens"),
    Facts("aten._efficient_attention_forward", work="attention by tokens"),
    Facts(
        "aten._scaled_dot_product_flash_attention_backward",
        work="attention backward",
        device_scratch="attention backward",
    ),
    Facts(
        "aten._scaled_dot_product_efficient_attention_backward",
        work="attention backward",
        device_scratch="attention backward",
    ),
    Facts(
        "aten._scaled_dot_product_cudnn_attention_backward",
        work="attention backward",
        device_scratch="attention backward",
    ),
    Facts(
        "aten._scaled_dot_product_fused_attention_overrideable_backward",
        work="attention backward",
        device_scratch="attention backward",
    ),
    Facts("aten._cudnn_attention_backward", work="attention backward", device_scratch="attention backward"),
    Facts(
        "aten._flash_attention_backward",
        work="attention by tokens backward",
        device_scratch="attention by tokens backward",
    ),
    Facts(
        "aten._efficient_attention_backward",
        work="attention by tokens backward",
        device_scratch="attention by tokens backward",
    ),
    Facts(
        "aten._scaled_dot_product_flash_attention_for_cpu_backward",
        work="attention backward",
        scratch="attention backward",
        device_scratch="attention backward",
    ),
    Facts("aten.convolution", work="convolution", scratch="convolution"),
    Facts("aten._convolution", work="convolution"),
    Facts("aten.convolution_overrideable", work="convolution"),
    Facts("aten.cudnn_convolution", work="convolution"),
    Facts("aten.miopen_convolution", work="convolution"),
    Facts("aten.mkldnn_convolution", work="convolution"),
    Facts("aten._slow_conv2d_forward", work="convolution"),
    Facts("aten.slow_conv3d_forward", work="convolution"),
    Facts("aten._conv_depthwise2d", work="convolution"),
    Facts("aten.conv_depthwise3d", work="convolution"),
    Facts("aten.convolution_backward", work="convolution backward", scratch="convolution backward"),
    # Files.
    Facts("aten.from_file", opens_files=True),
    Facts("aten.save", opens_files=True),
)

EXTERNAL_OPS: Mapping[str, Facts] = {row.name: row for row in _ROWS}

_UNKNOWN = Facts("")


def facts(op: str) -> Facts:
    """The row of an op, else the row of all its overloads, else a row that says nothing."""
    return EXTERNAL_OPS.get(op) or EXTERNAL_OPS.get(op.rpartition(".")[0]) or _UNKNOWN
