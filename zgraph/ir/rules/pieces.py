"""Rules of ops that take tensors apart along a dim, or put them together. The other dims pass."""

from __future__ import annotations

from zgraph.ir.rules.factors import Call, Rule, letters, written
from zgraph.ir.rules.pointwise import FIRST

FAR = 1 << 62
"""A bound from here on means the end of a dim, whatever its size."""


def piece(call: Call) -> Rule:
    """A range of one dim: that dim is whole, unless the range is one of equal blocks, of which each may be cut."""
    backward = call.name.endswith("_backward")
    at = 2 if backward else 1
    long, short = (call.out(), call.shape(0)) if backward else (call.shape(0), call.out())
    dim = call.integer(at, "dim", 0) % len(long)
    longer = letters(long, whole=(dim,))
    shorter = [n if i != dim else f"_part{i}" for i, n in enumerate(longer)]
    local = (*(((1, "shape"),) if backward else ()), (at + 1, f"bound {dim}"), (at + 2, f"bound {dim}"))
    size, part = long[dim], short[dim]
    start, end = (call.arg(at + i, name, None) for i, name in ((1, "start"), (2, "end")))
    steps = call.integer(at + 3, "step", 1)
    sizes = {}
    numbers = isinstance(size, int) and isinstance(part, int)
    if numbers and isinstance(start, int) and isinstance(end, int) and steps == 1:
        is_end = end == start + part or (end >= FAR and start + part == size)
        if 1 < part < size and size % part == 0 and start >= 0 and start % part == 0 and is_end:
            longer[dim], shorter[dim] = "(_j x)", "x"
            sizes = {"_j": size // part, "x": part}
    ins, outs = (shorter, longer) if backward else (longer, shorter)
    return written(call, f"{' '.join(ins)} -> {' '.join(outs)}", sizes=sizes, linear=FIRST, local=local)


def select(call: Call) -> Rule:
    """One index of a dim, which is whole."""
    backward = call.name.endswith("_backward")
    long = call.out() if backward else call.shape(0)
    dim = call.integer(2 if backward else 1, "dim", 0) % len(long)
    longer = letters(long, whole=(dim,))
    shorter = [n for i, n in enumerate(longer) if i != dim]
    ins, outs = (shorter, longer) if backward else (longer, shorter)
    local = ((1, "shape"),) if backward else ()
    return written(call, f"{' '.join(ins)} -> {' '.join(outs)}", linear=FIRST, local=local)


def pad(call: Call) -> Rule:
    """A constant around some dims, which are whole."""
    own, counts = call.shape(0), call.integers(1, "pad")
    whole = range(len(own) - (len(counts) + 1) // 2, len(own))
    names = letters(own, whole=whole)
    made = [f"{n}padded" if i in whole else n for i, n in enumerate(names)]
    zero = call.arg(2, "value", 0) in (0, None)
    return written(call, f"{' '.join(names)} -> {' '.join(made)}", linear=FIRST if zero else ())


def joined(call: Call) -> Rule:
    """Parts along a dim: the whole is cut in blocks, one a part, where each part is cut."""
    is_cat = call.name == "cat"
    parts = tuple(s for s in (call.ins if is_cat else call.outs) if s is not None)
    one = call.out() if is_cat else call.shape(0)
    dim = call.integer(1 if is_cat else 2, "dim", 0) % len(one)
    sizes = [part[dim] if len(part) == len(one) else 0 for part in parts]
    names = letters(one, whole=(dim,))
    group = (tuple(range(len(call.ins))),)
    local = () if is_cat else ((1, f"sizes {dim}"),)
    none = [part == (0,) and len(one) > 1 for part in parts]  # cat takes these for nothing
    full = [size for size, is_none in zip(sizes, none, strict=True) if not is_none]
    if not full or not all(isinstance(size, int) and size > 0 for size in full):
        texts = [" ".join(f"_p{i}_{d}" for d in range(len(part))) for i, part in enumerate(parts)]
        whole = " ".join(letters(one, "_all"))
        return written(call, f"{', '.join(texts)} -> {whole}" if is_cat else f"{whole} -> {', '.join(texts)}")
    part_text = " ".join(n if d != dim else "x" for d, n in enumerate(names))
    each = ", ".join(f"_none{i}" if is_none else part_text for i, is_none in enumerate(none))
    whole = " ".join(n if d != dim else "x+" for d, n in enumerate(names))
    text = f"{each} -> {whole}" if is_cat else f"{whole} -> {each}"
    return written(call, text, linear=group, local=local, joins={"x": tuple(int(size) for size in full)})


def stacked(call: Call) -> Rule:
    """As many tensors as the size of a dim, which is never cut."""
    is_stack = call.name == "stack"
    one, part = (call.out(), call.shape(0)) if is_stack else (call.shape(0), call.out())
    dim = call.integer(1, "dim", 0) % len(one)
    names = letters(part)
    each = ", ".join([" ".join(names)] * len(call.ins if is_stack else call.outs))
    whole = " ".join([*names[:dim], "_j", *names[dim:]])
    group = (tuple(range(len(call.ins))),)
    return written(call, f"{each} -> {whole}" if is_stack else f"{whole} -> {each}", linear=group)


RULES = {
    "aten.slice.Tensor": piece,
    "aten.slice_backward.default": piece,
    "aten.select.int": select,
    "aten.select_backward.default": select,
    "aten.constant_pad_nd.default": pad,
    "aten.cat.default": joined,
    "aten.split.Tensor": joined,
    "aten.split_with_sizes.default": joined,
    "aten.stack.default": stacked,
    "aten.unbind.int": stacked,
}
