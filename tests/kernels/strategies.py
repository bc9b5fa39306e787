"""Kernels of any steps, for hypothesis."""

from hypothesis import strategies as st

from zgraph.codegen.ops import SCALAR_OPS, Extent
from zgraph.codegen.spec import KernelSpec, Operand, Step, parse_step
from zgraph.ir import DType

FLOATS = st.sampled_from((DType.f32, DType.bf16))

TEMPLATES = (
    "{y} = tanh({a})",
    "{y} = maximum({a}, {b})",
    "{y} = random(seed)",
    "{y} = row_max({f})",
    "{y} = col_sum({f})",
    "{y}a = add({a}, {b}); {y} = tanh({y}a)",
    "{y}a = mul({a}, {b}); {y} = tanh({y}a)",
    "{y}a = row_sum({f}); {y} = mul({y}a, {per_column})",
    "{y}a = row_sum({f}); {y} = mul({y}a, {per_column})",
)
"""Steps whose values stay within reach of 1; {f} has rows and columns."""


@st.composite
def kernels(draw: st.DrawFn) -> KernelSpec:
    """A kernel that sums or compares the columns of its rows at least once, and writes some of what it makes."""
    columns = draw(st.integers(1, 70))
    inputs = [
        *(Operand(name, draw(FLOATS), extent) for name, extent in zip("xzcws", EXTENTS, strict=True)),
        Operand("seed", DType.i64, Extent.scalar),
    ]
    steps = [Step("top", "row_max", ("x",)), Step("low", "sub", ("z", "top"))]
    for number in range(draw(st.integers(0, 8))):
        extents = KernelSpec("k", columns, tuple(inputs), (inputs[0],), tuple(steps)).extents
        sums = {step.name for step in steps if SCALAR_OPS[step.op].reduces == "rows"}
        names = [name for name in extents if name not in sums and name != "seed"]
        a, b = draw(st.sampled_from(names)), draw(st.sampled_from(names))
        f = draw(st.sampled_from([name for name in names if extents[name] is Extent.full]))
        text = draw(st.sampled_from(TEMPLATES)).format(y=f"v{number}", a=a, b=b, f=f, per_column=1 / columns)
        steps += map(parse_step, text.split("; "))
    made = KernelSpec("k", columns, tuple(inputs), (inputs[0],), tuple(steps))
    writable = [n for n, e in made.extents.items() if e in (Extent.full, Extent.column) or n in made.row_sums]
    wanted = draw(st.lists(st.sampled_from(writable), min_size=1, max_size=4, unique=True))
    dtypes = {name: DType.f32 if name in made.row_sums else draw(FLOATS) for name in wanted}
    outputs = tuple(Operand(name, dtypes[name], made.extents[name]) for name in wanted)
    return KernelSpec("k", columns, tuple(inputs), outputs, tuple(steps))


EXTENTS = (Extent.full, Extent.full, Extent.column, Extent.row, Extent.scalar)
