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
from torch import fx

from zgraph.bridge import private_compile
from zgraph.bridge.private_onednn import plain_recurrence
from zgraph.bridge.private_ops import write_out_mutations
from zgraph.bridge.private_traces import Unkeyed, as_torch_keeps, keeping
from zgraph.capture.failures import failure
from zgraph.capture.halves import Runner, SavedNodes, backward_runner, boxed_runner, meta_of, opaque
from zgraph.capture.importer import Importer, Leaf
from zgraph.capture.kept_traces import Trace, Traces, is_small, read_trace, saved_by
from zgraph.errors import CaptureError, EscapedParameterError, RunFileError
from zgraph.ir import DType, Graph, InputKind, Phase, Placement, Plan, TensorType
from zgraph.ir.ops import views

_serial = count()


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
        traces: where traces are kept; None keeps none.
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
        traces: Traces | None = None,
    ) -> None:
        self.inputs, self.returns_parts, self.traces = inputs, returns_parts, traces
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
        if self.rewrite is not None:
            self.rewrite(gm)
        with plain_recurrence(), private_compile.tangents_of_any_size(self.returns_parts):
            run = capture.kept(gm, examples, self.traces) if self.traces is not None else None
            run = run or capture.traced(capture.runner_of, capture.runner_of, capture.inference)(gm, examples)
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
        self.made: list[tuple[Graph, Compiled]] = []
        self.constants: Mapping[str, torch.Tensor] = {}
        self.can_be_kept = False

    def traced(self, forward: Any, backward: Any, inference: Any) -> Callable[..., Any]:
        """AOTAutograd, with these compilers of the two halves, and of a graph without a backward."""
        made: Callable[..., Any] = private_compile.aot_autograd(
            fw_compiler=forward,
            bw_compiler=backward,
            partition_fn=self.partition,
            inference_compiler=inference,
            decompositions=private_compile.DECOMPOSED,
        )
        return made

    def kept(self, gm: fx.GraphModule, examples: Sequence[Any], traces: Traces) -> Callable[..., Any] | None:
        """The callable of a graph, by its kept trace or by a new one, which is kept; None where it has no key."""
        if (salt := traces.salt()) is None:
            return None
        found: list[Trace] = []

        def find(key: str) -> bytes | None:
            if (held := traces.find(key)) is None:
                return None
            try:
                found.append(read_trace(held))
            except RunFileError as error:
                traces.refuse(key, str(error))
                return None
            return found[-1].result

        phases = iter(("forward", "backward"))
        salt = "\n".join(
            [salt, self.frontend.name, str(self.frontend.returns_parts), repr(sorted(self.leaves.items()))]
        )
        try:
            with keeping(gm, examples, salt, find) as state:
                compiler = state.compiler(lambda: next(phases), self.runner_of)
                run: Callable[..., Any] = self.traced(
                    compiler, compiler, state.compiler(lambda: "inference", self.inference)
                )(gm, examples)
        except Unkeyed:
            return None
        if self.made:  # AOTAutograd has traced it
            traces.count(found=False)
            graph, compiled = self.made[0]
            if len(self.made) == 1 and self.can_be_kept and state.made and state.key:
                traces.keep(state.key, Trace(graph, self.constants, saved_by(compiled.plan), state.made).to_bytes())
            return run
        (trace,) = found
        compiled = self._compiled(trace.captured, trace.constants, {})
        if saved_by(compiled.plan) != trace.saved:
            traces.refuse(state.key, "it is of a program that saves other values")
            return None
        traces.count(found=True)
        for code in state.codes:
            code.run = self._half(code.phase, compiled)
        return run

    def _half(self, phase: str, compiled: Compiled) -> Callable[..., Any]:
        """One half of a program, as AOTAutograd calls it."""
        if phase != "backward":
            return boxed_runner(compiled.forward)
        assert compiled.backward is not None
        kinds = [isinstance(value.type, TensorType) for value in compiled.plan.saved]
        return boxed_runner(backward_runner(compiled.backward, sum(kinds), len(kinds) - sum(kinds)))

    def partition(
        self, joint: fx.GraphModule, _inputs: Any, *, num_fwd_outputs: int, **_: Any
    ) -> tuple[fx.GraphModule, fx.GraphModule]:
        """The joint graph, compiled, as the two halves that AOTAutograd asks for."""
        compiled = self._compile(joint, num_fwd_outputs)
        assert compiled.backward is not None
        plan = compiled.plan
        saved = SavedNodes(joint, plan)
        outputs = joint.graph.output_node()
        descs = outputs.meta.get("desc")
        nodes: list[Any] = list(outputs.args[0])  # type: ignore[arg-type]
        first, second = nodes[:num_fwd_outputs], nodes[num_fwd_outputs:]
        placeholders = joint.graph.find_nodes(op="placeholder")
        tangents = {i.value.name for i in plan.graph.inputs if i.kind is InputKind.tangent}
        forward = opaque(
            compiled.forward,
            "zgraph_forward",
            [(p.name, p.meta) for p in placeholders if p.name not in tangents],
            [*(meta_of(o) for o in first), *(meta for _, meta in saved.tensors), *(meta for _, meta in saved.scalars)],
            descs and [*descs[:num_fwd_outputs], *([None] * len(plan.saved))],
        )
        backward = opaque(
            backward_runner(compiled.backward, len(saved.tensors), len(saved.scalars)),
            "zgraph_backward",
            [*saved.scalars, *saved.tensors, *((p.name, p.meta) for p in placeholders if p.name in tangents)],
            [meta_of(o) for o in second],
            descs and descs[num_fwd_outputs:],
        )
        return forward, backward

    def inference(self, gm: fx.GraphModule, _examples: Sequence[Any]) -> Callable[..., Any]:
        """A graph without a backward, compiled."""
        return boxed_runner(self._compile(gm, None).forward)

    def runner_of(self, gm: fx.GraphModule, _examples: Sequence[Any]) -> Callable[..., Any]:
        """The runner inside an opaque half."""
        (call,) = (n for n in gm.graph.nodes if n.op == "call_function" and n.target is not operator.getitem)
        return boxed_runner(call.target)

    def _compile(self, gm: fx.GraphModule, num_forward_outputs: int | None) -> Compiled:
        write_out_mutations(gm, private_compile.fake_mode_of(gm))
        importer = Importer(gm, self.leaves, num_forward_outputs, self.frontend.name)
        graph = importer.run()
        _check_escapes(graph, {info.name for info in self.frontend.params.values() if info.is_placeholder})
        self.constants, self.can_be_kept = importer.constants, not importer.hints and is_small(importer.constants)
        return self._compiled(graph, importer.constants, importer.hints)

    def _compiled(self, graph: Graph, constants: Mapping[str, torch.Tensor], hints: Mapping[str, int]) -> Compiled:
        """A captured graph, compiled: once, as all ranks compile together."""
        for known, compiled in self.made:
            if known == graph:
                return compiled
        with private_compile.without_modes(), torch.no_grad(), as_torch_keeps():
            compiled = self.frontend.compiler(graph, constants, hints)
        self.made.append((graph, compiled))
        return compiled


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


def _apart(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` behind a separate code object.

    torch.compile counts recompilations by code object: without this, all models of one class would share one limit.
    """

    def forward(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    code = forward.__code__.replace(co_name=f"zgraph_forward_{next(_serial)}")
    return types.FunctionType(code, forward.__globals__, code.co_name, forward.__defaults__, forward.__closure__)
