"""Rules of ops that look rows up by index: the indices pass, and so does what rows have.

Rows of a table of words are cut where ranks know which of them they have.
"""

from __future__ import annotations

from zgraph.ir.graph import Arg, Value
from zgraph.ir.rules.factors import Call, Rule, letters, written
from zgraph.ir.rules.pointwise import FIRST


def embedding(call: Call) -> Rule:
    """Rows of a table."""
    index = " ".join(letters(call.shape(1), "t"))
    return written(call, f"v d, {index} -> {index} d", linear=FIRST, ranked=("v",))


def embedding_backward(call: Call) -> Rule:
    """The gradient of a table: rows that are looked up more than once are summed."""
    index = " ".join(letters(call.shape(1), "t"))
    if call.arg(4, "scale_grad_by_freq", False):
        index = " ".join(f"_{n.lstrip('_')}" for n in index.split())  # a part counts how often it has a word itself
        return written(call, f"{index} d, {index} -> _v d", linear=FIRST)
    return written(call, f"{index} d, {index} -> v d", linear=FIRST, local=((2, "made 0"),), ranked=("v",))


def gather(call: Call) -> Rule:
    """Elements along a dim by index."""
    own, at = call.shape(0), call.shape(1)
    dim = call.integer(1, "dim", 0) % max(len(own), 1)
    passes = [i != dim and size == picked for i, (size, picked) in enumerate(zip(own, at, strict=True))]
    names = letters(own)
    base = " ".join(n if here else f"_own{i}" for i, (n, here) in enumerate(zip(names, passes, strict=True)))
    index = " ".join(n if here else f"_at{i}" for i, (n, here) in enumerate(zip(names, passes, strict=True)))
    return written(call, f"{base}, {index} -> {index}", linear=FIRST)


def indexed(call: Call) -> Rule | None:
    """Elements by indices of the first dims; None where an index comes behind a dim without."""
    own, listed = call.shape(0), call.args[1]
    assert isinstance(listed, tuple)
    depth = sum(isinstance(i, Value) for i in listed)
    if depth != len(listed):
        return None
    shapes = [call.shape(1 + i) for i in range(depth)]
    rank = max(len(s) for s in shapes)
    spread = tuple(
        next((s[len(s) - rank + i] for s in shapes if len(s) - rank + i >= 0 and s[len(s) - rank + i] != 1), 1)
        for i in range(rank)
    )
    names = letters(spread, "t")
    at = [
        " ".join(
            n if size == full else f"_one{k}_{i}"
            for i, (n, size, full) in enumerate(zip(names[rank - len(s) :], s, spread[rank - len(s) :], strict=True))
        )
        for k, s in enumerate(shapes)
    ]
    rest = letters(own)[depth:]
    base = " ".join([f"_v{i}" for i in range(depth)] + rest)
    return written(call, f"{base}, {', '.join(at)} -> {' '.join(names + rest)}", linear=FIRST)


def put(call: Call) -> Rule | None:
    """Rows of a copy written, or added to, by indices of the first dim, or of several; None for others."""
    listed, is_added = call.args[1], bool(call.arg(3, "accumulate", False))
    if isinstance(listed, tuple) and not is_added and sum(isinstance(i, Value) for i in listed) > 1:
        return _put_apart(call, listed)
    if not isinstance(listed, tuple) or len(listed) != 1 or len(call.ins) != 3:
        return None
    own, at, given = call.shape(0), call.shape(1), call.shape(2)
    rows = letters(at, "t", whole=() if is_added else range(len(at)))
    rest = letters(own)[1:]
    if tuple(given) != (*at, *own[1:]):
        return None
    base = " ".join(["_v", *rest])
    text = f"{base}, {' '.join(rows)}, {' '.join(rows + rest)} -> {base}"
    return written(call, text, linear=((0, 2),), added=(0,))


def _put_apart(call: Call, listed: tuple[Arg, ...]) -> Rule | None:
    """Elements of a copy written by indices with a dim between them, which passes: what indices make comes first."""
    at = [i for i, index in enumerate(listed) if isinstance(index, Value)]
    if at == list(range(at[0], at[-1] + 1)):
        return None
    own, given = call.shape(0), call.shape(len(at) + 1)
    names = ["_v" + str(i) if i in at else name for i, name in enumerate(letters(own))]
    passing = [name for i, name in enumerate(names) if i not in at]
    num_made = len(given) - len(passing)
    if given[num_made:] != tuple(size for i, size in enumerate(own) if i not in at):
        return None
    indices = [" ".join(f"_i{k}{d}" for d in range(len(call.shape(1 + k)))) for k in range(len(at))]
    source = " ".join([*(f"_t{d}" for d in range(num_made)), *passing])
    base = " ".join(names)
    return written(call, f"{base}, {', '.join(indices)}, {source} -> {base}", linear=((0, len(at) + 1),))


def scatter(call: Call) -> Rule | None:
    """Elements of a copy written along a dim by index; None with a number in the place of elements."""
    if len(call.ins) != 3:
        return None
    own, at, given = (call.shape(i) for i in range(3))
    dim = call.integer(1, "dim", 0) % max(len(own), 1)
    names = letters(own)
    passes = [i != dim and len({own[i], at[i], given[i]}) == 1 for i in range(len(own))]
    base, index, source = (
        " ".join(n if here else f"_{k}{i}" for i, (n, here) in enumerate(zip(names, passes, strict=True)))
        for k in ("own", "at", "from")
    )
    return written(call, f"{base}, {index}, {source} -> {base}", linear=((0, 2),))


RULES = {
    "aten.embedding.default": embedding,
    "aten.embedding_dense_backward.default": embedding_backward,
    "aten.gather.default": gather,
    "aten.index.Tensor": indexed,
    "aten.index_put.default": put,
    "aten.index_put_.default": put,
    "aten.scatter.src": scatter,
}
