"""No name in a file is looked up anywhere but in closed lists: a run file runs ops, and no other code."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.cli.graphs import long
from zgraph.bridge.aten import op_name, resolve
from zgraph.cli.main import main
from zgraph.errors import UnknownOpError, UsageError, ZirError
from zgraph.ir import ExternalOp, Graph, Input, InputKind, Node, ScalarType, Value, allow_namespace, parse_graph
from zgraph.ir.names import SCALAR_FUNCTIONS, refusal
from zgraph.passes import Context
from zgraph.runfile.format import Provenance, run_file

EVIL = """graph "evil"
op aten.__class__.__init__.__builtins__.get
op py.call
op aten.neg.default
input %x: f32[2]
fwd %e: int = aten.__class__.__init__.__builtins__.get("eval")
fwd %r: int = py.call(%e, "__import__('pathlib').Path('owned').touch()")
fwd %y: f32[2] = aten.neg.default(%x)
return fwd output %y
"""

NAMES = [
    "aten.__class__.__init__.__builtins__.get",
    "aten.__class__.__init__",
    "aten.__dict__.get",
    "aten.neg.__call__",
    "aten.neg",
    "aten",
    "aten.neg.default.decompose",
    "aten.from_file.default",
    "aten.save.default",
    "py.call",
    "py.attrgetter",
    "py.methodcaller",
    "py.itemgetter",
    "py.getitem",
    "py.setitem",
    "py.add.default",
    "py.__call__",
    "math.__loader__",
    "math.prod",
    "torch.load",
    "torch.hub",
    "torch.hub.load",
    "torch.ops",
    "os.system",
    "os.system.default",
    "builtins.eval.default",
    "loaded_libraries.add.x",
    "import_module.a.b",
    "eval",
    "",
    ".eval.x",
    "aten..x",
    "аten.neg.default",
    "torch.sym_not.__self__",
    "prim.Print.default",
    "higher_order.cond",
    "higher_order.cond.call",
    "higher_order.out_dtype.default",
    "higher_order.triton_kernel_wrapper_mutation.default",
]


@pytest.mark.parametrize("name", NAMES)
def test_other_names_are_refused_wherever_they_come_from(name):
    with pytest.raises(UnknownOpError):
        resolve(name)
    for lines in (f"op {name}\n", f"input %x: int\nfwd %y: int = {name}(%x)\n"):
        with pytest.raises(ZirError):
            parse_graph(f'graph "g"\n{lines}')


@pytest.mark.parametrize(
    "target",
    [
        torch.ops.aten.add.Tensor,
        torch.ops.aten.__and__.Scalar,
        torch.ops.aten._to_copy.default,
        torch.ops.prims.sin.default,
        torch.ops.aten.__ixor__.Tensor,
        torch.sym_max,
        torch.sym_not,
        torch._sym_sqrt,
    ],
    ids=str,
)
def test_what_a_capture_names_is_found_again(target):
    name = op_name(target)
    assert name is not None
    assert resolve(name) is target
    assert not refusal(name)


def test_every_function_on_sizes_is_there():
    for module, names in SCALAR_FUNCTIONS.items():
        for name in names:
            assert callable(resolve(f"{module}.{name}"))


def test_namespaces_of_ops_that_were_captured_here_are_known():
    library = torch.library.Library("zgraph_trust_test", "DEF")
    library.define("twice(Tensor x) -> Tensor")
    text = 'graph "g"\nop zgraph_trust_test.twice.default\n'
    with pytest.raises(ZirError, match=r"does not know.*allow_namespace"):
        parse_graph(text)
    assert op_name(torch.ops.zgraph_trust_test.twice.default) == "zgraph_trust_test.twice.default"
    assert "zgraph_trust_test.twice.default" in parse_graph(text).foreign
    for name in ("a.b", "", "__main__", "py", "math", "higher_order"):
        with pytest.raises(UsageError, match="no namespace"):
            allow_namespace(name)


@pytest.mark.parametrize(
    "token", ['device("cuda:0")', 'device("fpga")', 'layout("jagged")', 'memory_format("x")', 'os("x")']
)
def test_constants_are_of_closed_lists(token):
    with pytest.raises(ZirError, match=r"line 3: .*(there are|kinds are)"):
        parse_graph(f'graph "g"\nop aten.neg.default\nfwd %y: int = aten.neg.default({token})\n')


def _evil(path: Path) -> None:
    """A run whose graphs are texts that no `Graph` prints."""
    run = run_file(
        [("captured", long(), 0.0), ("dce", replace(long(), name="b"), 0.0)], Provenance(model="x"), Context()
    )
    run.texts.update(dict.fromkeys(run.texts, EVIL))
    run.save(path)


@pytest.mark.parametrize(
    "arguments",
    [("verify",), ("bisect",), ("reduce",), ("simulate",), ("opt",), ("export", "--dot", "-")],
    ids=str,
)
def test_no_command_runs_what_a_file_names(arguments, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    _evil(Path("evil.zg"))
    monkeypatch.setattr("sys.argv", ["zgraph", arguments[0], "evil.zg", *arguments[1:]])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code
    assert "aten.__class__.__init__" in capfd.readouterr().err
    assert not Path("owned").exists()


def test_compile_does_not_either(tmp_path, monkeypatch):
    import zgraph

    monkeypatch.chdir(tmp_path)
    _evil(Path("evil.zg"))
    with pytest.raises(ZirError, match=r"aten\.__class__"):
        zgraph.compile(torch.nn.Linear(2, 2), passes="evil.zg")(torch.ones(2, 2)).sum().backward()
    assert not Path("owned").exists()


def test_a_graph_made_by_hand_is_not_run_either():
    """A name that no text was read for is still refused where it would run."""
    from zgraph.interpreter import Interpreter

    node = Node("py.call", (1,), (Value("y", ScalarType("int")),))
    graph = Graph(
        "g", (Input(InputKind.input, Value("x", ScalarType("int"))),), (node,), foreign={"py.call": ExternalOp()}
    )
    with pytest.raises(UnknownOpError):
        Interpreter().run(graph, {"x": 1})
