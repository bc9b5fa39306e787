"""Text that does not parse is refused with its line number and a caret under the first character at fault."""

import pytest

from zgraph.errors import ZirError
from zgraph.ir import parse_graph

HEAD = 'graph "g" mesh(shard=2)\nop aten.op.default\ninput %x: f32[4]<V>\n'
CALL = "fwd %y: f32[4]<V> = aten.op.default"

# A line that stands fourth, the mark ^ before what is at fault, and words that the message must have.
LINES = [
    ("^what %y", "expected op, graph, arena, param"),
    (CALL + '(%x, graph(^"f"))', 'no function "f"'),
    ("arena^", "a program"),
    ("arena ^upd=512", "a program, one of fwd, bwd"),
    ("arena fwd ^512", "'='"),
    ("arena fwd=512 ^fwd=512", "one program has two arenas"),
    ("arena fwd=^0", "at least 1 byte"),
    ("arena fwd=^x", "integer"),
    ("arena fwd=512 ^3", "a program"),
    ("op ^7", "name of an op"),
    ("op aten.b.default ^reads(1)", "views"),
    ("op aten.b.default views(^x)", "integer"),
    ("param ^w: f32[4]<R>", "'%'"),
    ("param %w ^f32[4]<R>", "':'"),
    ('param %w: f32[4]<R> "w" stage=^x', "integer"),
    ('param %w: f32[4]<R> "w" master=^f31', "f32"),
    ('param %w: f32[4]<R> "w" ^more', "after the end"),
    ("input %^x: f32[4]<V>", "twice"),
    ("input %z: ^f33[4]<V>", "dtypes are"),
    ("input %z: ^number", "not a type"),
    ("input %z: future ^int", "not a type"),
    ("input %z: f32[4]<^Q>", "placement"),
    ("input %z: f32[4]<^S>", "placement"),
    ("input %z: f32[4]<^P>", "P is not a placement: R, V, P(sum), P(mean), P(root), P(max), or S, G or O and a dim"),
    ("input %z: f32[4]<^P()>", "placement"),
    ("input %z: f32[4]<^P(min)>", "placement"),
    ("input %z: f32[4]<^V(sum)>", "placement"),
    ("input %z: f32[4]<R, ^P(sum>", "placement"),
    ("input %z: f32[4]<V^", "','"),
    ("input %z: f32[4, ^s0 +]<V>", "not a size"),
    ("input %z: f32[4, ^s0.real, 4]<V>", "a size has"),
    ("input %z: f32[^1/2]<V>", "whole"),
    ("input %z: f32[4]<V>@^", "memory space"),
    ("input %z: int(^s0, s1)", "one expression"),
    ("fwd %^x: f32[4]<V> = aten.op.default(%x)", "twice"),
    ("fwd %y: f32[4]<V> ^aten.op.default(%x)", "'='"),
    ("fwd %y: f32[4]<V>, ^= aten.op.default(%x)", "'%'"),
    (CALL + "^", "'('"),
    ("fwd %y: f32[4]<V> = ^aten.nope.default(%x)", "neither an op of zgraph's nor declared"),
    (CALL + "(%x, ^?)", "argument"),
    (CALL + "(%^z)", "not defined above"),
    (CALL + "(%x, ^bogus)", "expected a value"),
    (CALL + "(%x, ^-)", "argument"),
    (CALL + "(%x ^1)", "','"),
    (CALL + "(%x, [1^)", "','"),
    (CALL + '(%x, ^"a)', "string"),
    (CALL + '(%x, ^"\\q")', "string"),
    (CALL + "(%x, device(^cpu))", "string"),
    (CALL + "(%x) ^by", "after the end"),
    (CALL + "(%x) @ ^model", "string"),
    (CALL + '(%x) @ ^"\\q"', "string"),
    (CALL + '(%x) @ "m" "f.py" ^3', "':'"),
    ("return ^now output %x", "phase"),
    ("return fwd ^bogus %x", "kind of output"),
    ("return fwd output ^x", "'%'"),
    ("return fwd output %^z", "not defined"),
]


@pytest.mark.parametrize(("marked", "words"), LINES, ids=[line for line, _ in LINES])
def test_a_bad_line_is_refused_where_it_is_bad(marked, words):
    line, column = marked.replace("^", ""), marked.index("^")
    with pytest.raises(ZirError) as caught:
        parse_graph(HEAD + line + "\nreturn fwd output %x\n")
    message, shown, caret = str(caught.value).split("\n")
    assert message.startswith("line 4: ")
    assert words in message
    assert shown == f"  {line}"
    assert caret == "  " + " " * column + "^"
    assert (caught.value.line, caught.value.column) == (4, column)


HEADS = [
    ("^grap", "'graph'"),
    ("graph^", "string"),
    ("graph ^g", "string"),
    ('graph "g" ^mash(a=2)', "after the end"),
    ('graph "g" mesh(shard^)', "'='"),
    ('graph "g" mesh(shard=^a)', "integer"),
]


@pytest.mark.parametrize(("marked", "words"), HEADS)
def test_a_bad_first_line_is_refused_where_it_is_bad(marked, words):
    with pytest.raises(ZirError, match="line 1: ") as caught:
        parse_graph(marked.replace("^", ""))
    assert words in str(caught.value)
    assert caught.value.column == marked.index("^")


@pytest.mark.parametrize("mesh", ["a=0", "a=-3", "a=2, a=2", "a=99999999999999999999999"])
def test_a_mesh_must_mean_something(mesh):
    with pytest.raises(ZirError, match="line 1"):
        parse_graph(f'graph "g" mesh({mesh})\n')


@pytest.mark.parametrize("text", ["", "\n \n", "# nothing but a comment\n"])
def test_an_empty_text_says_how_a_graph_begins(text):
    with pytest.raises(ZirError, match='begins with: graph "name"'):
        parse_graph(text)


def test_an_error_in_a_long_line_shows_its_neighbourhood_only():
    line = CALL + "(" + "%x, " * 1000 + "?, " + "%x, " * 1000 + ")"
    with pytest.raises(ZirError) as caught:
        parse_graph(HEAD + line)
    _, shown, caret = str(caught.value).split("\n")
    assert len(shown) < 200
    assert shown[len(caret) - 1] == "?"


HOSTILE = {
    "a number of 5000 digits": f"({'9' * 5000})",
    "a string of 2 MB without an end": '("' + "a" * 2_000_000,
    "100,000 open lists": "(" + "[" * 100_000,
    "a megabyte of junk": "(%x)" + " @" * 500_000,
}


@pytest.mark.parametrize("tail", HOSTILE.values(), ids=HOSTILE)
def test_hostile_lines_are_refused(tail):
    with pytest.raises(ZirError) as caught:
        parse_graph(HEAD + CALL + tail)
    assert len(str(caught.value)) < 1000
