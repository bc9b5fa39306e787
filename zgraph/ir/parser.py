"""From `.zir` text back to a graph. `parse_graph(print_graph(g)) == g` for every graph."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterator, Mapping

from zgraph.errors import TextError, ZirError
from zgraph.ir.cursor import NUMBER, Cursor
from zgraph.ir.graph import (
    PROGRAMS,
    Arg,
    ExternalOp,
    Graph,
    Input,
    InputKind,
    Node,
    Origin,
    Output,
    OutputKind,
    Phase,
    Token,
    Value,
)
from zgraph.ir.names import TOKENS, refusal, token_refusal
from zgraph.ir.ops import OPS
from zgraph.ir.symbols import Dim, parse_dim
from zgraph.ir.types import (
    DEVICE,
    HOST,
    MAX_BLOCKS,
    MODEL_AXES,
    PLACEMENTS,
    Axis,
    DType,
    Grouped,
    NoneType,
    Own,
    Placement,
    ScalarType,
    Shard,
    TensorType,
    Type,
)

_NAME = re.compile(r"[\w.]+")
_COUNT = re.compile(r"[0-9]{1,18}")
_DIM = re.compile(r"([SGO])([0-9]{1,2})")
_PLACEMENT = re.compile(r"[A-Za-z_][\w.\-]*(?:\(\w*\))?")
_KEY = re.compile(r" *([A-Za-z_]\w*)=")
_DTYPES = {d.value: d for d in DType}
_SPACES = {space: space for space in (DEVICE, HOST)}
_OFFLOADS = {what: what for what in ("optimizer", "parameters")}
_MAX_DEPTH = 32
_MAX_GRAPH_DEPTH = 8


def parse_graph(text: str) -> Graph:
    """Read a graph.

    Raises:
        ZirError: with the line, and a caret under what is wrong in it.
    """
    lines = _lines(text)
    head = next(lines, None)
    if head is None:
        raise ZirError('the text is empty; a graph begins with: graph "name"')
    return _Reader(lines).graph(head)


class _LineCursor(Cursor):
    """A cursor over one line of a graph."""

    fault = ZirError

    def dims(self, closers: str) -> tuple[Dim, ...]:
        """Sizes separated by commas, up to one of `closers`, which is left."""
        start, depth, found = self.at, 0, []
        while self.at < len(self.text):
            char = self.text[self.at]
            if depth == 0 and char in closers + ",":
                if piece := self.text[start : self.at].strip():
                    found.append(self.dim(piece, self.text.index(piece, start)))
                if char != ",":
                    return tuple(found)
                start = self.at + 1
            depth += (char == "(") - (char == ")")
            self.at += 1
        raise self.error(f"expected one of {closers!r}")

    def dim(self, text: str, start: int) -> Dim:
        try:
            return int(text) if _COUNT.fullmatch(text) else parse_dim(text)
        except ZirError as error:
            raise self.error(str(error).splitlines()[0], start) from None

    def type(self) -> Type:
        future = self.accept("future ")
        self.space()
        start = self.at
        word = self.word("a type")
        if word == "none" and not future:
            return NoneType()
        if not self.peek("["):
            if word not in ("int", "float", "bool") or future:
                raise self.error(f"{'future ' if future else ''}{word} is not a type", start)
            if not self.accept("("):
                return ScalarType(word)
            inside = self.at
            exprs = self.dims(")")
            self.expect(")")
            if len(exprs) != 1:
                raise self.error("expected one expression", inside)
            return ScalarType(word, exprs[0])
        if word not in _DTYPES:
            raise self.error(f"{word} is not a dtype; the dtypes are {', '.join(_DTYPES)}", start)
        self.expect("[")
        shape = self.dims("|]")
        strides = self.dims("]") if self.accept("|") else None
        self.expect("]")
        placement = self.listed(">", self.placement) if self.accept("<") else ()
        space = self.one_of(_SPACES, "a memory space") if self.accept("@") else DEVICE
        return TensorType(_DTYPES[word], shape, strides, placement, space, future)

    def placement(self) -> Placement:
        self.space()
        start = self.at
        word = self.match(_PLACEMENT, "a placement")
        if word in PLACEMENTS:
            return PLACEMENTS[word]
        if found := _DIM.fullmatch(word):
            dim = int(found[2])
            if found[1] == "S":
                return Shard(dim, self.blocks() if self.accept("/") else (1,))
            return Grouped(dim) if found[1] == "G" else Own(dim)
        raise self.error(f"{word} is not a placement: {', '.join(PLACEMENTS)}, or S, G or O and a dim", start)

    def blocks(self) -> tuple[int, ...]:
        """The blocks of a dim: how many of one size, or their sizes to one another."""
        self.space()
        start = self.at
        found = self.listed("]", self.integer) if self.accept("[") else (self.integer(),)
        is_count = self.text[start] != "["
        if not found or min(found) < 1 or (found[0] if is_count else len(found)) > MAX_BLOCKS:
            raise self.error(f"a dim is cut in 1 to {MAX_BLOCKS:,} blocks", start)
        return (1,) * found[0] if is_count else found

    def origin(self) -> Origin:
        module, file, number = "", "", 0
        if self.accept("@"):
            module = self.string()
            if self.peek('"'):
                file = self.string()
                self.expect(":")
                number = self.integer()
        return Origin(module, file, number, self.word("the name of a pass") if self.accept("by ") else "")


def _lines(text: str) -> Iterator[_LineCursor]:
    """The lines that say something, one at a time: a text may have millions of them, and be refused at its first."""
    for number, line in enumerate(io.StringIO(text), 1):
        stripped = line.strip()
        if stripped and stripped[0] != "#":
            yield _LineCursor(line.rstrip("\r\n"), number)


class _Reader:
    """Reads the lines of one graph, with the values defined so far.

    Args:
        lines: those behind its first.
        depth: of how many graphs it is a function.
    """

    def __init__(self, lines: Iterator[_LineCursor], depth: int = 0) -> None:
        self.lines, self.depth = lines, depth
        self.subgraphs: dict[str, Graph] = {}
        self.called: set[str] = set()
        self.values: dict[str, Value] = {}
        self.phases = {p.value: p for p in Phase}
        self.undeclared: TextError | None = None

    def graph(self, head: _LineCursor) -> Graph:
        name, mesh = self.head(head)
        foreign: dict[str, ExternalOp] = {}
        inputs: list[Input] = []
        nodes: list[Node] = []
        outputs: list[Output] = []
        arenas: Mapping[Phase, int] = {}
        kinds = {k.value: k for k in InputKind}
        last = head
        for line in self.lines:
            last = line
            if self.depth and line.text.strip() == "end":
                break
            if not line.text.startswith("  " * self.depth):
                raise line.error(f'the lines of the function "{name}" are indented, up to one that says: end')
            start = line.at
            word = line.word("op, graph, arena, an input kind, a phase or return")
            if word == "graph":
                line.at = start
                self.subgraph(line)
                continue
            if word == "op":
                op, row = self.declaration(line)
                foreign[op] = row
            elif word == "arena":
                if arenas:
                    raise line.error("the arenas are stated twice", start)
                arenas = self.arenas(line)
            elif word in kinds:
                inputs.append(self.input(line, kinds[word]))
            elif word in self.phases:
                nodes.append(self.node(line, self.phases[word], foreign))
            elif word == "return":
                outputs.append(self.output(line))
            else:
                line.at = start
                raise line.error(f"expected op, graph, arena, {', '.join([*kinds, *self.phases])} or return")
            line.end()
        if self.depth and last.text.strip() != "end":
            raise last.error(f'the function "{name}" goes on to a line that says: end')
        if unused := self.subgraphs.keys() - self.called:
            raise last.error(f'no op calls the function "{min(unused)}"')
        if self.undeclared is not None:
            raise self.undeclared
        return Graph(name, tuple(inputs), tuple(nodes), tuple(outputs), mesh, foreign, arenas)

    def subgraph(self, line: _LineCursor) -> None:
        """A function that an op below calls."""
        if self.depth == _MAX_GRAPH_DEPTH:
            raise line.error(f"functions nest deeper than {_MAX_GRAPH_DEPTH}")
        graph = _Reader(self.lines, self.depth + 1).graph(line)
        if graph.name in self.subgraphs:
            raise line.error(f'the function "{graph.name}" is defined twice', 0)
        self.subgraphs[graph.name] = graph

    def head(self, line: _LineCursor) -> tuple[str, tuple[Axis, ...]]:
        line.expect("graph")
        name = line.string()
        mesh: tuple[Axis, ...] = ()
        if line.accept("mesh("):
            mesh = line.listed(")", lambda: self.axis(line))
            if len({a.name for a in mesh}) < len(mesh):
                raise line.error("two mesh axes share a name")
        line.end()
        return name, mesh

    def axis(self, line: _LineCursor) -> Axis:
        name = line.word("the name of a mesh axis")
        line.expect("=")
        line.space()
        start = line.at
        if (size := line.integer()) < 1:
            raise line.error("a mesh axis has at least 1 rank", start)
        return Axis(name, size)

    def arenas(self, line: _LineCursor) -> Mapping[Phase, int]:
        found: dict[Phase, int] = {}
        while not line.done or not found:
            line.space()
            start = line.at
            phase = line.one_of({p.value: p for p in PROGRAMS}, "a program")
            if phase in found:
                raise line.error("one program has two arenas", start)
            line.expect("=")
            line.space()
            start = line.at
            if (size := line.integer()) < 1:
                raise line.error("an arena has at least 1 byte", start)
            found[phase] = size
        return found

    def declaration(self, line: _LineCursor) -> tuple[str, ExternalOp]:
        line.space()
        at = line.at
        name, positions, flags = line.word("the name of an op"), {"views": (), "writes": ()}, set[str]()
        if wrong := refusal(name):
            raise line.error(wrong, at)
        while not line.done:
            start = line.at
            word = line.word("an effect")
            if word in positions and line.accept("("):
                positions[word] = line.listed(")", line.integer)  # type: ignore[assignment]
            elif word in ("random", "multi", "opaque"):
                flags.add(word)
            else:
                line.at = start
                raise line.error("expected views(...), writes(...), random, multi or opaque")
        return name, ExternalOp(**positions, **{f: f in flags for f in ("random", "multi", "opaque")})  # type: ignore[arg-type]

    def define(self, line: _LineCursor) -> Value:
        line.expect("%")
        start = line.at
        name = line.match(_NAME, "a name")
        if name in self.values:
            line.at = start
            raise line.error(f"%{name} is defined twice")
        line.expect(":")
        value = Value(name, line.type())
        self.values[name] = value
        return value

    def use(self, line: _LineCursor) -> Value:
        line.expect("%")
        start = line.at
        name = line.match(_NAME, "a name")
        if name not in self.values:
            line.at = start
            raise line.error(f"%{name} is not defined above this line")
        return self.values[name]

    def input(self, line: _LineCursor, kind: InputKind) -> Input:
        value = self.define(line)
        target = line.string() if line.peek('"') else ""
        stage = line.integer() if line.accept("stage=") else None
        master = line.one_of(_DTYPES, "a dtype") if line.accept("master=") else None
        offload = line.one_of(_OFFLOADS, "what is offloaded") if line.accept("offload=") else ""
        cuts = tuple((axis, line.placement()) for axis in MODEL_AXES if line.accept(f"{axis}="))
        return Input(kind, value, target, stage, master, offload, cuts)

    def output(self, line: _LineCursor) -> Output:
        phase = line.one_of(self.phases, "a phase")
        kind = line.one_of({k.value: k for k in OutputKind}, "a kind of output")
        target = line.string() if line.peek('"') else ""
        return Output(kind, None if line.accept("none") else self.use(line), target, phase)

    def node(self, line: _LineCursor, phase: Phase, foreign: Mapping[str, ExternalOp]) -> Node:
        results: list[Value] = []
        if line.peek("%"):
            results.append(self.define(line))
            while line.accept(","):
                results.append(self.define(line))
            line.expect("=")
        line.space()
        at = line.at
        op = line.word("the name of an op")
        line.expect("(")
        if op not in OPS and op not in foreign:
            if wrong := refusal(op):
                raise line.error(wrong, at)
            self.undeclared = self.undeclared or line.error(
                f"{op} is neither an op of zgraph's nor declared above with: op {op}", at
            )
        args: list[Arg] = []
        kwargs: list[tuple[str, Arg]] = []

        def one() -> None:
            if key := _KEY.match(line.text, line.at):
                line.at = key.end()
                kwargs.append((key.group(1), self.arg(line)))
            else:
                args.append(self.arg(line))

        line.listed(")", one)
        checkpoint = line.integer() if line.accept("checkpoint=") else 0
        return Node(op, tuple(args), tuple(results), tuple(kwargs), phase, line.origin(), checkpoint)

    def function(self, name: str, line: _LineCursor, at: int) -> Graph:
        if name not in self.subgraphs:
            raise line.error(f'no function "{name[:60]}" is defined above this line', at)
        self.called.add(name)
        return self.subgraphs[name]

    def arg(self, line: _LineCursor, depth: int = 0) -> Arg:
        if depth > _MAX_DEPTH:
            raise line.error(f"lists nest deeper than {_MAX_DEPTH}")
        if line.peek("%"):
            return self.use(line)
        if line.accept("["):
            return line.listed("]", lambda: self.arg(line, depth + 1))
        if line.peek('"'):
            return line.string()
        line.space()
        if NUMBER.match(line.text, line.at):
            return line.number()
        start = line.at
        word = line.word("an argument")
        constants: dict[str, Arg] = {"none": None, "true": True, "false": False, "nan": math.nan, "inf": math.inf}
        if word in constants:
            return constants[word]
        if word in _DTYPES:
            return _DTYPES[word]
        if line.accept("("):
            line.space()
            inside = line.at
            token = Token(word, line.string())
            if word == "graph":
                line.expect(")")
                return self.function(token.name, line, inside)
            if wrong := token_refusal(token.kind, token.name):
                raise line.error(wrong, start if token.kind not in TOKENS else inside)
            line.expect(")")
            return token
        line.at = start
        raise line.error("expected a value, number, string, list, dtype or constant")
