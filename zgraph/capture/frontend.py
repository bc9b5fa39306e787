"""The way in and out of torch.compile: joint graphs come in, two opaque halves that run a plan go back.

AOTAutograd keeps doing what it does well: aliasing, mutation, saved tensors, several forwards before one backward.
The halves are modules with the placeholders and outputs that it expects, whose body is one call to a runner.
"""

from __future__ import annotations

import operator
import types
from collections.abc import Callable, Mapping, Sequence, Set
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import count
from types import MappingProxyType
from typing import Any

import torch
from torch import fx, nn

from zgraph.bridge import private_compile
from zgraph.bridge.aten import TO_TORCH
from zgraph.bridge.private_onednn import plain_recurrence
from zgraph.bridge.private_ops import write_out_mutations
from zgraph.capture.failures import failure
from zgraph.capture.importer import Importer, Leaf
from zgraph.errors import CaptureError, EscapedParameterError
from zgraph.ir import DType, Graph, InputKind, Phase, Placement, Plan, TensorType, Value
from zgraph.ir.ops import views

_serial = count()

Runner = Callable[[list[Any]], Sequence[Any]]
"""Takes its arguments in a list that it empties as it goes, and returns its results."""


@dataclass(frozen=True, slots=True)
class ParamInfo:
    """Facts about a parameter for capture: its name, its stage, its dtype at rest if that is another.

    `is_placeholder` says that the tensor traced in its place has no memory, so nothing may escape with it. `offload` is
    the part of it that is on the host; `cuts` says how it is cut along model axes.
    """

    name: str
    stage: int | None = None
    master: DType | None = None
    is_placeholder: bool = False
    offload: str = ""
    cuts: tuple[tuple[str, Placement], ...] = ()


@dataclass(frozen=True, slots=True)
class Compiled:
    """Result of compiling one captured graph: its plan, and the runners of its two halves."""

    plan: Plan
    forward: Runner
    backward: Runner | None = None


Compiler = Callable[[Graph, Mapping[str, torch.Tensor], Mapping[str, int]], Compiled]
"""From a captured graph, the constants in it and the hints for its symbols to what runs it."""


class Frontend:
    """Captures the calls of one function and has each different one compiled.

    Args:
        params: what each parameter's placeholder, by `id`, is.
        buffers: gives the name of each buffer that the model has at present, by `id`.
        compiler: called with each captured graph.
        name: what the graphs are called.
        attach: given what runs a captured graph and which of its arguments are which parameters, gives what runs it
            with gradients brought to the parameters at rest.
        left_eager: told why a piece of a function that is captured in pieces runs eagerly.
        ready: called when a capture fails; True if it has changed what the function does so that another may not.
        rewrite: given each function that torch.compile has traced, before its graph is taken.
        inputs: the name of each tensor, by `id`, that the function is called with and is known by.
        returns_parts: whether what is run returns a part of what is captured, and is given gradients of that part.
    """

    def __init__(
        self,
        params: Mapping[int, ParamInfo],
        buffers: Callable[[], Mapping[int, str]],
        compiler: Compiler,
        name: str,
        attach: Callable[[Callable[..., Any], Mapping[int, str]], Callable[..., Any]] = lambda run, _: run,
        left_eager: Callable[[str], None] = lambda why: None,
        ready: Callable[[], bool] = lambda: False,
        rewrite: Callable[[fx.GraphModule], None] | None = None,
        inputs: Mapping[int, str] = MappingProxyType({}),
        returns_parts: bool = False,
    ) -> None:
        self.inputs, self.returns_parts = inputs, returns_parts
        self.params, self.buffers, self.compiler, self.name, self.attach = params, buffers, compiler, name, attach
        self.left_eager, self.ready, self.rewrite = left_eager, ready, rewrite
        self._codes: list[types.CodeType] = []

    def wrap(self, function: Callable[..., Any], dynamic: bool | None, *, fullgraph: bool = True) -> Callable[..., Any]:
        """`function`, captured and compiled at its first call and whenever its guards fail.

        Without `fullgraph`, what cannot be captured runs eagerly between captured pieces.

        The result raises, beside what `function` itself raises, which comes as it is with a note of where:
            GraphBreakError: it cannot be captured as one graph.
            CaptureError: it runs, but zgraph cannot take what was captured.
        """
        own = _apart(function)
        self._codes.append(own.__code__)
        backend = self._backend if fullgraph else self._piece
        compiled = torch.compile(own, backend=backend, fullgraph=fullgraph, dynamic=dynamic)

        def settings() -> AbstractContextManager[None]:
            if fullgraph:
                return private_compile.WhenCaptured(dynamic)
            return private_compile.capturing(in_pieces=True, dynamic=dynamic)

        def call(*args: Any, **kwargs: Any) -> Any:
            if why := private_compile.dynamo_is_off():
                raise CaptureError(f"torch.compile is switched off, so nothing can be captured: {why}; switch it on")
            try:
                with settings():
                    return compiled(*args, **kwargs)
            except Exception as error:
                failed = error
            if isinstance(failed, private_compile.Unsupported) and self.ready():
                return call(*args, **kwargs)
            try:  # outside of the handler: what follows must not have torch's error for a context
                if fullgraph or isinstance(failed, private_compile.BackendCompilerFailed):
                    failed = failure(failed, lambda: function(*args, **kwargs), self.name)
                raise failed
            finally:
                del failed  # or its traceback would hold this frame, and this frame the error

        return call

    def forget(self) -> None:
        """Have what was wrapped captured anew at its next call."""
        for code in self._codes:
            private_compile.reset_code(code)

    def _backend(self, gm: fx.GraphModule, examples: Sequence[Any]) -> Callable[..., Any]:
        buffers = self.buffers()
        leaves = {index: self._leaf(example, buffers) for index, example in enumerate(examples)}
        capture = _OneCapture(self, leaves)
        captured = private_compile.aot_autograd(
            fw_compiler=capture.runner_of,
            bw_compiler=capture.runner_of,
            partition_fn=capture.partition,
            inference_compiler=capture.inference,
            decompositions=private_compile.DECOMPOSED,
        )
        if self.rewrite is not None:
            self.rewrite(gm)
        with plain_recurrence(), private_compile.tangents_of_any_size(self.returns_parts):
            run = captured(gm, examples)
        return self.attach(run, {i: leaf.target for i, leaf in leaves.items() if leaf.kind is InputKind.param})

    def _piece(self, gm: fx.GraphModule, examples: Sequence[Any]) -> Callable[..., Any]:
        """The callable that runs a piece: eager, if zgraph cannot take it."""
        try:
            return self._backend(gm, examples)
        except (CaptureError, EscapedParameterError) as error:
            self.left_eager(str(error))
            return private_compile.seeing_subclasses(gm)

    def _leaf(self, example: Any, buffers: Mapping[int, str]) -> Leaf:
        if info := self.params.get(id(example)):
            return Leaf(InputKind.param, info.name, info.stage, info.master, info.offload, info.cuts)
        if name := buffers.get(id(example)):
            return Leaf(InputKind.buffer, name)
        return Leaf(InputKind.input, self.inputs.get(id(example), ""))


class _OneCapture:
    """The compilation of one captured function: AOTAutograd calls its methods back."""

    def __init__(self, frontend: Frontend, leaves: Mapping[int, Leaf]) -> None:
        self.frontend, self.leaves = frontend, leaves

    def partition(
        self, joint: fx.GraphModule, _inputs: Any, *, num_fwd_outputs: int, **_: Any
    ) -> tuple[fx.GraphModule, fx.GraphModule]:
        """The joint graph, compiled, as the two halves that AOTAutograd asks for."""
        compiled = self._compile(joint, num_fwd_outputs)
        assert compiled.backward is not None
        plan = compiled.plan
        saved = _SavedNodes(joint, plan)
        outputs = joint.graph.output_node()
        descs = outputs.meta.get("desc")
        nodes: list[Any] = list(outputs.args[0])  # type: ignore[arg-type]
        first, second = nodes[:num_fwd_outputs], nodes[num_fwd_outputs:]
        placeholders = joint.graph.find_nodes(op="placeholder")
        tangents = {i.value.name for i in plan.graph.inputs if i.kind is InputKind.tangent}
        forward = _opaque(
            compiled.forward,
            "zgraph_forward",
            [(p.name, p.meta) for p in placeholders if p.name not in tangents],
            [*(_meta(o) for o in first), *(meta for _, meta in saved.tensors), *(meta for _, meta in saved.scalars)],
            descs and [*descs[:num_fwd_outputs], *([None] * len(plan.saved))],
        )
        backward = _opaque(
            _backward_runner(compiled.backward, len(saved.tensors), len(saved.scalars)),
            "zgraph_backward",
            [*saved.scalars, *saved.tensors, *((p.name, p.meta) for p in placeholders if p.name in tangents)],
            [_meta(o) for o in second],
            descs and descs[num_fwd_outputs:],
        )
        return forward, backward

    def inference(self, gm: fx.GraphModule, _examples: Sequence[Any]) -> Callable[..., Any]:
        """A graph without a backward, compiled."""
        return _boxed(self._compile(gm, None).forward)

    def runner_of(self, gm: fx.GraphModule, _examples: Sequence[Any]) -> Callable[..., Any]:
        """The runner inside an opaque half."""
        (call,) = (n for n in gm.graph.nodes if n.op == "call_function" and n.target is not operator.getitem)
        return _boxed(call.target)

    def _compile(self, gm: fx.GraphModule, num_forward_outputs: int | None) -> Compiled:
        write_out_mutations(gm, private_compile.fake_mode_of(gm))
        importer = Importer(gm, self.leaves, num_forward_outputs, self.frontend.name)
        graph = importer.run()
        _check_escapes(graph, {info.name for info in self.frontend.params.values() if info.is_placeholder})
        with private_compile.without_modes(), torch.no_grad():
            return self.frontend.compiler(graph, importer.constants, importer.hints)


def _check_escapes(graph: Graph, placeholders: Set[str]) -> None:
    """Refuse a forward that returns a parameter or a view of one: its gathered memory is gone after the call."""
    params = {i.value.name: i.target for i in graph.params if i.target in placeholders}
    for output in graph.outputs:
        todo = [output.value.name] if output.value is not None and output.phase is Phase.forward else []
        while todo:
            name = todo.pop()
            if name in params:
                raise EscapedParameterError(
                    f"the forward returns the parameter {params[name]} or a view of it, whose gathered memory is gone "
                    "after the call; return a clone of it"
                )
            if name in graph.producers:
                todo.extend(views(graph, graph.producers[name]))


class _SavedNodes:
    """The saved values as AOTAutograd wants to see them: tensors apart from scalars, each with a fake value."""

    def __init__(self, joint: fx.GraphModule, plan: Plan) -> None:
        self.metas = {n.name: n.meta for n in joint.graph.nodes}
        self.producers = plan.graph.producers
        self.mode = private_compile.fake_mode_of(joint)
        device = next(
            (v.device for n in joint.graph.nodes if isinstance(v := n.meta.get("val"), torch.Tensor)),
            torch.device("cpu"),
        )
        self.device = device
        self.tensors = [self._entry(v) for v in plan.saved if isinstance(v.type, TensorType)]
        self.scalars = [self._entry(v) for v in plan.saved if not isinstance(v.type, TensorType)]

    def _entry(self, value: Value) -> tuple[str, dict[str, Any]]:
        if value.name in self.metas and "val" in self.metas[value.name]:
            return value.name, self.metas[value.name]
        kind = value.tensor
        if kind.is_on_host and (source := self._offloaded(value)) is not None:
            with self.mode:
                return value.name, {"val": source.to("cpu")}
        with self.mode:
            fake = torch.empty([int(d) for d in kind.shape], dtype=TO_TORCH[kind.dtype], device=self.device)
        return value.name, {"val": fake}

    def _offloaded(self, value: Value) -> Any:
        """The fake tensor of the device that a value of the host is a copy of."""
        node = self.producers.get(value.name)
        while node is not None and node.op in ("wait", "offload_start"):
            name = node.operands[0].name
            if "val" in self.metas.get(name, {}):
                return self.metas[name]["val"]
            node = self.producers.get(name)
        return None


def _apart(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` behind a separate code object.

    torch.compile counts recompilations by code object: without this, all models of one class would share one limit.
    """

    def forward(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    code = forward.__code__.replace(co_name=f"zgraph_forward_{next(_serial)}")
    return types.FunctionType(code, forward.__globals__, code.co_name, forward.__defaults__, forward.__closure__)


def _backward_runner(run: Runner, num_tensors: int, num_scalars: int) -> Runner:
    """AOTAutograd hands over scalars, then tensors, then tangents; the plan has tensors, then scalars, first."""

    def zgraph_backward(args: list[Any]) -> Sequence[Any]:
        args[: num_scalars + num_tensors] = (
            *args[num_scalars : num_scalars + num_tensors],
            *args[:num_scalars],
        )
        return run(args)

    return zgraph_backward


def _opaque(
    run: Runner, name: str, inputs: Sequence[tuple[str, dict[str, Any]]], outputs: Sequence[Any], descs: Any
) -> fx.GraphModule:
    """A module with these placeholders and outputs, whose body is one call of `run`."""

    def body(*args: Any) -> Sequence[Any]:
        return run(list(args))

    body.__name__ = name
    body.zgraph_runner = run  # type: ignore[attr-defined]
    graph = fx.Graph()
    placeholders = []
    for label, meta in inputs:
        node = graph.placeholder(label)
        node.meta = dict(meta)
        placeholders.append(node)
    call = graph.call_function(body, tuple(placeholders))
    results: list[Any] = []
    for index, meta in enumerate(outputs):
        if meta is None:
            results.append(None)
            continue
        item = graph.call_function(operator.getitem, (call, index))
        item.meta = dict(meta)
        results.append(item)
    output = graph.output(tuple(results))
    output.meta = {"desc": descs} if descs else {}
    return fx.GraphModule(nn.Module(), graph)


def _meta(output: Any) -> dict[str, Any] | None:
    return output.meta if isinstance(output, fx.Node) else None


def _boxed(run: Any) -> Callable[..., Any]:
    """`run` under the calling convention by which AOTAutograd lets go of its references to the arguments."""
    target = getattr(run, "zgraph_runner", run)

    def boxed(args: list[Any]) -> Sequence[Any]:
        return target(args)  # type: ignore[no-any-return]

    boxed._boxed_call = True  # type: ignore[attr-defined]
    return boxed
