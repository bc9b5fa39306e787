"""One invalid graph for each way to break each rule: the error names the rule and the value, and shows the line."""

import time

import pytest

from zgraph.errors import VerifyError
from zgraph.ir import (
    DType,
    Graph,
    Input,
    InputKind,
    Node,
    Output,
    OutputKind,
    Phase,
    TensorType,
    Value,
    allow_namespace,
    parse_graph,
    verify,
)
from zgraph.ir.verifier import CHECKS

allow_namespace("_c10d_functional")

HEAD = """graph "g" mesh(shard=2)
op aten.mm.default
op aten.t.default views(0)
op aten.some.op views(1, 2)
param %w: f32[4]<S0> "w"
param %late: f32[4]<S0> "late" stage=1
param %far: f32[4]<S0> "far" stage=2 offload=optimizer
buffer %b: f32[9]<V> "b"
buffer %c: f32[4]<R> "c"
input %x: f32[4]<V>
input %n: int
tangent %t: f32[4]<V>
"""

GATHER = """fwd %f: future f32[4]<R> = all_gather_start(%w)
fwd %full: f32[4]<R> = wait(%f)
"""

PENDING = """bwd %p: f32[4]<P(mean)> = pending(%t, reduce="mean")
"""

MEAN = (
    PENDING
    + """bwd %s: future f32[4]<S0> = reduce_scatter_start(%p)
bwd %g: f32[4]<S0> = wait(%s)
"""
)

FUNCTION = """op higher_order.map_impl.default multi
graph "f"
  op _c10d_functional.all_reduce.default
  op aten.relu_.default writes(0)
  input %a: f32[]
  {}
  return fwd output %a
end
!fwd %y: f32[4]<V> = {}(graph("f"), [%x], [])
"""
"""A function with a line in it, and the op that calls it."""

MAP = "higher_order.map_impl.default"

# The rule, what the message must say, and the lines after HEAD; the line at fault is marked with !.
FAULTS = [
    ("ssa", "%y reads %y", "!fwd %y: f32[4]<V> = copy(%y)"),
    ("phases", "%z is in phase fwd, but stands after", "bwd %y: f32[4]<V> = copy(%x)\n!fwd %z: f32[4]<V> = copy(%x)"),
    ("phases", "%z is in phase bwd, but stands after", "upd %y: f32[4]<V> = copy(%x)\n!bwd %z: f32[4]<V> = copy(%x)"),
    ("phases", "%y is in the forward but reads a tangent", "!fwd %y: f32[4]<V> = copy(%t)"),
    ("phases", "returns %y in phase fwd, before", "bwd %y: f32[4]<V> = copy(%x)\nreturn fwd output %y"),
    ("phases", "returns the tangent %t", "return fwd output %t"),
    ("types", "%y gives f32[9]<V>, but copy makes f32[4]<V>", "!fwd %y: f32[9]<V> = copy(%x)"),
    ("types", "%y all_gather_start: its operand", "!fwd %y: future f32[4]<R> = all_gather_start(%x)"),
    ("types", "copy: takes one operand", "!fwd %y: f32[4]<V> = copy(%x, %x)"),
    ("types", "%y cast: operand 0 is int", "!fwd %y: f32[9] = cast(%n, dtype=f32)"),
    ("types", "%y gives f32[4]<V>, but release makes nothing", "!fwd %y: f32[4]<V> = release(%x)"),
    ("subgraphs", "%y aten.t.default is no higher-order op", FUNCTION.format("", "aten.t.default")),
    ("subgraphs", "has the input %b, a param; whatever", FUNCTION.format('param %b: f32[] "b"', MAP)),
    ("subgraphs", "has an output that is a", FUNCTION.format('return fwd grad "a" %a', MAP)),
    ("subgraphs", "has copy, which", FUNCTION.format("fwd %b: f32[] = copy(%a)", MAP)),
    ("subgraphs", "writes to memory", FUNCTION.format("fwd %b: f32[] = aten.relu_.default(%a)", MAP)),
    ("subgraphs", "in another phase", FUNCTION.format("bwd %b: f32[] = aten.relu_.default(%a)", MAP)),
    (
        "subgraphs",
        "no valid graph at %b: %b has 1 placements for 0",
        FUNCTION.format("fwd %b: f32[]<V> = _c10d_functional.all_reduce.default(%a)", MAP).replace(
            "_c10d_functional.all_reduce", "aten.neg"
        ),
    ),
    (
        "subgraphs",
        "has _c10d_functional.all_reduce.default, which is between ranks",
        FUNCTION.format("fwd %b: f32[] = _c10d_functional.all_reduce.default(%a)", MAP),
    ),
    ("placements", "the input %z has 0 placements, not 1", "input %z: f32[9]"),
    ("placements", "%y has 2 placements for 1", "!fwd %y: f32[4]<V, V> = aten.t.default(%x)"),
    ("placements", "sharded or partial operand", "!fwd %y: f32[4]<V> = aten.mm.default(%x, %w)"),
    ("placements", "%y is called replicated", "!fwd %y: f32[4]<R> = aten.t.default(%x)"),
    ("placements", "%y is called f32[4]<S0>", "!fwd %y: f32[4]<S0> = aten.t.default(%x)"),
    ("placements", "%y is called f32[4]<P(mean)>", "!fwd %y: f32[4]<P(mean)> = aten.t.default(%x)"),
    ("placements", "sharded or partial operand", PENDING + "!bwd %y: f32[4]<V> = aten.t.default(%p)"),
    (
        "types",
        "broadcast_start: its operand must be placed P(root)",
        PENDING + "!bwd %y: future f32[4]<R> = broadcast_start(%p)",
    ),
    (
        "types",
        "all_reduce_start: its operand must be placed P(sum) or P(mean)",
        'bwd %p: f32[4]<P(root)> = pending(%t, reduce="root")\n!bwd %y: future f32[4]<R> = all_reduce_start(%p)',
    ),
    ("types", "not f32[4]<V>; say with pending", "!bwd %y: future f32[4]<R> = all_reduce_start(%t)"),
    ("types", "not f32[4]<V>; say with pending", "!bwd %y: f32[4]<S0> = reshard(%t)"),
    ("types", "makes f32[4]<R> or f32[4]<S0> of %p, not f32[4]<V>", PENDING + "!bwd %y: f32[4]<V> = reshard(%p)"),
    (
        "types",
        "pending: says what values of the ranks' own are together, and f32[4]<S0> is none",
        MEAN + '!bwd %y: f32[4]<S0> = pending(%g, reduce="mean")',
    ),
    ("types", "reduce_scatter_start: its operand", MEAN + "!bwd %y: future f32[4]<S0> = reduce_scatter_start(%g)"),
    ("types", "pending: needs reduce=", "!bwd %y: f32[4]<P(mean)> = pending(%t)"),
    (
        "types",
        "%y gives f32[4]<P(sum)>, but pending makes f32[4]<P(mean)>",
        '!bwd %y: f32[4]<P(sum)> = pending(%t, reduce="mean")',
    ),
    ("types", "accumulate: its operand must be placed", '!bwd %y: f32[4]<V> = accumulate(%t, target="w")'),
    (
        "spaces",
        "%y aten.t.default computes on the device, but %h",
        "fwd %f: future f32[4]<V>@host = offload_start(%x)\nfwd %h: f32[4]<V>@host = wait(%f)\n"
        "!fwd %y: f32[4]<V> = aten.t.default(%h)",
    ),
    ("spaces", "%y aten.t.default computes on the device, but %y", "!fwd %y: f32[4]<V>@host = aten.t.default(%x)"),
    ("futures", "reads the future %f without waiting", GATHER + "!fwd %y: f32[4]<R> = aten.t.default(%f)"),
    ("futures", "%f is waited for 0 times", "!fwd %f: future f32[4]<R> = all_gather_start(%w)"),
    (
        "futures",
        "%f is waited for 2 times",
        "!fwd %f: future f32[4]<R> = all_gather_start(%w)\nfwd %y: f32[4]<R> = wait(%f)\nfwd %z: f32[4]<R> = wait(%f)",
    ),
    (
        "futures",
        "%y waits in bwd for what fwd started",
        "fwd %f: future f32[4]<R> = all_gather_start(%w)\n!bwd %y: f32[4]<R> = wait(%f)",
    ),
    (
        "futures",
        "%f is returned",
        "!fwd %f: future f32[4]<R> = all_gather_start(%w)\nfwd %y: f32[4]<R> = wait(%f)\nreturn fwd output %f",
    ),
    (
        "futures",
        "%y is called a future",
        "!fwd %y: future f32[4]<V> = aten.t.default(%x)\nfwd %z: f32[4]<V> = wait(%y)",
    ),
    (
        "lifetimes",
        "reads %full, whose memory was released by release(%full)",
        GATHER + "fwd release(%full)\n!fwd %y: f32[4]<R> = copy(%full)",
    ),
    ("lifetimes", "reads %full", GATHER + "fwd release(%full)\n!fwd release(%full)"),
    (
        "lifetimes",
        "reads %view",
        GATHER + "fwd %view: f32[4]<R> = aten.t.default(%full)\nfwd release(%full)\n!fwd %y: f32[4]<R> = copy(%view)",
    ),
    (
        "lifetimes",
        "reads %full",
        GATHER + "fwd %view: f32[4]<R> = aten.t.default(%full)\nfwd release(%view)\n!fwd %y: f32[4]<R> = copy(%full)",
    ),
    (
        "lifetimes",
        "reads %either",
        GATHER + "fwd %either: f32[4]<V> = aten.some.op(%n, %x, %full)\n"
        "fwd release(%full)\n!fwd %y: f32[4]<V> = copy(%either)",
    ),
    (
        "lifetimes",
        "returns %view, whose memory was released",
        GATHER + "fwd %view: f32[4]<R> = aten.t.default(%full)\nfwd release(%full)\nreturn fwd output %view",
    ),
    (
        "arenas",
        "needs an offset for each result, not at=[]",
        "!fwd %f: future f32[4]<R> = all_gather_start(%w, at=[])\nfwd %y: f32[4]<R> = wait(%f)",
    ),
    (
        "arenas",
        "needs an offset for each result, not at=[true]",
        "!fwd %f: future f32[4]<R> = all_gather_start(%w, at=[true])\nfwd %y: f32[4]<R> = wait(%f)",
    ),
    (
        "arenas",
        "needs an offset for each result, not at=0",
        "!fwd %f: future f32[4]<R> = all_gather_start(%w, at=0)\nfwd %y: f32[4]<R> = wait(%f)",
    ),
    (
        "arenas",
        "needs an offset for each result, not at=[]",
        "fwd %f: future f32[4]<R> = all_gather_start(%w)\nfwd %y: f32[4]<R> = wait(%f)\n!fwd release(%y, at=[])",
    ),
    (
        "arenas",
        "%f lies at [511], but in an arena every offset is a multiple of 512 bytes",
        "arena fwd=1024\n!fwd %f: future f32[4]<R> = all_gather_start(%w, at=[511])\nfwd %y: f32[4]<R> = wait(%f)",
    ),
    (
        "arenas",
        "%f lies at [-512]",
        "arena fwd=512\n!fwd %f: future f32[4]<R> = all_gather_start(%w, at=[-512])\nfwd %y: f32[4]<R> = wait(%f)",
    ),
    (
        "arenas",
        "%f ends at byte 1,024 of the arena, which has 512",
        "arena fwd=512\n!fwd %f: future f32[4]<R> = all_gather_start(%w, at=[512])\nfwd %y: f32[4]<R> = wait(%f)",
    ),
    (
        "arenas",
        "%f ends at byte 512 of the arena, which has 500",
        "arena fwd=500\n!fwd %f: future f32[4]<R> = all_gather_start(%w, at=[0])\nfwd %y: f32[4]<R> = wait(%f)",
    ),
    (
        "arenas",
        "of the arena, whose size is not stated: arena bwd=512",
        "!bwd %f: future f32[4]<R> = all_gather_start(%w, at=[0])\nbwd %y: f32[4]<R> = wait(%f)",
    ),
    ("arenas", "states an arena of 512 bytes for fwd, but nothing lies in it", "arena fwd=512\n" + GATHER),
    (
        "arenas",
        "states an arena of 10,240 bytes for bwd, but 512 are needed",
        "arena bwd=10240\nbwd %f: future f32[4]<R> = all_gather_start(%w, at=[0])\nbwd %y: f32[4]<R> = wait(%f)",
    ),
    (
        "arenas",
        "%g lies in the memory of %f",
        "fwd %f: future f32[4]<R> = all_gather_start(%w, at=[0])\n"
        "!fwd %g: future f32[4]<R> = all_gather_start(%w, at=[0])\n"
        "fwd %y: f32[4]<R> = wait(%f)\nfwd %z: f32[4]<R> = wait(%g)",
    ),
    (
        "arenas",
        "%f outlives its arena",
        "!fwd %f: future f32[4]<R> = all_gather_start(%w, at=[0])\nfwd %y: f32[4]<R> = wait(%f)\nreturn fwd output %y",
    ),
    (
        "targets",
        "the grad of %w is f32[9]<V>, but it is f32[4]<S0>",
        'bwd %g: f32[9]<V> = copy(%b)\nreturn bwd grad "w" %g',
    ),
    (
        "targets",
        "the grad of %w is f64[4]<V>, but it is f32[4]<S0>",
        'bwd %g: f64[4]<V> = cast(%x, dtype=f64)\nreturn bwd grad "w" %g',
    ),
    (
        "targets",
        "the grad of %w is f32[4]<V>, but it must lie as %w does, which is f32[4]<S0>",
        '!bwd %g: f32[4]<V> = copy(%t)\nreturn bwd grad "w" %g',
    ),
    ("targets", "the grad of %w is f32[4]<V>, but it must lie as %w does", 'return bwd grad "w" %t'),
    (
        "targets",
        "the grad of %w is f32[4]<P(mean)>: it is pending, and must be reduced to f32[4]<S0>",
        PENDING.replace("bwd", "!bwd") + 'return bwd grad "w" %p',
    ),
    (
        "targets",
        "the grad of %w is f32[4]<R>, but it must lie as %w does",
        PENDING + "bwd %s: future f32[4]<R> = all_reduce_start(%p)\n!bwd %g: f32[4]<R> = wait(%s)\n"
        'return bwd grad "w" %g',
    ),
    (
        "targets",
        "the grad of %far is f32[4]<S0>, but its master is the host's",
        MEAN.replace("bwd %g", "!bwd %g") + 'return bwd grad "far" %g',
    ),
    (
        "targets",
        "the grad of %w is f32[4]<S0>@host, but its master is the device's",
        MEAN + "bwd %o: future f32[4]<S0>@host = offload_start(%g)\n!bwd %h: f32[4]<S0>@host = wait(%o)\n"
        'return bwd grad "w" %h',
    ),
    (
        "targets",
        "the grad of %late is f32[4]<S0> of stage 1, and returned in phase bwd, not upd",
        MEAN.replace("bwd %g", "!bwd %g") + 'return bwd grad "late" %g',
    ),
    (
        "targets",
        "the mutation of %c is f32[4]<V>, but it must lie as %c does, which is f32[4]<R>",
        'return fwd mutation "c" %x',
    ),
    (
        "targets",
        "the mutation of %c is f32[4]<P(root)>: it is pending",
        '!fwd %p: f32[4]<P(root)> = pending(%x, reduce="root")\nreturn fwd mutation "c" %p',
    ),
    ("targets", 'grad of "nothing"', 'return bwd grad "nothing" %x'),
    ("targets", 'mutation of "model.b"', 'return fwd mutation "model.b" %b'),
    ("targets", "the mutation of %b is f32[4]<V>", 'return fwd mutation "b" %x'),
]


@pytest.mark.parametrize(("rule", "words", "lines"), FAULTS, ids=[f"{rule}-{words}" for rule, words, _ in FAULTS])
def test_an_invalid_graph_is_refused(rule, words, lines):
    with pytest.raises(VerifyError) as caught:
        verify(parse_graph(HEAD + lines.replace("!", "")))
    message = str(caught.value)
    assert message.startswith(f"[{rule}] ")
    assert words in message.splitlines()[0]
    if marked := [line for line in lines.splitlines() if line.startswith("!")]:
        assert "  > " + marked[0].removeprefix("!") in message.splitlines()


X, OTHER = Value("x", TensorType(DType.f32, (4,))), Value("x", TensorType(DType.f32, (9,)))
Y = Value("y", X.type)

UNWRITABLE = {  # faults that the parser refuses before the verifier could
    "two inputs share a name": Graph("g", (Input(InputKind.input, X), Input(InputKind.input, X))),
    "reads %y, which nothing above it defines": Graph("g", (), (Node("copy", (Y,), (X,)),)),
    "reads %x as f32[9], but it is f32[4]": Graph("g", (Input(InputKind.input, X),), (Node("copy", (OTHER,), (Y,)),)),
    "defines %x, which is defined already": Graph("g", (Input(InputKind.input, X),), (Node("copy", (X,), (X,)),)),
    "returns %y, which nothing defines": Graph("g", (), (), (Output(OutputKind.output, Y),)),
    "returns %x, which nothing defines with that type": Graph(
        "g", (Input(InputKind.input, X),), (), (Output(OutputKind.output, OTHER),)
    ),
}


@pytest.mark.parametrize("words", UNWRITABLE)
def test_an_invalid_graph_made_by_hand_is_refused(words):
    with pytest.raises(VerifyError) as caught:
        verify(UNWRITABLE[words])
    assert str(caught.value).startswith("[ssa] ")
    assert words in str(caught.value)


def test_every_rule_has_a_graph_that_breaks_it():
    elsewhere = {"known_ops", "orders"}  # orders: tests/interp/test_own_rows.py
    assert {rule.__name__ for rule in CHECKS} == {rule for rule, _, _ in FAULTS} | elsewhere


def test_an_op_that_is_not_declared():
    """No text has one: it does not parse. A pass may make one."""
    graph = parse_graph(HEAD)
    entry = next(i for i in graph.inputs if i.value.name == "x")
    node = Node("aten.nope.default", (entry.value,), (Value("y", entry.value.type),))
    with pytest.raises(VerifyError, match=r"\[known_ops\] %y aten.nope.default is neither an op of zgraph's"):
        verify(graph.with_nodes([node]))


def test_what_the_faults_are_made_of_is_valid():
    verify(parse_graph(HEAD + GATHER + "fwd release(%full)\n" + MEAN + 'return bwd grad "w" %g\n'))
    on_host = "bwd %o: future f32[4]<S0>@host = offload_start(%g)\nbwd %h: f32[4]<S0>@host = wait(%o)\n"
    verify(parse_graph(HEAD + MEAN + on_host + 'return bwd grad "far" %h\n'))
    verify(
        parse_graph(HEAD + MEAN.replace("bwd %s", "upd %s").replace("bwd %g", "upd %g") + 'return upd grad "late" %g\n')
    )
    root = 'fwd %p: f32[4]<P(root)> = pending(%x, reduce="root")\nfwd %s: future f32[4]<R> = broadcast_start(%p)\n'
    verify(parse_graph(HEAD + root + 'fwd %new: f32[4]<R> = wait(%s)\nreturn fwd mutation "c" %new\n'))


def test_where_no_mesh_is_placements_are_not_asked_for():
    lines = 'param %w: f32[4] "w" stage=2 offload=optimizer\ntangent %t: f32[4]\nreturn bwd grad "w" %t\n'
    verify(parse_graph('graph "g"\n' + lines))


def test_a_gradient_that_no_batch_is_in_becomes_each_ranks_own_first():
    """As the type says, it is the same on all ranks: it takes a copy to average it like any other."""
    lines = GATHER + "bwd %own: f32[4]<V> = copy(%full)\n" + MEAN.replace("%t", "%own")
    verify(parse_graph(HEAD + lines + 'return bwd grad "w" %g\n'))


def test_an_arena_of_no_program_is_refused():
    with pytest.raises(VerifyError, match=r"\[arenas\] states an arena of 512 bytes for upd, but nothing lies in it"):
        verify(Graph("g", arenas={Phase.update: 512}))


def test_the_error_says_where_the_node_comes_from():
    text = HEAD + 'fwd %y: f32[9]<V> = copy(%x) @ "layers.3.mlp" "model.py":12 by all-gather\n'
    with pytest.raises(VerifyError) as caught:
        verify(parse_graph(text))
    assert "from model.py:12 in layers.3.mlp" in str(caught.value)
    assert "put there by the pass all-gather" in str(caught.value)


def test_a_big_graph_is_verified_fast_and_its_error_is_short():
    lines = [f"fwd %v{i + 1}: f32[4]<V> = aten.mm.default(%v{i}, %x)" for i in range(10_000)]
    lines[0] = lines[0].replace("%v0", "%x")
    began = time.process_time()
    verify(parse_graph(HEAD + "\n".join(lines)))
    assert time.process_time() - began < 10
    lines[5000] = "fwd %v5001: f32[9]<V> = copy(%v5000)" + ' @ "m" "' + "long/" * 100 + '.py":1'
    with pytest.raises(VerifyError) as caught:
        verify(parse_graph(HEAD + "\n".join(lines)))
    shown = str(caught.value).splitlines()
    assert len(shown) < 30
    assert sum("%v" in line for line in shown) == 6  # the first line and a window of five
    assert shown[0].startswith("[types] %v5001 ")


def test_a_long_line_is_cut():
    text = HEAD + "fwd %y: f32[9]<V> = copy(%x, " + ", ".join(["1"] * 1000) + ")\n"
    with pytest.raises(VerifyError) as caught:
        verify(parse_graph(text))
    assert max(map(len, str(caught.value).splitlines())) < 200
