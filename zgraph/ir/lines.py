"""The nodes of a graph by the lines of its text. A graph of 80 layers takes a second to parse; its lines say most.

A node is known by what it makes; one that makes nothing, by its op and what it reads. Names stay from pass to pass, so
that a node can be followed.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from zgraph.errors import ZirError
from zgraph.ir import OPS, Origin
from zgraph.ir.op_rows import Lane

_STRING = r'"(?:[^"\\]|\\.)*"'
_ORIGIN = re.compile(
    rf"(?: @ (?P<module>{_STRING}))?(?: (?P<file>{_STRING}):(?P<line>[0-9]{{1,19}}))?(?: by (?P<by>[\w-]+))?$"
)
_NODE = re.compile(r"(?P<phase>fwd|bwd|upd) (?:%(?P<made>[^\s:]+): .*? = )?(?P<op>[\w.]+)\((?P<args>.*)")
_NODES = ("fwd ", "bwd ", "upd ")


@dataclass(frozen=True, slots=True)
class Line:
    """A node as its line.

    Args:
        key: what it is known by.
        phase: fwd, bwd or upd.
        op: its op.
        args: what follows the op.
        text: the line without where it comes from.
        end: where it comes from, as the line has it.
    """

    key: str
    phase: str
    op: str
    args: str
    text: str
    end: str

    @property
    def origin(self) -> Origin:
        """Where it comes from. Raises ZirError if it is no text."""
        found = _ORIGIN.match(self.end)
        assert found is not None
        try:
            module, file = (json.loads(found[name] or '""') for name in ("module", "file"))
        except ValueError as error:
            raise ZirError(f"no text in quotes ({error}); zgraph verify says where", self.end) from None
        return Origin(module, file, int(found["line"] or 0), found["by"] or "")

    @property
    def lane(self) -> Lane:
        """The lane that it runs on."""
        return OPS[self.op].lane if self.op in OPS else "compute"

    @property
    def name(self) -> str:
        """The first result, or the op where there is none, as `Node.name`."""
        return self.makes[0] if self.makes else self.op

    @property
    def makes(self) -> list[str]:
        """The names of its results."""
        return re.findall(r"%([\w.]+): ", self.text.removesuffix(f"{self.op}({self.args}"))

    @property
    def reads(self) -> list[str]:
        """The names of the values that it reads, in order, repeats kept."""
        return re.findall(r"%([\w.]+)", re.sub(_STRING, "", self.args))


def read_line(line: str, key: str = "") -> Line:
    """A node's line, taken apart; `key` if it is known by another than its own. Raises ZirError if it is none."""
    begin = line.rfind(' @ "')
    found = _ORIGIN.match(line, begin) if begin >= 0 else None
    end = (found or _ORIGIN.search(line))[0]  # type: ignore[index]
    text = line.removesuffix(end)
    if (node := _NODE.match(text)) is None:
        raise ZirError("this is no node; zgraph verify says what is wrong with the graph", line)
    key = key or node["made"] or f"{node['op']}({node['args']}"
    return Line(key, node["phase"], node["op"], node["args"], text, end)


def unique_names(names: Iterable[str]) -> Iterator[str]:
    """The names, with #2 behind one that comes a second time.

    >>> list(unique_names(["dce", "bucket", "dce"]))
    ['dce', 'bucket', 'dce#2']
    """
    counts: Counter[str] = Counter()
    for name in names:
        counts[name] += 1
        yield name if counts[name] == 1 else f"{name}#{counts[name]}"


def node_lines(text: str) -> Mapping[str, str]:
    """The line of every node of a graph's text by what the node is known by, in order."""
    lines = [line for line in text.splitlines() if line.startswith(_NODES)]
    keys = (line[5 : line.find(":")] if line.startswith("%", 4) else read_line(line).key for line in lines)
    return dict(zip(unique_names(keys), lines, strict=True))
