"""Rules of products with weights in integers: cut as the matrices are whose numbers these stand for.

Scales of int8 are one for each output, so that they are whole where columns are cut; those of int4 are cut with their
groups. Ranks then have parts of the same integers and scales that one rank would have.
"""

from __future__ import annotations

from zgraph.ir.external_ops import INT4_LINEAR, INT8_EMBEDDING, INT8_LINEAR
from zgraph.ir.rules.factors import Call, Rule, letters, written

__all__ = ["RULES"]


def int8_linear(call: Call) -> Rule:
    """Rows times a weight in int8."""
    return written(call, "m k, n k, n _one -> m n")


def int8_embedding(call: Call) -> Rule:
    """Rows of a table in int8."""
    index = " ".join(letters(call.shape(1), "t"))
    return written(call, f"v d, {index}, v _one -> {index} d", ranked=("v",))


def int4_linear(call: Call) -> Rule | None:
    """Rows times a weight in int4, two columns in a byte; None where sizes are not known."""
    group, num_groups = call.args[3], call.shape(2)[0]
    if not isinstance(group, int) or not isinstance(num_groups, int):
        return None
    sizes = {"g": num_groups, "_e": group, "_h": group // 2}
    return written(call, "m (g _e), n (g _h), g n _two -> m n", sizes=sizes)


RULES = {INT8_LINEAR: int8_linear, INT8_EMBEDDING: int8_embedding, INT4_LINEAR: int4_linear}
