"""From an FX graph of ATen ops, forward and backward together, to a graph of the IR."""

from __future__ import annotations

import hashlib
import operator
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import sympy
import torch
from torch import fx

from zgraph.bridge import private_compile
from zgraph.bridge.aten import FROM_TORCH, effects, from_torch, op_name
from zgraph.bridge.private_higher_order import wanted_gradients
from zgraph.errors import CaptureError
from zgraph.ir import (
    Arg,
    DType,
    ExternalOp,
    Graph,
    Input,
    InputKind,
    Node,
    NoneType,
    Origin,
    Output,
    OutputKind,
    Phase,
    Placement,
    ScalarType,
    TensorType,
    Type,
    Value,
)
from zgraph.ir.layout import is_contiguous
from zgraph.ir.names import COLLECTIVES
from zgraph.ir.symbols import Dim, is_readable, simplify, symbol


class Leaf(NamedTuple):
    """Description of an input for the importer: the fields of `Input` of the same names."""

    kind: InputKind
    target: str = ""
    stage: int | None = None
    master: DType | None = None
    offload: str = ""
    cuts: tuple[tuple[str, Placement], ...] = ()


_FRAME = re.compile(r'File "([^"]+)", line (\d+)')
_MAX_NAME = 40
_TORCH = str(Path(torch.__file__).parent)


PIECES = "write it with ATen ops, or pass fullgraph=False to zgraph.compile, which runs it eagerly between pieces"


class Importer:
    """Translates one FX graph.

    Args:
        gm: the FX graph, values in `meta["val"]`.
        leaves: what is known of the inputs, by their position among the captured function's inputs.
        num_forward_outputs: how many outputs come first and belong to the forward; None if all do.
        name: the graph's name.
    """

    def __init__(
        self, gm: fx.GraphModule, leaves: Mapping[int, Leaf], num_forward_outputs: int | None, name: str
    ) -> None:
        self.gm, self.leaves, self.num_forward_outputs, self.name = gm, leaves, num_forward_outputs, name
        self.values: dict[fx.Node, Value] = {}
        self.results: dict[fx.Node, Any] = {}
        self.functions: dict[fx.Node, Graph] = {}
        self.foreign: dict[str, ExternalOp] = {}
        self.inputs: list[Input] = []
        self.nodes: list[Node] = []
        self.by_index: dict[int, str] = {}
        self.constants: dict[str, torch.Tensor] = {}
        self.hints: dict[str, int] = {}
        self.regions: dict[int, int] = {}
        self.phases = self._phases()

    def run(self) -> Graph:
        """The graph.

        Raises:
            CaptureError: for an op or argument that the IR has no form for, with the user's file and line.
        """
        for node in self.gm.graph.nodes:
            if node.op == "placeholder":
                self._input(node)
            elif node.op == "get_attr":
                self._constant(node)
            elif node.op == "call_function":
                self._call(node)
            elif node.op != "output":
                raise self._error(node, f"has an FX node of kind {node.op}")
        nodes = sorted(self.nodes, key=lambda n: n.phase.rank)
        return Graph(self.name, tuple(self.inputs), tuple(nodes), self._outputs(), foreign=self.foreign)

    # --- phases ------------------------------------------------------------------------------------------------

    def _phases(self) -> dict[fx.Node, Phase]:
        """A node is forward if a forward output needs it, or if the forward traced it and no tangent is behind it."""
        nodes = list(self.gm.graph.nodes)
        if self.num_forward_outputs is None:
            return dict.fromkeys(nodes, Phase.forward)
        needed: set[fx.Node] = set()
        todo = [o for o in self._output_nodes()[: self.num_forward_outputs] if isinstance(o, fx.Node)]
        while todo:
            node = todo.pop()
            if node not in needed:
                needed.add(node)
                todo.extend(node.all_input_nodes)
        behind_tangent: set[fx.Node] = set()
        phases: dict[fx.Node, Phase] = {}
        for node in nodes:
            if _is_tangent(node) or any(i in behind_tangent for i in node.all_input_nodes):
                behind_tangent.add(node)
            traced_forward = node.meta.get("partitioner_tag") != "is_backward" and node not in behind_tangent
            phases[node] = Phase.forward if node in needed or traced_forward else Phase.backward
        return phases

    def _output_nodes(self) -> Sequence[Any]:
        return self.gm.graph.output_node().args[0]  # type: ignore[return-value]

    # --- inputs ------------------------------------------------------------------------------------------------

    def _input(self, node: fx.Node) -> None:
        value = self._define(node, node.meta["val"], node.name)
        index = private_compile.input_index(node)
        if index is None and not _is_tangent(node):
            index = len(self.inputs)
        leaf = Leaf(InputKind.tangent)
        if not _is_tangent(node) and index is not None:
            leaf = self.leaves.get(index, Leaf(InputKind.input))
            self.by_index[index] = value.name
        if isinstance(size := node.meta["val"], torch.SymInt) and size.node.hint is not None:
            self.hints[str(size.node.expr)] = int(size.node.hint)
        self.inputs.append(Input(leaf.kind, value, leaf.target, leaf.stage, leaf.master, leaf.offload, leaf.cuts))

    def _constant(self, node: fx.Node) -> None:
        """A tensor that the model's code made while it was traced."""
        name = str(node.target)
        constant = self.gm
        for part in name.split("."):
            constant = getattr(constant, part)
        if isinstance(constant, fx.GraphModule):
            (caller, *_) = node.users
            if op_name(caller.target) is None:
                label = op_label(caller.target)
                raise self._error(caller, f"calls {label}, whose branches or bodies are functions; {PIECES}")
            self.functions[node] = _Function(constant, caller, name).run()
            return
        if not isinstance(constant, torch.Tensor):
            raise self._error(node, f"uses {name}, a {type(constant).__name__} that is no tensor; {PIECES}")
        self.constants[name] = constant
        value = self._define(node, node.meta.get("val", constant), node.name)
        self.inputs.append(Input(InputKind.constant, value, name))

    # --- nodes -------------------------------------------------------------------------------------------------

    def _call(self, node: fx.Node) -> None:
        if node.target is operator.getitem and isinstance(node.args[0], fx.Node) and node.args[0] in self.results:
            source, index = node.args[0], node.args[1]
            found = self.results[source][index]
            if isinstance(found, Value):
                self.values[node] = found
            else:
                self.results[node] = found
            return
        name = op_name(node.target)
        if name is None:
            raise self._error(node, f"calls {op_label(node.target)}, which has no form in the IR; {PIECES}")
        made = node.meta.get("val")
        multi = isinstance(made, tuple | list)
        if isinstance(made, tuple | list):
            results = self._results(node, made)
        else:
            results = (self._define(node, made, node.name),)
        try:
            args = tuple(from_torch(a, self._value) for a in (*node.args, *wanted_gradients(node.target, made)))
            kwargs = tuple((k, from_torch(a, self._value)) for k, a in sorted(node.kwargs.items()))
        except (TypeError, KeyError) as error:
            raise self._error(node, f"calls {name} with an argument that has no form in the IR: {error}") from None
        row, known = effects(node.target, name, args, dict(kwargs), multi=multi), self.foreign.get(name)
        self.foreign[name] = row if known is None else known.either(row)
        phase = self.phases[node]
        region = private_compile.checkpoint_region(node) if phase is Phase.forward else 0
        region = region and self.regions.setdefault(region, len(self.regions) + 1)
        self.nodes.append(Node(name, args, results, kwargs, phase, origin_of(node), region))

    def _results(self, node: fx.Node, made: Sequence[Any]) -> tuple[Value, ...]:
        """The values of an op that makes several, some of them perhaps in a tuple of their own."""
        picked = {u.args[1]: u for u in node.users if u.target is operator.getitem}
        found: list[Any] = []
        for index, item in enumerate(made):
            if isinstance(item, tuple | list):
                inner = picked.get(index)
                names = {u.args[1]: u.name for u in inner.users if u.target is operator.getitem} if inner else {}
                stem = f"{node.name}.{index}"
                found.append(tuple(Value(names.get(i, f"{stem}.{i}"), self._type(m, node)) for i, m in enumerate(item)))
            else:
                name = picked[index].name if index in picked else f"{node.name}.{index}"
                found.append(Value(name, self._type(item, node)))
        self.results[node] = tuple(found)
        return tuple(v for item in found for v in (item if isinstance(item, tuple) else (item,)))

    def _value(self, node: fx.Node) -> Value | Graph:
        return self.functions[node] if node in self.functions else self.values[node]

    def _define(self, node: fx.Node, made: Any, name: str) -> Value:
        value = Value(name, self._type(made, node))
        self.values[node] = value
        return value

    def _type(self, made: Any, node: fx.Node) -> Type:
        match made:
            case None:
                return NoneType()
            case torch.Tensor():
                if made.layout is not torch.strided:
                    raise self._error(node, f"makes a {made.layout} tensor; zgraph takes strided ones (sparse=False)")
                shape = tuple(self._size(s) for s in made.shape)
                strides = tuple(self._size(s) for s in made.stride())
                return TensorType(FROM_TORCH[made.dtype], shape, None if is_contiguous(shape, strides) else strides)
            case torch.SymInt() | torch.SymFloat() | torch.SymBool():
                kind = type(made).__name__.removeprefix("Sym").lower()
                return ScalarType(kind, self._size(made) if kind == "int" else None)
            case bool() | int() | float():
                return ScalarType(type(made).__name__)
        raise self._error(node, f"makes a {type(made).__name__}, which has no form in the IR")

    def _size(self, size: Any) -> Dim:
        """A size as an int or as an expression over the IR's own symbols. Asks nothing that would add a guard."""
        if isinstance(size, int):
            return size
        translated = _translate(size.node.expr)
        if not is_readable(translated):
            translated = _opaque_symbol(size.node.expr)
            if size.node.hint is not None:
                self.hints[str(translated)] = int(size.node.hint)
        return translated

    # --- outputs -----------------------------------------------------------------------------------------------

    def _outputs(self) -> tuple[Output, ...]:
        node = self.gm.graph.output_node()
        outputs, descs = self._output_nodes(), node.meta.get("desc") or [None] * len(self._output_nodes())
        split = len(outputs) if self.num_forward_outputs is None else self.num_forward_outputs
        return tuple(
            self._output(found, desc, Phase.forward if position < split else Phase.backward)
            for position, (found, desc) in enumerate(zip(outputs, descs, strict=True))
        )

    def _output(self, found: Any, desc: Any, phase: Phase) -> Output:
        value = self.values[found] if isinstance(found, fx.Node) else None
        mutated, grad_of = private_compile.mutation_target(desc), private_compile.grad_target(desc)
        if mutated is not None:
            kind, target = self.leaves.get(mutated, (InputKind.input, ""))[:2]
            if kind is InputKind.param:
                raise CaptureError(
                    f"the forward changes the parameter {target} in place; make the changed value a new tensor, or "
                    "change the parameter outside of the forward"
                )
            return Output(OutputKind.mutation, value, self.by_index[mutated], phase)
        if grad_of is not None:
            return Output(OutputKind.grad, value, self.by_index[grad_of], phase)
        return Output(OutputKind.output, value, phase=phase)

    def _error(self, node: fx.Node, message: str) -> CaptureError:
        origin = origin_of(node)
        where = f"\n  at {origin.place}" if origin.file else ""
        module = f" in {origin.module}" if origin.module else ""
        return CaptureError(f"the model{module} {message}{where}")


class _Function(Importer):
    """Translates a function that a higher-order op calls.

    Args:
        gm: the function.
        caller: the op.
        name: the function's.
    """

    def __init__(self, gm: fx.GraphModule, caller: fx.Node, name: str) -> None:
        super().__init__(gm, {}, None, name)
        self.caller = caller

    def _input(self, node: fx.Node) -> None:
        self.inputs.append(Input(InputKind.input, self._define(node, node.meta["val"], node.name)))

    def _constant(self, node: fx.Node) -> None:
        found = getattr(self.gm, str(node.target))
        if not isinstance(found, torch.Tensor):
            super()._constant(node)
        elif found.numel() == 1:
            value = self._define(node, found, node.name)
            args: tuple[Arg, ...] = tuple(found.shape), found.item()
            kwargs = (("device", from_torch(found.device, self._value)), ("dtype", FROM_TORCH[found.dtype]))
            self.foreign[_FULL] = ExternalOp()
            self.nodes.append(Node(_FULL, args, (value,), kwargs))
        else:
            raise self._error(node, f"makes a tensor of data in a function; {_GIVEN}")

    def _call(self, node: fx.Node) -> None:
        name = op_name(node.target) or ""
        if name.split(".")[0] in COLLECTIVES:
            raise self._error(node, f"calls {name}, which is between ranks; call it outside of functions")
        super()._call(node)

    def _output_nodes(self) -> Sequence[Any]:
        found = super()._output_nodes()
        return found if isinstance(found, tuple | list) else [found]

    def _output(self, found: Any, desc: Any, phase: Phase) -> Output:
        if found is not None and not isinstance(found, fx.Node):
            raise self._error(self.caller, f"returns the number {found} from a function; return a tensor")
        return super()._output(found, None, phase)

    def _error(self, node: fx.Node, message: str) -> CaptureError:
        label, place = op_label(self.caller.target), origin_of(self.caller).place
        where = "" if origin_of(node).file or not place else f"\n  at {place}"
        return CaptureError(f"{super()._error(node, f'{message} (in a function of {label})')}{where}")


_FULL = "aten.full.default"
_GIVEN = "make it outside, and give it to the op as an operand"


def _translate(expr: sympy.Expr) -> Dim:
    if isinstance(expr, sympy.Integer):
        return int(expr)
    if isinstance(expr, sympy.Symbol):
        return symbol(expr.name)
    args = [_translate(a) for a in expr.args]
    match type(expr).__name__:
        case "Add" | "Mul" | "Pow":
            return simplify(expr.func(*args))
        case "FloorDiv" | "CleanDiv" | "IntTrueDiv":
            return simplify(sympy.floor(sympy.sympify(args[0]) / args[1]))
        case "CeilDiv" | "CeilToInt":
            return simplify(sympy.ceiling(sympy.sympify(args[0]) / (args[1] if len(args) > 1 else 1)))
        case "Mod" | "PythonMod":
            return simplify(sympy.Mod(*args))
        case "Max" | "Min":
            return simplify(getattr(sympy, type(expr).__name__)(*args))
    return _opaque_symbol(expr)


def _opaque_symbol(expr: sympy.Expr) -> Dim:
    """A symbol that stands for an expression of which only the name matters."""
    digest = hashlib.sha256(str(expr).encode()).hexdigest()[:8]
    return symbol(f"u_{re.sub(r'[^A-Za-z0-9]+', '_', str(expr))[:_MAX_NAME].strip('_')}_{digest}")


def origin_of(node: fx.Node) -> Origin:
    """The module path and the user's file and line that a node comes from."""
    stack = node.meta.get("nn_module_stack") or node.meta.get("fwd_nn_module_stack") or {}
    module = ""
    if stack:
        path = str(list(stack.values())[-1][0])
        path = re.sub(r"^L\['\w+'\]\.?(__self__\.?)?", "", path)
        path = path.replace("_modules['", "").replace("']", "").replace("['", ".")
        module = re.sub(r"@\d+$", "", path)
    frames = [f for f in _FRAME.findall(node.meta.get("stack_trace") or "") if not f[0].startswith(_TORCH)]
    file, line = frames[-1] if frames else ("", "0")
    return Origin(module, file, int(line), "")


def op_label(target: Any) -> str:
    """A name for what an FX node calls that a user knows: of a higher-order op `torch.NAME`, where torch has it."""
    name = str(getattr(target, "__name__", target))
    return f"torch.{name}" if hasattr(torch, name) else name


def _is_tangent(node: fx.Node) -> bool:
    return node.op == "placeholder" and "tangents" in str(node.target)
