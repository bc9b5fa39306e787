"""Which values lie in the rows that a kernel works on, and which views leave rows as they are."""

import pytest

from zgraph.codegen.ops import Extent
from zgraph.ir import DType, TensorType, Value
from zgraph.passes.analysis.rows import Space, dims, same_rows, written


def value(*shape: int, dtype: DType = DType.f32, strides: tuple[int, ...] | None = None) -> Value:
    return Value("v", TensorType(dtype, shape, strides=strides))


@pytest.mark.parametrize(
    ("source", "result", "same"),
    [
        (value(4, 8), value(2, 2, 8), True),
        (value(4, 8), value(4, 8), True),
        (value(4, 8), value(8, 4), False),
        (value(4, 8), value(32), False),
        (value(4, 8), value(2, 8), False),
        (value(4, 8), value(8, 4, strides=(1, 8)), False),
        (value(4, 4), value(4, 4, strides=(1, 4)), False),
        (value(4, 4, strides=(1, 4)), value(4, 4), False),
        (value(4, 1), value(4, 8, strides=(1, 0)), True),
        (value(2, 3, 1), value(2, 3, 8, strides=(3, 1, 0)), True),
        (value(3, 1), value(2, 3, 8, strides=(0, 1, 0)), False),
        (value(1, 1), value(4, 8, strides=(0, 0)), False),
        (value(4, 2), value(4, 8), False),
        (value(1, 8), value(1, 2), False),
        (value(1, 8), value(4, 8, strides=(0, 1)), False),
        (value(), value(1), False),
    ],
)
def test_views_that_leave_rows_as_they_are(source, result, same):
    assert same_rows(source, result) == same


SPACE = Space(4 * 8, 8)


@pytest.mark.parametrize(
    ("given", "extent"),
    [
        (value(4, 8), Extent.full),
        (value(2, 2, 8), Extent.full),
        (value(4, 8, dtype=DType.bool), Extent.full),
        (value(4, 8, dtype=DType.i64), None),
        (value(4, 8, dtype=DType.f64), None),
        (value(4, 8, strides=(1, 4)), None),
        (value(8, 4), None),
        (value(4, 1), Extent.column),
        (value(2, 2, 1), Extent.column),
        (value(8, 1), None),
        (value(2, 1), None),
        (value(4), None),
        (value(8), Extent.row),
        (value(1, 8), Extent.row),
        (value(2, 8), None),
        (value(), Extent.scalar),
        (value(1), None),
    ],
)
def test_the_extent_of_a_value_in_rows(given, extent):
    assert SPACE.extent(given) is extent


def test_where_there_is_one_row_it_is_all():
    assert Space(8, 8).extent(value(8)) is Extent.full
    assert Space(8, 8).extent(value(1)) is Extent.column
    assert Space(8, 8).extent(value(1, 1)) is Extent.column


def test_where_rows_have_one_column_a_number_of_each_is_all():
    assert Space(4, 1).extent(value(4, 1)) is Extent.full
    assert Space(4, 1).extent(value(1)) is Extent.row


@pytest.mark.parametrize(
    ("arg", "rank", "text"),
    [
        (-1, 3, "last"),
        ((2,), 3, "last"),
        (1, 3, ""),
        ((0, 1), 3, "rows"),
        ((-2, 0), 3, "rows"),
        ((0, 2), 3, ""),
        ((0, 1, 2), 3, ""),
        ((1,), 2, "last"),
        (0, 2, "rows"),
        (0, 1, "last"),
        (None, 2, ""),
        ((), 1, ""),
        (0, 0, ""),
    ],
)
def test_dimensions_as_patterns_write_them(arg, rank, text):
    assert dims(arg, rank) == text


@pytest.mark.parametrize(
    ("arg", "text"), [(1, "1"), (1.0, "1"), (0.5, "0.5"), (True, "true"), (None, "none"), ((1, False), "[1,false]")]
)
def test_arguments_as_patterns_write_them(arg, text):
    assert written(arg) == text
