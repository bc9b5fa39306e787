"""Rules of products with weights in integers: cut as the matrices are whose numbers these stand for.

Scales of int8 are one for each output, so that they are whole where columns are cut; those of int4 are cut with their
groups. Ranks then have parts of the same integers and scales that one rank would have. What is packed for a kernel is
in its order for each part by itself.
"""

from __future__ import annotations

from zgraph.ir.external_ops import INT4_MM, INT4_PACK, INT8_EMBEDDING, INT8_LINEAR
from zgraph.ir.rules.factors import Call, Rule, letters, written
from zgraph.ir.symbols import Dim

__all__ = ["INT4_ROWS", "RULES"]

INT4_ROWS = 16
"""Outputs of a layer in int4 are a multiple of this, those of each rank too."""


def linear(call: Call) -> Rule:
    """Rows times a weight in int8."""
    return written(call, "m k, n k, n _one -> m n")


def embedding(call: Call) -> Rule:
    """Rows of a table in int8."""
    index = " ".join(letters(call.shape(1), "t"))
    return written(call, f"v d, {index}, v _one -> {index} d", ranked=("v",))


def pack(call: Call) -> Rule | None:
    """The integers of a weight in the order of the kernel; None where outputs are of no known size."""
    sizes = _blocks(call.shape(0)[0])
    return None if sizes is None else written(call, "(n _r) p -> (n _r) p", sizes=sizes)


def packed(call: Call) -> Rule | None:
    """Rows times a weight in int4; None where sizes are not known."""
    outputs, group = call.shape(1)[0], call.args[3]
    sizes, num_groups = _blocks(outputs), call.shape(2)[0]
    if sizes is None or not isinstance(group, int) or not isinstance(num_groups, int):
        return None
    sizes |= {"g": num_groups, "_e": group, "_h": group // 2}
    return written(call, "m (g _e), (n _r) (g _h), g (n _r) _two -> m (n _r)", sizes=sizes)


def _blocks(outputs: object) -> dict[str, Dim] | None:
    if not isinstance(outputs, int) or outputs % INT4_ROWS:
        return None
    return {"n": outputs // INT4_ROWS, "_r": INT4_ROWS}


RULES = {INT8_LINEAR: linear, INT8_EMBEDDING: embedding, INT4_PACK: pack, INT4_MM: packed}
