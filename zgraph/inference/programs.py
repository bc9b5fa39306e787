"""Calls of one model as programs: captured once, rewritten by passes, linked, and run without torch.compile.

What a call computes from the model alone (transposed, joined and quantised weights, tables) is computed once and
shared by all programs.
"""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from zgraph.bridge.private_runtime import whole_group
from zgraph.bridge.target import cost_table
from zgraph.capture import capture_call
from zgraph.codegen import library as _kernels  # noqa: F401 - registers the ops
from zgraph.compiler.recordings import Recordings, choose_calls
from zgraph.environment import environment
from zgraph.errors import InferenceError, QuantisationError, UsageError
from zgraph.ir import Graph, Input, InputKind, OutputKind, Placement, Plan, print_graph, verify
from zgraph.ir.aliases import Memory
from zgraph.options.validate import CudaGraphs, RegionCalls
from zgraph.passes import Context, Pipeline, make_plan
from zgraph.passes.analysis.integers import int8_of, integers_of
from zgraph.passes.core.instruments import Verify
from zgraph.passes.place import cut_inputs
from zgraph.passes.plan.fixed import only, split_fixed
from zgraph.runtime import HostMemory, Session, ShardStore
from zgraph.runtime.agreement import plan_text, wire_of
from zgraph.runtime.executor import Runner, link
from zgraph.runtime.interpreted import Interpreted
from zgraph.runtime.model_ranks import Cuts
from zgraph.runtime.peers import unique_name
from zgraph.runtime.regions import Regions


class Program:
    """A call that is linked.

    Args:
        plan: what it runs.
        run: runs it.
        session: that it runs in, which hears of errors.
    """

    def __init__(self, plan: Plan, run: Runner, session: Session) -> None:
        self.plan, self.run, self.session = plan, run, session
        graph, memory = plan.graph, Memory(plan.graph)
        targets = {i.value.name: i.target for i in graph.inputs}
        self.arguments = [targets[v.name] for v in plan.forward.arguments if v.name not in plan.resident]
        self.needed = [v.name in plan.resident for v in plan.forward.arguments]
        self.copies = [
            (position, targets[o.target])
            for position, o in enumerate(graph.outputs)
            if o.kind is OutputKind.mutation and o.value and o.target not in memory.roots(o.value.name)
        ]
        self.outputs = [i for i, o in enumerate(graph.outputs) if o.kind is OutputKind.output]

    def __call__(self, given: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
        """The outputs for arguments by name; those that the call changes are changed in place."""
        names = iter(self.arguments)
        args = [None if resident else given[next(names)] for resident in self.needed]
        try:
            results = self.run(args)
        except BaseException as error:
            self.session.fail(error)
            raise
        for position, name in self.copies:
            given[name].copy_(results[position])
        return [results[i] for i in self.outputs]


class Programs:
    """Programs of one model.

    Args:
        model: whose calls they are. Kept is no reference to it, nor to a parameter that no program reads as it is.
        pipeline: the passes.
        device: that the model is on.
        compiles: whether Inductor compiles what is between ops that write.
        cuda_graphs: whether programs that ask for it are recorded for the GPU to repeat, as of `zgraph.compile`.
        region_calls: what calls what Inductor compiles, as `regions` of `zgraph.compile`.
        mesh: the ranks that compute together; None for one rank.
        cuts: of parameters, and of inputs of calls, over these ranks.
        beside: constants that the passes put into graphs, whole, by their targets.

    Attributes:
        settled: parameters whose integers are among these: they are not made anew.
        session: what runs the collectives.
        recordings: of programs that ask for them.
    """

    def __init__(
        self,
        model: nn.Module,
        pipeline: Pipeline,
        device: torch.device,
        *,
        compiles: bool,
        cuda_graphs: CudaGraphs = False,
        region_calls: RegionCalls = "python",
        mesh: DeviceMesh | None = None,
        cuts: Mapping[str, Cuts] = MappingProxyType({}),
        beside: Mapping[str, torch.Tensor] = MappingProxyType({}),
    ) -> None:
        self.pipeline, self.device = pipeline, device
        self.cuda_graphs, self.region_calls = cuda_graphs, region_calls
        self.recordings: list[Recordings] = []
        self.settled = {n for n, _ in model.named_parameters() if {integers_of(n)[0], int8_of(n)[0]} & beside.keys()}
        group = whole_group(mesh) if mesh is not None else None
        store = ShardStore(nn.Module(), mesh, group, {}, 0, None, device, {}, HostMemory(device), nn.Parameter, cuts)
        self.session = Session(store, group, unique_name(group) if group is not None else "inference")
        self.ranks = store.ranks
        self.beside = {name: self.ranks.part(name, tensor).to(device) for name, tensor in beside.items()}
        self._parts: dict[str, torch.Tensor] = {}
        self._sizes: dict[int, int] = {}
        self._is_there = True
        self._sources = {
            name: weakref.ref(tensor) for name, tensor in (*model.named_parameters(), *model.named_buffers())
        }
        self._versions = self._version()
        self._shared: dict[str, torch.Tensor] = {}
        self._fixed: list[tuple[Graph, tuple[str, ...], Mapping[str, torch.Tensor]]] = []
        self._resident: dict[str, torch.Tensor] = {}
        self._together: Regions | Interpreted = Regions() if compiles else Interpreted(device)
        self.all: list[Program] = []

    @property
    def weights_bytes(self) -> int:
        """Bytes of what the programs read that depends on the model alone, each storage counted once."""
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in self._resident.values()}
        return sum(storages.values())

    def program(
        self,
        model: nn.Module,
        function: Callable[..., object],
        arguments: Mapping[str, torch.Tensor],
        name: str,
        caches: Mapping[str, torch.Tensor] | None = None,
    ) -> Program:
        """A call as a program.

        Args:
            model: the model.
            function: calls the model with `arguments.values()`, and gives tensors.
            arguments: examples by name, no two in the same memory.
            name: of the program.
            caches: given, the program may be recorded; the arguments whose memory is always this, and is written to.

        Raises:
            GraphBreakError, CaptureError: the call cannot be captured.
            PlanMismatchError: ranks that compute together have other programs.
            VerifyError: with ZGRAPH_VERIFY, a pass made a graph that is none.
        """
        call = capture_call(function, arguments, model, name)
        captured, constants = _settled(call.graph, call.constants)
        constants |= self.beside
        checks = environment().verify
        if checks:
            verify(captured)
        for axis, cuts in self._by_axis().items():
            captured = cut_inputs(captured, axis, cuts)
        context = Context(mesh=self.ranks.axes)
        graph = self.pipeline.run(captured, context, [Verify()] if checks == 2 else [])
        fixed, graph = split_fixed(graph)
        names = tuple(i.target for i in graph.inputs[len(graph.inputs) - len(fixed.outputs) :])
        self._compute(fixed, names, constants)
        self._fixed.append((fixed, names, constants))
        plan = make_plan(graph)
        if not self.session.is_alone:
            self.session.peers.agree("program", plan_text(plan, print_graph(captured, origins=False), ""))
            marks, _ = wire_of(plan)
            self.session.marks |= marks
        resident = {
            i.value.name: self._resident.setdefault(i.target, self._tensor(i.target, constants))
            for i in graph.inputs
            if i.value.name in plan.resident
        }
        recordings = self._recordings(plan, caches) if caches is not None and self.cuda_graphs else None
        program = Program(plan, self._linked(plan, resident, recordings), self.session)
        self.all.append(program)
        return program

    def refresh(self) -> None:
        """Begin a call: compute what depends on the model alone anew, if somebody has written to the model since.

        Raises:
            PeerError: a rank that computes with this one failed before, or is gone.
            UsageError: the memory was given back, or a weight was written to whose integers were made before.
        """
        if not self._is_there:
            raise UsageError("this model serves within `with zgraph.serving(...)` alone: its memory was given back")
        self.session.begin_call()
        versions = self._version()
        if all(self._versions[name] == version for name, version in versions.items()):
            return
        changed = {name for name, version in versions.items() if self._versions[name] != version}
        if settled := sorted(changed & self.settled):
            raise UsageError(
                f"{settled[0]} was written to, but its integers were made of what it was before; pass the model to "
                "zgraph.infer again"
            )
        self._versions |= versions
        for name in changed & self._parts.keys():
            self._parts[name].copy_(self._part(name))
        self._compute_anew()

    @torch.no_grad()
    def load(self, wholes: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Take new values of parameters, whole, one after the other; of those that are cut, this rank's part alone."""
        self._resize(is_there=True)
        for name, whole in wholes:
            if name in self._parts:
                self._parts[name].copy_(self.ranks.part(name, whole))
            elif (found := self._sources[name]()) is not None:
                found.copy_(whole)
        self._versions |= self._version()
        self._compute_anew()

    def unload(self) -> None:
        """Give the memory of all that depends on parameters back, until `load`."""
        self._resize(is_there=False)

    def _recordings(self, plan: Plan, caches: Mapping[str, torch.Tensor]) -> Recordings:
        names = {i.target: i.value.name for i in plan.graph.inputs}
        kept = sum(found.kept_bytes for found in self.recordings)
        lasting = {names[target]: memory for target, memory in caches.items() if target in names}
        self.recordings.append(Recordings(plan, self.session, self._here(), self.cuda_graphs, kept, lasting))
        return self.recordings[-1]

    def _here(self) -> Context:
        """Context of this device, for estimates."""
        return Context(mesh=self.ranks.axes, costs=cost_table(None, self.device))

    def _resize(self, *, is_there: bool) -> None:
        """Take the memory of what depends on parameters, or give it back; never that of constants."""
        self._is_there = is_there
        sources = {name: tensor for name, ref in self._sources.items() if (tensor := ref()) is not None}
        constant = [t for _, _, constants in self._fixed for t in constants.values()]
        constant += [t for t in sources.values() if not isinstance(t, nn.Parameter)]
        kept = {t.untyped_storage()._cdata for t in constant}
        whole = [t for name, t in sources.items() if not (is_there and name in self._parts)]
        for tensor in (*whole, *self._parts.values(), *self._shared.values()):
            storage = tensor.untyped_storage()
            if storage._cdata not in kept:
                size = self._sizes.setdefault(storage._cdata, storage.nbytes())
                storage.resize_(size if is_there else 0)
        for recordings in self.recordings:
            recordings.forget()

    def _compute_anew(self) -> None:
        """Compute what depends on the model alone once more, to where it lies."""
        done: set[str] = set()
        for fixed, names, constants in self._fixed:
            due = [i for i, name in enumerate(names) if name not in done]
            done.update(names)
            for i, made in zip(due, self._run(only(fixed, due), constants), strict=True):
                if (held := self._shared[names[i]]).data_ptr() != made.data_ptr():
                    held.copy_(made)

    def _compute(self, fixed: Graph, names: Sequence[str], constants: Mapping[str, torch.Tensor]) -> None:
        """Compute what is fixed and not there yet."""
        due = [i for i, name in enumerate(names) if name not in self._shared]
        if due:
            made = self._run(only(fixed, due), constants)
            self._shared.update((names[i], tensor) for i, tensor in zip(due, made, strict=True))

    @torch.no_grad()
    def _run(self, graph: Graph, constants: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
        plan = make_plan(graph)
        found = {i.value.name: self._tensor(i.target, constants) for i in graph.inputs}
        resident = {name: found[name] for name in plan.resident}
        run = link(plan.forward, plan, self.session, resident)
        return run([None if v.name in resident else found[v.name] for v in plan.forward.arguments])

    def _linked(self, plan: Plan, resident: Mapping[str, torch.Tensor], recordings: Recordings | None) -> Runner:
        if isinstance(self._together, Regions):
            if self.region_calls != "python":
                choose_calls(self._together, plan, self._here(), self.region_calls, self.device)
            self._together.take_context()
            self._together.compile([plan.forward], plan.graph, self.session)
        maker = recordings.maker if recordings is not None else None
        replays = maker(resident).of(plan.forward) if maker is not None else None
        return link(plan.forward, plan, self.session, resident, None, self._together, replays)

    def _tensor(self, target: str, constants: Mapping[str, torch.Tensor]) -> torch.Tensor:
        if target in self._shared:
            return self._shared[target]
        if target in constants:
            return constants[target].to(self.device)
        if self.ranks.is_cut(target):
            if target not in self._parts:
                self._parts[target] = self._part(target)
            return self._parts[target]
        if target not in self._sources:
            raise QuantisationError(
                f"nothing was seen of what meets {target.partition(':')[2]}: the call that calibrates does not reach "
                "it; pass calibrate= with inputs that do"
            )
        found = self._sources[target]()
        assert found is not None, "the model is there"
        return found.detach()

    def _part(self, name: str) -> torch.Tensor:
        """This rank's part of a parameter, in memory of its own."""
        found = self._sources[name]()
        assert found is not None, "the model is there"
        return self.ranks.part(name, found.detach()).clone()

    def _by_axis(self) -> dict[str, dict[str, Placement]]:
        """The cuts along each axis, by the names of what is cut."""
        found: dict[str, dict[str, Placement]] = {}
        for name, cuts in self.ranks.cuts.items():
            for axis, place in cuts:
                found.setdefault(axis, {})[name] = place
        return found

    def _version(self) -> dict[str, int]:
        """How often the model's tensors were written to: of those that are there."""
        return {name: tensor._version for name, ref in self._sources.items() if (tensor := ref()) is not None}


def _settled(graph: Graph, constants: Mapping[str, torch.Tensor]) -> tuple[Graph, dict[str, torch.Tensor]]:
    """A graph whose buffers are constants, and whose constants are named after their content, so that graphs can share
    them.

    Raises:
        InferenceError: it changes a buffer of the model.
    """
    names = {name: f"data:{_digest(tensor)}" for name, tensor in constants.items()}
    changed = {o.target for o in graph.outputs if o.kind is OutputKind.mutation}
    inputs = list[Input]()
    for found in graph.inputs:
        if found.kind is InputKind.constant:
            found = replace(found, target=names[found.target])
        elif found.kind is InputKind.buffer:
            if found.value.name in changed:
                raise InferenceError(
                    f"{graph.name} changes the buffer {found.target} in each call, which rows of a batch would share; "
                    "use the model's own generate"
                )
            found = replace(found, kind=InputKind.constant)
        inputs.append(found)
    return replace(graph, inputs=tuple(inputs)), {names[name]: tensor for name, tensor in constants.items()}


def _digest(tensor: torch.Tensor) -> str:
    """A digest of a tensor's bytes, dtype and shape."""
    found = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:16]
