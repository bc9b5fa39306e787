"""Rules of products of matrices. Cut along what is summed over, they make partial sums, in which a bias counts once."""

from __future__ import annotations

from zgraph.ir.rules.factors import Call, Rule, written


def product(call: Call) -> Rule:
    """A matrix product, or many, perhaps with something added."""
    batch = "b " if "bmm" in call.op else ""
    text = f"{batch}m k, {batch}k n -> {batch}m n"
    if "add" not in call.name:
        return written(call, text, linear=((0,), (1,)))
    bias, out = call.shape(0), call.out()
    names = f"{batch}m n".split()[len(out) - len(bias) :]
    sizes = zip(names, bias, out[len(out) - len(bias) :], strict=True)
    first = " ".join(name if size == full else f"_one{i}" for i, (name, size, full) in enumerate(sizes))
    return written(call, f"{first}, {text}", linear=((0, 1), (0, 2)), added=(0,))


RULES = {f"aten.{op}.default": product for op in ("mm", "bmm", "addmm", "baddbmm")}
