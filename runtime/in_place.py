"""All-reduces that may reduce in place: nothing else touches the memory of what they are given."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from zgraph.ir import Graph, Program
from zgraph.ir.aliases import Aliases

ALL_REDUCE = "all_reduce_start"


def in_place(program: Program, graph: Graph) -> Collection[str]:
    """The names of all-reduces that are the last to touch memory which their program has made itself."""
    aliases, last = Aliases(graph), dict[str, int]()
    sent: dict[str, frozenset[str]] = {}
    given = {value.name for value in program.arguments}
    found: dict[str, tuple[int, frozenset[str]]] = {}

    def touch(names: Iterable[str], position: int) -> None:
        for name in names:
            last.update(dict.fromkeys(aliases.roots(name) | sent.get(name, frozenset()), position))

    for position, instruction in enumerate(program.instructions):
        node = instruction.node
        aliases.add(node)
        operands = [value.name for value in node.operands]
        roots = aliases.roots(*operands)
        touch((*operands, *(result.name for result in node.results)), position)
        if node.op == ALL_REDUCE and node.option("axis") is None:
            found[node.name] = position, roots
        elif node.op.endswith("_start"):  # it reads on until it is waited for
            sent.update((result.name, roots) for result in node.results)
    kept = aliases.roots(*(value.name for value in program.results if value is not None)) | given
    return {name for name, (at, roots) in found.items() if not roots & kept and all(last[r] == at for r in roots)}
