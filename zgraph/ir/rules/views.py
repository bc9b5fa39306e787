"""Rules of ops that give the same elements another shape."""

from __future__ import annotations

import math
from itertools import pairwise

from zgraph.ir.rules.factors import Call, Rule, Shape, letters, written
from zgraph.ir.rules.pointwise import FIRST, broadcast
from zgraph.ir.symbols import Dim


def reshape(call: Call) -> Rule:
    """A reshape: each dim is a product of factors that both shapes share."""
    old, new, sizes = shared_factors(call.shape(0), call.out())
    is_sized = call.name in ("view", "_unsafe_view", "reshape")
    return written(call, f"{old} -> {new}", sizes=sizes, linear=FIRST, local=((1, "shape"),) if is_sized else ())


def shared_factors(old: Shape, new: Shape) -> tuple[str, str, dict[str, Dim]]:
    """The dims of two shapes of one number of elements as products of common factors.

    Where the sizes of some dims have none, those dims are whole together.

    Returns:
        The factors of the old shape and of the new one, as text, and their sizes.
    """
    if not all(isinstance(size, int) and size > 0 for size in (*old, *new)):
        return " ".join(letters(old, "_o")), " ".join(letters(new, "_n")), {}
    ends = [{math.prod(map(int, shape[: i + 1])) for i in range(len(shape))} for shape in (old, new)]
    shared, every = sorted({1} | ends[0] & ends[1]), {1} | ends[0] | ends[1]
    sizes: dict[str, Dim] = {}
    texts = []
    for side, shape in enumerate((old, new)):
        text, at = [], 1
        for i, size in enumerate(map(int, shape)):
            low, high = max(s for s in shared if s <= at), min((s for s in shared if s >= at * size), default=0)
            marks = sorted(m for m in every if low <= m <= high)
            inside = [m for m in marks if at <= m <= at * size]
            if size == 1 or any(b % a for a, b in pairwise(marks)):
                text.append(f"_w{side}{i}")
            else:
                text.append("(" + " ".join(f"f{a}" for a in inside[:-1]) + ")")
                sizes.update({f"f{a}": b // a for a, b in pairwise(inside)})
            at *= size
        texts.append(" ".join(text))
    return texts[0], texts[1], sizes


def unsqueeze(call: Call) -> Rule:
    """A new dim of size 1."""
    names = letters(call.shape(0))
    dim = call.integer(1, "dim", 0) % len(call.out())
    return written(call, f"{' '.join(names)} -> {' '.join([*names[:dim], '_new', *names[dim:]])}", linear=FIRST)


def squeeze(call: Call) -> Rule:
    """A dim less. Where no dim is named, all of size 1 go: none may become so by being cut."""
    own, out = call.shape(0), call.out()
    names = letters(own)
    if call.op == "aten.squeeze.dim":
        dim = call.integer(1, "dim", 0) % max(len(own), 1)
        kept = [n for i, n in enumerate(names) if i != dim or len(out) == len(own)]
        names = [n if i != dim or n[0] == "_" else f"_{n}" for i, n in enumerate(names)]
        kept = [n if n in names else f"_{n}" for n in kept]
        return written(call, f"{' '.join(names)} -> {' '.join(kept)}", linear=FIRST)
    whole = letters(own, whole=range(len(own)))
    return written(
        call,
        f"{' '.join(whole)} -> {' '.join(n for n, size in zip(whole, own, strict=True) if size != 1)}",
        linear=FIRST,
    )


def permutation(call: Call) -> Rule:
    """Dims in another order."""
    own = call.shape(0)
    order = list(range(len(own)))
    if call.name == "permute":
        order = [d % len(own) for d in call.integers(1, "dims")]
    elif len(own) > 1:
        a, b = (0, 1) if call.name == "t" else (call.integer(i, f"dim{i - 1}", 0) % len(own) for i in (1, 2))
        order[a], order[b] = b, a
    names = letters(own)
    return written(call, f"{' '.join(names)} -> {' '.join(names[i] for i in order)}", linear=FIRST)


def expand(call: Call) -> Rule:
    """Dims of size 1 repeated; they may be cut once they are."""
    out = call.out()
    text = f"{broadcast(call.shape(0), out, '_one')} -> {' '.join(letters(out))}"
    return written(call, text, linear=FIRST, local=((1, "shape"),))


RULES = {
    **{f"aten.{op}.default": reshape for op in ("view", "_unsafe_view", "reshape")},
    "aten.unsqueeze.default": unsqueeze,
    "aten.squeeze.dim": squeeze,
    "aten.squeeze.default": squeeze,
    "aten.t.default": permutation,
    "aten.transpose.int": permutation,
    "aten.permute.default": permutation,
    "aten.expand.default": expand,
}
