"""From a program of a plan to a Python function: straight-line code, each value dropped after its last use.

The generated source can be read: `link(...).source`. It calls ATen ops and the callables of `collectives`.
"""

from __future__ import annotations

import linecache
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, cast

from zgraph.bridge import private_runtime
from zgraph.bridge.aten import resolve, to_torch
from zgraph.ir import Arg, Graph, Instruction, Node, Plan, Program, Value
from zgraph.ir.arena import offsets
from zgraph.runtime.collectives import EXECUTORS
from zgraph.runtime.fused_attention import ATTENTIONS, FusedAttentions
from zgraph.runtime.in_place import in_place
from zgraph.runtime.recorder import Watcher
from zgraph.runtime.region import Compute, Region
from zgraph.runtime.replays import ProgramReplays
from zgraph.runtime.stretches import Part, Stretch, reads_of
from zgraph.runtime.strides import Strides

if TYPE_CHECKING:
    from zgraph.runtime.session import Session


class Together(Protocol):
    """Runs many instructions as one.

    `is_shown` says whether a profiler shows them as one; if not, they run one by one while somebody watches. `runner`
    is told at which positions a region's inputs may have other strides in a later call than in the first.
    """

    @property
    def is_shown(self) -> bool: ...

    def cut(self, program: Program, graph: Graph) -> Iterable[Instruction | Region]: ...

    def runner(self, region: Region, session: Session, loose: Sequence[int]) -> Compute: ...


Runner = Callable[[list[Any]], list[Any]]

LABEL = "<zgraph "
"""Beginning of the name that a program has in tracebacks in the place of a file's."""

_PLAIN = (bool, int, str, type(None))


def link(
    program: Program,
    plan: Plan,
    session: Session,
    resident: Mapping[str, Any],
    watcher: Watcher | None = None,
    regions: Together | None = None,
    replays: ProgramReplays | None = None,
) -> Runner:
    """The program as a function from a list of arguments, which it empties, to a list of results.

    Args:
        program: one program of `plan`.
        plan: the whole plan.
        session: the state that collectives and accumulation work on.
        resident: the memory of parameters and constants, by the name of their value.
        watcher: if given, it is told after every instruction.
        regions: what runs many instructions as one; op by op, if none is given.
        replays: what a GPU repeats stretches of the program by; none if none is given.
    """
    writer = _Writer(program, plan, session, resident, watcher, regions, replays)
    source = writer.source()
    label = f"{LABEL}{plan.graph.name} {plan.fingerprint} {program.name}>"
    linecache.cache[label] = (len(source), None, source.splitlines(True), label)
    exec(compile(source, label, "exec"), writer.names)
    run: Runner = writer.names[program.name]
    run = run if replays is None else replays.around(run)
    run.source = source  # type: ignore[attr-defined]
    return run


class _Writer:
    """Writes one program as source, with the names that the source refers to."""

    def __init__(
        self,
        program: Program,
        plan: Plan,
        session: Session,
        resident: Mapping[str, Any],
        watcher: Watcher | None,
        regions: Together | None,
        replays: ProgramReplays | None,
    ) -> None:
        self.program, self.plan, self.session, self.watcher = program, plan, session, watcher
        self.regions, self.replays = regions, replays
        self.foreign = plan.graph.foreign
        self.attentions = FusedAttentions()
        self.names: dict[str, Any] = {}
        self.locals: dict[str, str] = {}
        self.resident = plan.resident
        self.outside: set[str] = set()
        self.spare = in_place(program, plan.graph)
        self.awaited = {name for name, memory in resident.items() if session.store.copies.is_brought(memory)}
        for name, memory in resident.items():
            self.names[self.local(name)] = memory

    def source(self) -> str:
        program = self.program
        lines = [f"def {program.name}(args):"]
        arguments = [
            f"_{i}" if v.name in self.resident else self.local(v.name) for i, v in enumerate(program.arguments)
        ]
        if arguments:
            lines.append(f"    {', '.join(arguments)}, = args")
        lines.append("    args.clear()")
        if dead := [self.local(name) for name in program.unread if name not in self.resident]:
            lines.append(f"    del {', '.join(dead)}")
        arena = self.arena()
        lines += arena
        mark, single = "", tuple(self.parts(program))
        before = self.parts(self.plan.forward) if program is not self.plan.forward else ()
        self.strides = Strides(self.plan.graph, self.resident, (*before, *single))
        parts = single if self.replays is None else tuple(self.replays.shared.cut(program, single))
        if self.watcher is not None:
            begin, mark = self.constant(self.watcher.begin, "begin"), self.constant(self.watcher.mark, "mark")
            lines.append(f"    {begin}({self.constant(parts, 'parts')})")
        functions: list[str] = []
        for part in parts:
            arrivals = self.arrivals(part)
            written = self.stretch(part, arena, functions) if isinstance(part, Stretch) else self.part(part)
            lines.extend(f"    {line}" for line in (*arrivals, *written))
            if mark:
                lines.append(f"    {mark}()")
        results = ", ".join("None" if v is None else self.local(v.name) for v in program.results)
        lines.append(f"    return [{results}]")
        return "\n".join([*functions, *lines]) + "\n"

    def arena(self) -> list[str]:
        """Where the program's buffers lie, if any of them has a place there."""
        if not (num_bytes := self.program.arena_bytes):
            return []
        arena = self.session.arenas.take if self.replays is None else self.replays.shared.block
        return [f"    arena = {self.constant(arena, 'arena')}({num_bytes})"]

    def parts(self, program: Program) -> Iterable[Part]:
        """A program's instructions, and regions where they run as one: not while single ones are measured or shown."""
        watcher = self.watcher
        if self.regions is None or (watcher is not None and (watcher.takes_apart or not self.regions.is_shown)):
            return program.instructions
        return self.regions.cut(program, self.plan.graph)

    def arrivals(self, part: Part | Stretch) -> list[str]:
        """A wait for copies of parameters from the host that a part is the first to read."""
        reads = part.reads if isinstance(part, Stretch) else reads_of(part)
        due = [name for name in dict.fromkeys(v.name for v in reads) if name in self.awaited]
        self.awaited.difference_update(due)
        arrive = self.constant(self.session.store.copies.arrive, "arrive") if due else ""
        return [f"{arrive}({', '.join(map(self.local, due))})"] if due else []

    def part(self, part: Part) -> list[str]:
        return self.region(part) if isinstance(part, Region) else self.instruction(part)

    def stretch(self, stretch: Stretch, arena: list[str], functions: list[str]) -> list[str]:
        """A call of a stretch, whose parts are a function of their own."""
        assert self.replays is not None
        name = self.unique("stretch")
        self.names[name] = None
        given = ", ".join(self.local(v.name) for v in stretch.inputs)
        body = [f"    {given}, = args"] * bool(given) + ["    args.clear()", *arena]
        self.outside = {*stretch.frees} - {v.name for v in stretch.inputs}
        body += [f"    {line}" for part in stretch.parts for line in self.part(part)]
        self.outside = set()
        made = ", ".join(self.local(v.name) for v in stretch.outputs)
        functions += [f"def {name}(args):", *body, f"    return [{made}]"]
        names = self.names

        def steps(args: list[Any]) -> list[Any]:
            return cast(list[Any], names[name](args))

        return self.called(self.constant(self.replays.runner(steps), "replay"), stretch)

    def instruction(self, instruction: Instruction) -> list[str]:
        node = instruction.node
        frees = self.freed(instruction)
        lines = [] if node.op == "release" else [self.call(node)]
        return lines + ([f"del {', '.join(frees)}"] if frees else [])

    def region(self, region: Region) -> list[str]:
        """A call of a region, which is given the last references to what it is the last to read."""
        assert self.regions is not None
        run = self.constant(self.regions.runner(region, self.session, self.strides.loose(region)), "region")
        return self.called(run, region)

    def called(self, run: str, together: Region | Stretch) -> list[str]:
        frees = self.freed(together)
        results = ", ".join(self.local(v.name) for v in together.outputs)
        return [
            f"args = [{', '.join(self.local(v.name) for v in together.inputs)}]",
            *([f"del {', '.join(frees)}"] if frees else []),
            f"{results}, = {run}(args)",
        ]

    def freed(self, part: Part | Stretch) -> list[str]:
        """Names that are deleted after a part. A stretch's function deletes none that it was not given."""
        return [self.local(n) for n in part.frees if n not in self.resident and n not in self.outside]

    def call(self, node: Node) -> str:
        if row := self.foreign.get(node.op):
            op = private_runtime.direct(resolve(node.op))
            if node.op in ATTENTIONS and self.session.device.type != "cpu":
                op = self.attentions.of(node, op, self.plan.graph.users, self.plan.graph.output_names)
            function = self.constant(op, node.op)
            parts = [self.argument(a) for a in node.args] + [f"{k}={self.argument(a)}" for k, a in node.kwargs]
            multi = row.multi
        else:
            function = self.constant(EXECUTORS[node.op](node, self.session), f"{node.op}_{node.name}")
            parts = [self.local(v.name) for v in node.operands] + ["arena=arena"] * bool(offsets(node))
            parts += ["spare=True"] * (node.name in self.spare)
            multi = len(node.results) > 1
        call = f"{function}({', '.join(parts)})"
        results = ", ".join(self.local(r.name) for r in node.results)
        return f"{results}{',' if multi else ''} = {call}" if results else call

    def argument(self, arg: Arg) -> str:
        if isinstance(arg, Value):
            return self.local(arg.name)
        if isinstance(arg, tuple):
            return "[" + ", ".join(self.argument(a) for a in arg) + "]"
        if isinstance(arg, _PLAIN):
            return repr(arg)
        return self.constant(to_torch(arg, self.session.device, self.no_value), str(arg))

    @staticmethod
    def no_value(value: Value) -> Any:
        raise AssertionError(f"%{value.name} is no constant")

    def local(self, name: str) -> str:
        """The Python name of a value."""
        if name not in self.locals:
            self.locals[name] = self.unique("v_" + re.sub(r"\W", "_", name))
        return self.locals[name]

    def constant(self, thing: Any, hint: str) -> str:
        """A global name for `thing`."""
        stem = "k_" + re.sub(r"\W", "_", hint)
        if self.names.get(stem) is thing:
            return stem
        name = self.unique(stem)
        self.names[name] = thing
        return name

    def unique(self, stem: str) -> str:
        taken: Sequence[str] = (*self.names, *self.locals.values()) if stem in self.names else ()
        name, count = stem, 1
        while name in self.names or name in taken:
            count += 1
            name = f"{stem}_{count}"
        return name
