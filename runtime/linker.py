"""From a plan to the runners of its forward and backward: agreed on by all ranks, with failures told to the peers."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import cache
from types import MappingProxyType
from typing import Any

import torch

from zgraph.ir import InputKind, OutputKind, Phase, Plan, Program, Shard
from zgraph.runtime.agreement import plan_text, wire_of
from zgraph.runtime.executor import Runner, link
from zgraph.runtime.gradients import Gradient, needs_token, token
from zgraph.runtime.interpreted import Interpreted
from zgraph.runtime.recorder import Watcher
from zgraph.runtime.regions import Regions
from zgraph.runtime.replays import Replays
from zgraph.runtime.session import Session
from zgraph.runtime.shards import Slot
from zgraph.runtime.unused import Tangents, Unused


def link_plan(
    session: Session,
    plan: Plan,
    constants: Mapping[str, torch.Tensor],
    captured: str,
    known: str = "",
    regions: Regions | None = None,
    behind: Mapping[str, Tangents] = MappingProxyType({}),
    survives: Callable[[BaseException], bool] = lambda error: False,
    replays: Callable[[Mapping[str, Any]], Replays] | None = None,
) -> tuple[Runner, Runner | None]:
    """The runners of a plan's forward and backward, once all ranks have agreed on it.

    Args:
        session: what the programs work on.
        plan: the plan.
        constants: tensors that the forward reads beside parameters and buffers.
        captured: the graph that the plan was made of, as text.
        known: what the passes knew.
        regions: if given, they compile what is between collectives; else torch's interpreter runs it.
        behind: what `tangents_behind` finds in the captured graph.
        survives: whether all ranks go on after an error of theirs, so that the peers need not be told.
        replays: if given, makes what the GPU repeats stretches of the programs by, of the memory that stays.

    Raises:
        PlanMismatchError: the ranks compiled different plans.
    """
    session.arenas.reserve(plan, together=_agree(session, plan, captured, known))
    slots = session.store.slots
    resident: dict[str, Any] = {}
    for entry in plan.graph.inputs:
        if entry.target in slots and entry.value.name in plan.resident:
            resident[entry.value.name] = slots[entry.target].working
        elif entry.target in constants and entry.value.name in plan.resident:
            resident[entry.value.name] = constants[entry.target].to(session.device)
    session.plans.append(plan)
    together = regions or Interpreted(session.device)
    recordings = replays(resident) if replays is not None else None

    @cache
    def runner(program: Program, watcher: Watcher | None) -> Runner:
        repeats = recordings is not None and (watcher is None or not watcher.takes_apart)
        of_program = recordings.of(program) if recordings is not None and repeats else None
        return link(program, plan, session, resident, watcher, together, of_program)

    if regions is not None:
        regions.take_context()
        first = [p for p in (plan.forward, plan.loss_only[0] if plan.loss_only else plan.backward) if p is not None]
        regions.compile(first, plan.graph, session)
        for program in first:
            runner(program, None)
    kinds = [i.value.tensor for i in plan.graph.inputs if i.kind is InputKind.tangent]
    tangents = tuple(kinds) if behind else ()

    def forward(args: list[Any]) -> list[Any]:
        session.begin_program()
        session.num_plans_run += 1
        session.loss_only_call = plan.loss_only is not None and session.num_plans_run == 1
        session.tangents = tangents if session.num_plans_run == 1 else ()
        return runner(plan.forward, session.watcher)(args)

    guarded = _guarded(session, forward, survives)
    if plan.backward is None or plan.unsynced is None:
        return guarded, None
    programs = {(True, False): plan.backward, (False, False): plan.unsynced}
    if plan.loss_only:
        programs |= {(True, True): plan.loss_only[0], (False, True): plan.loss_only[1]}

    def backward(syncs: bool, loss_only: bool) -> Runner:
        return runner(programs[syncs, loss_only], session.watcher)

    return guarded, _guarded(session, _backward(session, plan, plan.backward, backward, behind), survives)


def _scales(plan: Plan, program: Program) -> dict[int, float]:
    """Factors of the gradients of outputs, by their position among a backward's arguments.

    A loss that is made of a rank's own rows, outside of the model, is one of as many as there are ranks along the axis
    of these rows, of which the mean is meant, as it is along axes of data.
    """
    mesh, found = plan.graph.mesh, {}
    kinds = {i.value.name: i.value.tensor for i in plan.graph.inputs if i.kind is InputKind.tangent}
    for index, value in enumerate(program.arguments):
        places = kinds[value.name].placement if value.name in kinds else ()
        sizes = [a.size for a, p in zip(mesh, places, strict=False) if a.name == "expert" and isinstance(p, Shard)]
        if sizes:
            found[index] = 1 / math.prod(sizes)
    return found


def _agree(session: Session, plan: Plan, captured: str, known: str) -> bool:
    """Compare the plan with the peers', unless its collectives are those of a plan that they have agreed on.

    The first plan of each kind must be the same text everywhere, programs included. Later ones may come on some
    ranks alone (a new sequence length): they are safe as long as what goes over the wire, and when, stays the same.

    Returns:
        Whether all ranks are here with this plan.
    """
    if session.is_alone:
        return True
    marks, wire = wire_of(plan)
    if is_new := wire not in session.agreed:
        session.peers.agree("program", plan_text(plan, captured, known))
        session.agreed.add(wire)
    session.marks |= marks
    return is_new


def _guarded(session: Session, run: Runner, survives: Callable[[BaseException], bool]) -> Runner:
    """`run`, telling the peers if it fails, unless they all survive that."""

    def guarded(args: list[Any]) -> list[Any]:
        try:
            return run(args)
        except BaseException as error:
            if not survives(error):
                session.fail(error)
            raise

    return guarded


def _backward(
    session: Session,
    plan: Plan,
    program: Program,
    runner: Callable[[bool, bool], Runner],
    behind: Mapping[str, Tangents],
) -> Runner:
    """Runs the backward that is due. Gradients of parameters leave as tokens, where autograd could not take them.

    Args:
        session: what the programs work on.
        plan: the plan.
        program: its backward.
        runner: gives the backward that syncs or not, and that leaves out zero tangents or not.
        behind: see `link_plan`.
    """
    names = {i.value.name: i.target for i in plan.graph.params}
    outputs = [o for o in plan.graph.outputs if o.phase is not Phase.forward]
    by_name = {name: slot for name, slot in session.store.slots.items() if needs_token(slot, session)}
    slots: list[Slot | None] = [
        by_name.get(names[o.target]) if o.kind is OutputKind.grad and o.target in names else None for o in outputs
    ]
    held = {str(n.option("target")): n.operands[0].tensor for n in plan.graph.nodes if n.op == "accumulate"}
    session.kinds |= held
    zeros_at = [i for i, v in enumerate(program.arguments) if v.name in plan.zero_tangents]
    scales = _scales(plan, program)
    unused = Unused(session, plan, outputs, behind)
    on_host = [slot.name for slot in slots if slot is not None and slot.offload]
    brings = {True: bool(on_host), False: not held.keys() >= {*on_host}}

    def backward(args: list[Any]) -> list[Any]:
        session.begin_program()
        syncs = session.reduces
        loss_only = bool(zeros_at) and all(args[i] is None for i in zeros_at)
        left_out = unused.of_this_backward()
        for index, scale in scales.items():
            args[index] = args[index] if args[index] is None else args[index] * scale
        results = runner(syncs, loss_only)(args)
        for index in left_out:
            results[index] = None
        if brings[syncs]:
            session.host.to_host.synchronize()  # the optimizer reads gradients from here on
        if session.syncs:
            session.forget_copies()
        for index, slot in enumerate(slots):
            if slot is None or results[index] is None:
                continue
            results[index] = token(slot, Gradient(results[index], not syncs and slot.name in held))
        return results

    return backward
