"""A graph and its text are the same thing: what is printed reads back equal, and prints the same again."""

import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.ir.strategies import graphs
from zgraph.ir import (
    Axis,
    DType,
    ExternalOp,
    Graph,
    Grouped,
    Input,
    InputKind,
    Node,
    NoneType,
    Origin,
    Output,
    OutputKind,
    Partial,
    Phase,
    Replicate,
    ScalarType,
    Shard,
    TensorType,
    Token,
    Value,
    Varying,
    fingerprint,
    parse_graph,
    print_graph,
    verify,
)
from zgraph.ir.symbols import parse_dim
from zgraph.ir.types import REDUCTIONS

X = Value("x", TensorType(DType.f32, (4,)))

INNER = Graph(
    "inner", (Input(InputKind.input, X),), (), (Output(OutputKind.output, X), Output(OutputKind.output, None))
)
OUTER = Graph(
    "outer",
    (Input(InputKind.input, X),),
    (Node("aten.op.default", (X, (INNER, 1), INNER), (), origin=Origin("m", "f.py", 3)),),
    foreign={"aten.op.default": ExternalOp(multi=True)},
)

ARGS = [
    OUTER,
    (OUTER, INNER, OUTER),
    X,
    None,
    True,
    False,
    0,
    -7,
    2**70,
    1.5,
    -0.0,
    0.0,
    1e-300,
    1e300,
    0.1,
    math.inf,
    -math.inf,
    math.nan,
    (math.nan,),
    "",
    "plain",
    'a "quote" and a \\',
    "line\nbreak\ttab",
    "ünïcode ∂ 漢字 \U0001f9ee",
    "\u2028 \x85 \x1c",
    "%x",
    "none",
    "# no comment",
    *DType,
    Token("device", "cpu"),
    Token("memory_format", "channels_last"),
    (),
    (1,),
    (X, (X, None, (1.0, "a,]"))),
    ((), ((),)),
]

TYPES = [
    TensorType(DType.bf16, ()),
    TensorType(DType.f32, (0, 3)),
    TensorType(DType.i64, (2, 3), strides=(1, 2)),
    TensorType(DType.f32, (4,), placement=(Replicate(),)),
    TensorType(DType.f32, (4, 5), placement=(Shard(1), Partial("sum"))),
    TensorType(DType.f32, (4, 5), placement=(Partial("mean"), Partial("root"))),
    TensorType(DType.f32, (4,), placement=(Varying(),), space="host", future=True),
    TensorType(DType.f8e4m3, (parse_dim("s0"), parse_dim("2*s0 + 1")), strides=(1, parse_dim("s0"))),
    TensorType(DType.f32, (parse_dim("Mod(s1, 8)"), parse_dim("Max(1, floor(s0/2))"))),
    ScalarType("int"),
    ScalarType("int", parse_dim("s0*s1")),
    ScalarType("int", 3),
    ScalarType("float"),
    ScalarType("bool"),
    NoneType(),
]


def one_node(*args: object, made: object = X.type, **options: object) -> Graph:
    node = Node("aten.op.default", args, (Value("y", made),), tuple(options.items()))  # type: ignore[arg-type]
    return Graph("g", (Input(InputKind.input, X),), (node,), foreign={"aten.op.default": ExternalOp()})


def same(a: Graph) -> None:
    text = print_graph(a)
    back = parse_graph(text)
    assert back == a
    assert print_graph(back) == text


@pytest.mark.parametrize("arg", ARGS, ids=repr)
def test_every_form_of_argument_comes_back(arg):
    same(one_node(arg, key=arg))
    (back,) = parse_graph(print_graph(one_node(arg))).nodes
    assert type(back.args[0]) is type(arg)
    if arg == 0:
        assert math.copysign(1, back.args[0]) == math.copysign(1, arg)


@pytest.mark.parametrize("kind", TYPES, ids=str)
def test_every_form_of_type_comes_back(kind):
    same(one_node(X, made=kind))
    same(Graph("g", (Input(InputKind.input, Value("x", kind)),)))


PLACEMENTS = st.one_of(
    st.builds(Replicate),
    st.builds(Varying),
    st.builds(Shard, st.integers(0, 99)),
    st.builds(Grouped, st.integers(0, 99)),
    st.builds(Partial, st.sampled_from(REDUCTIONS)),
)


@settings(max_examples=60, deadline=None)
@given(st.lists(PLACEMENTS, max_size=4), st.sampled_from(("device", "host")), st.booleans())
def test_every_placement_comes_back(placement, space, future):
    kind = TensorType(DType.f32, (4, 5), placement=tuple(placement), space=space, future=future)
    same(one_node(X, made=kind))
    (back,) = parse_graph(print_graph(one_node(X, made=kind))).nodes
    assert back.results[0].type == kind
    assert str(back.results[0].type) == str(kind)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_a_pending_reduction_comes_back(reduction):
    text = (
        'graph "g" mesh(replicate=2, shard=2)\ninput %x: f32[4]<R, V>\n'
        f'bwd %y: f32[4]<R, P({reduction})> = pending(%x, reduce="{reduction}")\nreturn bwd output %y\n'
    )
    graph = parse_graph(text)
    verify(graph)
    same(graph)
    assert print_graph(graph) == text
    assert graph.nodes[0].results[0].tensor.reduction == reduction


def test_every_kind_of_input_and_output_comes_back():
    inputs = [Input(kind, replace(X, name=kind.value), 'a "target"') for kind in InputKind]
    inputs += [Input(InputKind.param, replace(X, name=f"p{s}"), "w", s, DType.f64) for s in (None, 0, 3)]
    outputs = [Output(k, v, t, p) for k in OutputKind for v in (X, None) for t in ("", "w.x") for p in Phase]
    same(Graph("", (Input(InputKind.input, X), *inputs), (), tuple(outputs)))


def test_mesh_effects_phases_and_origins_come_back():
    foreign = {
        "aten.a.default": ExternalOp(),
        "aten.b.out": ExternalOp(views=(0, 2), writes=(1,), random=True, multi=True, opaque=True),
    }
    origins = [
        Origin(),
        Origin("layer.0"),
        Origin("", "a b.py", 3),
        Origin("m", 'q".py', 9, "all-gather"),
        Origin("m", made_by="dce"),
    ]
    nodes = [
        Node("aten.a.default", (), (Value(f"{p.name}{i}", X.type),), phase=p, origin=o)
        for p in Phase
        for i, o in enumerate(origins)
    ]
    nodes.append(Node("aten.b.out", (), ()))
    same(Graph('a "name"', (), tuple(nodes), (), (Axis("shard", 4), Axis("tp", 2)), foreign))


@pytest.mark.parametrize("arenas", [{Phase.forward: 512}, {Phase.backward: 1024, Phase.forward: 512}])
def test_the_sizes_of_arenas_come_back(arenas):
    same(Graph("g", (Input(InputKind.input, X),), arenas=arenas))


def test_text_is_read_whatever_its_spacing_and_comments():
    text = '# a comment\n\ngraph "g"\n  # another\nop   aten.neg.default\ninput %x : f32[ 4 ]\n'
    text += "  fwd %y:f32[4]=aten.neg.default( %x )\nreturn fwd output %y\n"
    assert print_graph(parse_graph(text)).splitlines() == [
        'graph "g"',
        "op aten.neg.default",
        "input %x: f32[4]",
        "fwd %y: f32[4] = aten.neg.default(%x)",
        "return fwd output %y",
    ]


@settings(max_examples=60, deadline=None)
@given(graphs())
def test_random_graphs_are_valid_and_come_back(graph):
    verify(graph)
    same(graph)


def test_fingerprint_tells_programs_apart_but_not_machines():
    graph = one_node(X, 1)
    elsewhere = graph.with_nodes([replace(graph.nodes[0], origin=Origin("m", "/other/place.py", 4))])
    assert fingerprint(elsewhere) == fingerprint(graph)
    assert print_graph(elsewhere) != print_graph(graph)
    assert fingerprint(one_node(X, 2)) != fingerprint(graph)
    assert fingerprint(one_node(X, 1, made=TensorType(DType.f32, (5,)))) != fingerprint(graph)


@settings(max_examples=60, deadline=None)
@given(st.floats(), st.text())
def test_any_float_and_any_string_come_back(number, text):
    (back,) = parse_graph(print_graph(one_node(number, text))).nodes
    assert repr(back.args[0]) == repr(number)
    assert back.args[1] == text
