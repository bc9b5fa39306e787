"""Rules of ops that reduce dims, or work along one."""

from __future__ import annotations

from zgraph.ir.rules.factors import Call, Rule, letters, written
from zgraph.ir.rules.pointwise import FIRST


def total(call: Call) -> Rule:
    """A sum: of what is summed over, ranks have partial sums."""
    own = call.shape(0)
    names = letters(own)
    gone = _reduced(call)
    return written(call, f"{' '.join(names)} -> {_left(call, names, gone)}", linear=FIRST)


def mean(call: Call) -> Rule:
    """A mean: what is averaged is whole, since the mean of a part is no part of the mean."""
    own, gone = call.shape(0), _reduced(call)
    names = letters(own, whole=gone)
    return written(call, f"{' '.join(names)} -> {_left(call, names, gone)}", linear=FIRST)


def largest(call: Call) -> Rule:
    """A largest element: of what is compared, ranks have the largest of their parts."""
    own = call.shape(0)
    names = letters(own)
    return written(call, f"{' '.join(names)} -> {_left(call, names, _reduced(call))}", reduce="max")


def smallest(call: Call) -> Rule:
    """A smallest element: what is compared is whole."""
    own, gone = call.shape(0), _reduced(call)
    names = letters(own, whole=gone)
    return written(call, f"{' '.join(names)} -> {_left(call, names, gone)}")


def _reduced(call: Call) -> set[int]:
    """The dims that are reduced."""
    rank = len(call.shape(0))
    if call.op.endswith(".default") and call.name in ("sum", "mean"):
        return set(range(rank))
    return {d % rank for d in call.integers(1, "dim")} if rank and call.integers(1, "dim") else set(range(rank))


def _left(call: Call, names: list[str], gone: set[int]) -> str:
    """The factors of the result."""
    keep = len(call.out()) == len(names)
    return " ".join(f"_one{i}" if i in gone else n for i, n in enumerate(names) if keep or i not in gone)


def along_one_dim(call: Call) -> Rule:
    """An op along one dim, which is whole."""
    own = call.shape(0)
    position = 2 if call.name.endswith("_backward_data") or call.name == "topk" else 1
    dim = call.integer(position, "dim", -1 if call.name in ("topk", "sort") else 0) % max(len(own), 1)
    names = letters(own, whole=(dim,))
    texts = [
        " ".join(n if i != dim or shape == own else f"_other{k}" for i, n in enumerate(names))
        for k, shape in enumerate((*call.ins, *call.outs))
        if shape is not None
    ]
    count = sum(shape is not None for shape in call.ins)
    linear = FIRST if call.name in ("_softmax_backward_data", "_log_softmax_backward_data", "cumsum") else ()
    return written(call, f"{', '.join(texts[:count])} -> {', '.join(texts[count:])}", linear=linear)


RULES = {
    "aten.sum.default": total,
    "aten.sum.dim_IntList": total,
    "aten.mean.default": mean,
    "aten.mean.dim": mean,
    "aten.amax.default": largest,
    "aten.amin.default": smallest,
    **{
        f"aten.{op}.default": along_one_dim
        for op in (
            *("_softmax", "_log_softmax", "_softmax_backward_data", "_log_softmax_backward_data", "cumsum"),
            *("topk", "sort", "_safe_softmax"),
        )
    },
}
