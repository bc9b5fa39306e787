"""Programs that a GPU repeats from recordings (CUDA graphs), so that the host launches a stretch of ops at once.

A program runs as it is a few times, is recorded in one run, and replayed from then on. A recording has fixed
addresses:

    what a stretch reads       a parameter, a cache, a place in the arena, what another recording made: where it was
                               recorded, or else this call runs as it is; anything else is copied to where it was
                               recorded
    what a program returns     a copy, but for values that wait for the backward: these stay where the recording has
                               them, and while somebody holds them the next forward runs as it is

Recordings of a plan share their memory. A program begins when the one before it is over, so that it may use what that
has left; what waits for the backward is nobody else's for good.
"""

from __future__ import annotations

import enum
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from zgraph.bridge import private_graphs
from zgraph.errors import in_one_line
from zgraph.ir import Plan, Program
from zgraph.runtime.arenas import Turns
from zgraph.runtime.stretches import Part, Stretch, cut

NUM_WARM_UPS = 2
"""Runs before the one that is recorded: kernels are compiled in the first, and libraries take their memory."""

MOST_TRIES = 2
"""Runs that may fail while they are recorded; then a program is never recorded."""

Run = Callable[[list[Any]], list[Any]]


class Mode(enum.Enum):
    """How a program runs: as it is, recorded and replayed, or replayed."""

    steps = "steps"
    records = "records"
    replays = "replays"


@dataclass(frozen=True)
class _Fixed:
    """An input whose address was recorded."""

    address: int

    def takes(self, given: torch.Tensor) -> bool:
        return given.data_ptr() == self.address


@dataclass(frozen=True)
class _Copied:
    """An input that is copied to where it was recorded."""

    memory: torch.Tensor

    @classmethod
    def like(cls, given: torch.Tensor) -> _Copied:
        """Memory laid out as an input is."""
        return cls(torch.empty_strided(given.size(), given.stride(), dtype=given.dtype, device=given.device))

    def takes(self, given: torch.Tensor) -> bool:
        if given.size() != self.memory.size() or (self.repeats and given.stride() != self.memory.stride()):
            return False
        _once(self.memory).copy_(_once(given))
        return True

    @property
    def repeats(self) -> bool:
        """Whether elements share memory."""
        return 0 in self.memory.stride()


def _once(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor without the repeats of an expanded one."""
    if 0 not in tensor.stride():
        return tensor
    size = [1 if step == 0 else count for count, step in zip(tensor.size(), tensor.stride(), strict=True)]
    return tensor.as_strided(size, tensor.stride())


class Waiting:
    """Values in the memory of recordings that wait for a backward: whether somebody holds them."""

    def __init__(self) -> None:
        self._counts: dict[int, int] = {}

    def watch(self, owners: Sequence[torch.Tensor]) -> None:
        """Notice from now on who holds more of these than their owner. Each has been handed out once so far."""
        handed = Counter(owner.untyped_storage()._cdata for owner in owners)
        self._counts |= {storage: private_graphs.holders(storage) - count for storage, count in handed.items()}

    @property
    def are_held(self) -> bool:
        """Whether anybody does."""
        return any(private_graphs.holders(storage) > count for storage, count in self._counts.items())


@dataclass
class Replays:
    """The recordings of one plan.

    Args:
        device: of this rank.
        plan: the plan.
        resident: the memory of parameters and constants, by the name of their value.
        turns: of all programs with memory that stays.
        arena: memory in which its programs lay their buffers out; None where they have none.
        caches: memory that the forward is given in each call and writes to, by the name of its value.

    `left` counts the ops that are left to the host, by the reason, and `failures` the stretches that could not be
    recorded. `num_replays` counts the programs that were replayed, `num_held` the forwards that ran as they are, since
    what the last one left for a backward was held, `num_moved` the programs that ran so from somewhere on, since what
    they read was elsewhere.
    """

    device: torch.device
    plan: Plan
    resident: Mapping[str, Any]
    turns: Turns
    arena: torch.Tensor | None = None
    caches: Mapping[str, torch.Tensor] = field(default_factory=dict)
    left: Counter[str] = field(default_factory=Counter)
    failures: Counter[str] = field(default_factory=Counter)
    num_replays: int = 0
    num_held: int = 0
    num_moved: int = 0
    num_stretches: int = 0
    num_ops: int = 0

    def __post_init__(self) -> None:
        self._programs: list[ProgramReplays] = []
        self._counted: set[int] = set()
        self._begin()

    def _begin(self) -> None:
        self.pool = private_graphs.new_pool()
        given = (*self.resident.values(), *self.caches.values())
        self.of_the_model = {_base(t) for t in given if isinstance(t, torch.Tensor)}
        self.lasting = self.of_the_model | ({_base(self.arena)} if self.arena is not None else set())
        self.pooled: set[int] = set()
        self.waiting = Waiting()
        self.forward = Mode.steps

    def forget(self) -> None:
        """Forget all recordings, as memory that they read has moved, and give theirs back: programs begin anew."""
        for program in self._programs:
            program.forget()
        self._begin()

    def block(self, num_bytes: int) -> torch.Tensor:
        """A program's arena, always in the same place."""
        assert self.arena is not None
        return self.arena[:num_bytes]

    def of(self, program: Program) -> ProgramReplays:
        """Recordings of one program, of which there are none yet."""
        made = ProgramReplays(self, program)
        self._programs.append(made)
        return made

    def cut(self, program: Program, parts: Iterable[Part]) -> Iterator[Part | Stretch]:
        """A program's parts, with stretches in the place of those that they hold."""
        plan = self.plan
        is_new = id(program) not in self._counted and program in (plan.forward, *usual_backward(plan))
        self._counted.add(id(program))
        left = self.left if is_new else Counter[str]()
        for part in cut(parts, plan.graph, plan.resident, left, frozenset(self.caches)):
            if isinstance(part, Stretch) and is_new:
                self.num_stretches += 1
                self.num_ops += part.num_ops
            yield part

    def __str__(self) -> str:
        left = ", ".join(f"{count} {why}" for why, count in self.left.most_common())
        if not self.num_stretches:
            return f"nothing to record: {left or 'too few ops'}"
        found = [f"{self.num_ops:,} ops in {self.num_stretches} recordings, programs replayed {self.num_replays} times"]
        found += [f"left to the host {left}"] if left else []
        found += [f"{count} not recorded: {why}" for why, count in self.failures.items()]
        found += [f"{self.num_held} forwards op by op, as a backward was to come"] if self.num_held else []
        found += [f"{self.num_moved} programs op by op, as what they read had moved"] if self.num_moved else []
        return "; ".join(found)


def usual_backward(plan: Plan) -> tuple[Program, ...]:
    """The backward that a training step has."""
    found = plan.loss_only[0] if plan.loss_only else plan.backward
    return (found,) if found is not None else ()


class ProgramReplays:
    """The recordings of one program."""

    def __init__(self, shared: Replays, program: Program) -> None:
        self.shared, self.program = shared, program
        self.is_forward = program is shared.plan.forward
        self._stretches: list[_Stretch] = []
        self.forget()

    def forget(self) -> None:
        """Forget the recordings, if there are any: the next run is the first."""
        for stretch in self._stretches:
            stretch.forget()
        self.mode, self.has_moved = Mode.steps, False
        self._num_runs = self._num_failures = 0
        self._is_open = False
        self._leaving: _Leaving | None = None

    def runner(self, steps: Run) -> Run:
        """The function that runs a stretch, whose parts `steps` runs."""
        made = _Stretch(self, steps)
        self._stretches.append(made)
        return made

    def around(self, run: Run) -> Run:
        """The program, which decides for each run how it is done."""
        if not self._stretches:
            return run

        def replaying(args: list[Any]) -> list[Any]:
            self._begin()
            return self._end(run(args))

        return replaying

    def _begin(self) -> None:
        shared = self.shared
        if self._is_open and self._leaving is None:  # a run failed half-way
            self._num_failures += 1
            for stretch in self._stretches:
                stretch.forget()
        self._num_runs += 1
        self.mode, self.has_moved = Mode.steps, False
        if self._num_runs > NUM_WARM_UPS and self._num_failures < MOST_TRIES:
            if self._leaving is not None:
                self.mode = Mode.replays
            elif self.is_forward or shared.forward is not Mode.steps:
                self.mode = Mode.records
        if self.is_forward:
            if self.mode is not Mode.steps and shared.waiting.are_held:
                shared.num_held += 1
                self.mode = Mode.steps
            shared.forward = self.mode
        self._is_open = self.mode is not Mode.steps
        shared.turns.follow()

    def _end(self, results: list[Any]) -> list[Any]:
        if self.mode is Mode.steps:
            return results
        is_first = self._leaving is None
        if self._leaving is None:
            self._leaving = _Leaving.of(self, results)
        self._leaving.hand_out(results)
        if is_first and self.is_forward:
            self.shared.waiting.watch([*self._leaving.owners.values()])
        self.shared.num_moved += self.has_moved
        self.shared.num_replays += not (is_first or self.has_moved)
        self._is_open = False
        return results


@dataclass(frozen=True)
class _Leaving:
    """How results leave a program.

    Args:
        owners: values that wait for the backward where a recording has them, by position; nobody else gets that memory.
        copies: positions of results in memory that the next replay writes to.
    """

    owners: dict[int, torch.Tensor]
    copies: list[int]

    @classmethod
    def of(cls, program: ProgramReplays, results: Sequence[Any]) -> _Leaving:
        """The same of a run that was recorded."""
        shared, wanted = program.shared, program.program.results
        num_saved = len(shared.plan.saved) if program.is_forward else 0
        ours = (shared.lasting | shared.pooled) - shared.of_the_model
        found = cls({}, [])
        for index, made in enumerate(results):
            if not isinstance(made, torch.Tensor) or _base(made) not in ours:
                continue
            if index >= len(wanted) - num_saved:
                found.owners[index] = made
            else:
                found.copies.append(index)
        return found

    def hand_out(self, results: list[Any]) -> None:
        """Change results to what leaves."""
        for index, owner in self.owners.items():
            if results[index].data_ptr() == owner.data_ptr():
                results[index] = owner.detach()
        if self.copies:
            made = private_graphs.copies([results[index] for index in self.copies])
            for index, copy in zip(self.copies, made, strict=True):
                results[index] = copy


class _Stretch:
    """One stretch of a program: run as it is, or replayed."""

    def __init__(self, program: ProgramReplays, steps: Run) -> None:
        self.program, self.steps = program, steps
        self.graph: private_graphs.Recording | None = None
        self.has_failed = False
        self.inputs: list[_Fixed | _Copied | None] = []
        self.outputs: list[torch.Tensor | None] = []

    def forget(self) -> None:
        """Forget the recording."""
        self.program.shared.lasting -= {_base(i.memory) for i in self.inputs if isinstance(i, _Copied)}
        self.graph, self.inputs, self.outputs = None, [], []

    def __call__(self, args: list[Any]) -> list[Any]:
        mode = self.program.mode
        if mode is Mode.records and not self.has_failed:
            return self._record(args)
        if mode is Mode.steps or self.graph is None:
            return self.steps(args)
        for wanted, given in zip(self.inputs, args, strict=True):
            if wanted is not None and not wanted.takes(given):
                self.program.has_moved = True
                return self.steps(args)
        args.clear()
        self.graph.replay()
        return [*self.outputs]

    @torch.no_grad()
    def _record(self, args: list[Any]) -> list[Any]:
        """Record, and replay for the first time. Where that cannot be, run as it is from now on."""
        with torch.inference_mode(mode=False):
            problem = _problem(args, self.program.shared.device) or self._recorded(args)
        if problem:
            self.has_failed = True
            self.forget()
            self.program.shared.failures[problem] += 1
            return self.steps(args)
        assert self.graph is not None
        self.graph.replay()
        shared, made = self.program.shared, self.outputs
        shared.pooled |= {_base(o) for o in made if o is not None} - shared.lasting
        self.outputs = [self._kept(o) for o in made]
        args.clear()
        return made

    def _recorded(self, args: Sequence[Any]) -> str:
        """Record; why that cannot be, or nothing. The outputs are those that hold the memory."""
        shared = self.program.shared
        self.inputs = [self._input(given) for given in args]
        placed = [w.memory if isinstance(w, _Copied) else a for w, a in zip(self.inputs, args, strict=True)]
        try:
            self.graph, made = private_graphs.recorded(lambda: self.steps(placed), shared.pool, shared.device)
        except (RuntimeError, NotImplementedError) as error:
            return in_one_line(error)
        self.outputs = [*made]
        return ""

    def _input(self, given: torch.Tensor | None) -> _Fixed | _Copied | None:
        if given is None:
            return None
        shared = self.program.shared
        if _base(given) in shared.lasting | shared.pooled:
            return _Fixed(given.data_ptr())
        copied = _Copied.like(given)
        copied.takes(given)
        shared.lasting.add(_base(copied.memory))
        return copied

    def _kept(self, made: torch.Tensor | None) -> torch.Tensor | None:
        """An output as later replays give it: it does not hold memory that later recordings may use."""
        return private_graphs.alias(made) if made is not None and _base(made) in self.program.shared.pooled else made


def _problem(args: Sequence[Any], device: torch.device) -> str:
    """Why a stretch that is given these cannot be recorded; empty if it can."""
    for given in args:
        if isinstance(given, torch.Tensor) and given.device.type != device.type:
            return "reads what is in the host's memory"
        if given is not None and not isinstance(given, torch.Tensor):
            return "reads a number of the host's"
    return ""


def _base(tensor: torch.Tensor) -> int:
    """Where a tensor's memory begins."""
    return tensor.untyped_storage().data_ptr()
