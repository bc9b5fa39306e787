"""The fastest candidate for running a group: measured once for each group that differs, on the device at hand.

What was measured is kept in a file for each kind of device and version of torch. The ranks share the groups among them
and tell each other, so that all of them choose the same. A candidate that fails is left out, and told.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Annotated

import torch
from pydantic import ConfigDict, Field, RootModel, ValidationError

from zgraph.bridge import private_inductor
from zgraph.bridge.aten import TO_TORCH
from zgraph.bridge.private_files import private_folder, read_private, write_private
from zgraph.bridge.private_inductor import Example
from zgraph.codegen.fallback import failures_raised
from zgraph.codegen.library import compile_together
from zgraph.cost import CostTable
from zgraph.environment import cache_folder
from zgraph.errors import KernelError, in_one_line
from zgraph.ir import Graph, Node, TensorType, Value
from zgraph.ir.external_ops import COMPILED, ROWS
from zgraph.ir.layout import dense_strides
from zgraph.ir.symbols import evaluate
from zgraph.passes import Context
from zgraph.passes.fuse import Fuse, candidates
from zgraph.passes.fusion.candidates import Candidate
from zgraph.runtime.clock import Clock
from zgraph.runtime.peers import Peers
from zgraph.runtime.region import Region
from zgraph.runtime.regions import Steps, has_inductor

NUM_WARMUPS = 3
NUM_ROUNDS = 15

NEVER_US = 1e12
"""Time of a candidate that cannot run here, in microseconds."""

Times = dict[str, dict[Candidate, float]]
"""Microseconds of each candidate, by the key of a group."""

Nodes = Mapping[Candidate, Sequence[Node]]
"""Operations of each candidate of a group."""

MAX_BYTES = 16 << 20
"""A file of times that is longer is none of ours: a group takes some 500 bytes."""


class _Kept(RootModel[dict[str, dict[Candidate, Annotated[float, Field(ge=0, allow_inf_nan=False)]]]]):
    """Content of a file of times."""

    model_config = ConfigDict(strict=True)


@dataclass
class Measured:
    """Measurements of one group.

    Args:
        us: the median time of each candidate in microseconds; `NEVER_US` of one that does not run here.
        failed: the reason, for each candidate that failed. It is tried again by the next process.
    """

    us: dict[Candidate, float] = field(default_factory=dict)
    failed: dict[Candidate, str] = field(default_factory=dict)


def tuned(
    graph: Graph,
    context: Context,
    device: torch.device,
    peers: Peers | None,
    tell: Callable[[str], None] = lambda text: None,
    kind: str = "",
    fuse: Fuse | None = None,
) -> CostTable:
    """Cost table with the times of the candidates for running each group of a graph.

    Torch's random numbers are as they were, whatever the candidates draw.

    Args:
        graph: as the pass `fuse` will see it.
        context: the table, and the sizes.
        device: where to measure.
        peers: the other ranks, which all come here; None without any.
        tell: is given a line for each candidate that failed, on every rank.
        kind: a word for the graph that no other graph of this call has.
        fuse: the pass, as the recipe has it.

    Raises:
        KernelError: a candidate broke the device.
    """
    wanted = {found.key: found.nodes for found in candidates(graph, context, fuse) if len(found.nodes) > 1}
    is_first = peers is None or peers.rank == peers.ranks[0]
    kept = _kept(device, wanted) if is_first else {}
    if peers is not None:
        kept = peers.exchange_values(f"kept times/{kind}", kept)[0]
    missing = [key for key, nodes in wanted.items() if not nodes.keys() <= kept.get(key, {}).keys()]
    at, count = (peers.ranks.index(peers.rank), len(peers.ranks)) if peers is not None else (0, 1)
    own = _all_measured({key: wanted[key] for key in missing[at::count]}, context.hints, device)
    answers = [{key: (found.us, found.failed) for key, found in own.items()}]
    if peers is not None:
        most = -(-len(missing) // count)  # groups that one rank measures: each may take as long as a wait
        answers = peers.exchange_values(f"times/{kind}", answers[0], num_limits=most + 1)
    new = {key: Measured(us, failed) for answer in answers for key, (us, failed) in answer.items()}
    for key, found in new.items():
        for candidate, reason in found.failed.items():
            tell(f'the candidate "{candidate}" for {_named(key, wanted)} is left out: {reason}')
    if is_first and new:
        _keep(device, new)
    times = kept | {key: found.us for key, found in new.items()}
    return context.costs.model_copy(update={"groups": {**context.costs.groups, **times}})


def _named(key: str, wanted: Mapping[str, Nodes]) -> str:
    """The group's kernel and its module, for a message."""
    nodes = wanted.get(key, {})
    texts = (str(node.args[1]) for node in nodes.get("kernel", ()) if node.op == ROWS)
    kernel = next(texts, key).partition(":")[0][:120]
    module = next((n.origin.module for some in nodes.values() for n in some if n.origin.module), "")
    return f"{kernel} in {module}" if module else kernel


# --- what was measured before ---------------------------------------------------------------------------------------


def times_path(device: torch.device) -> Path:
    """Where the times of a device lie: in a folder of this user alone.

    Raises:
        CacheError: it cannot be one.
    """
    kind = "cpu" if device.type == "cpu" else torch.cuda.get_device_name(device).replace(" ", "-").replace("/", "-")
    return private_folder(cache_folder(), "times") / f"{kind}-torch-{torch.__version__}.json"


def _kept(device: torch.device, wanted: Mapping[str, Nodes]) -> Times:
    return {key: us for key, us in _read(times_path(device)).items() if key in wanted}


def _keep(device: torch.device, new: Mapping[str, Measured]) -> None:
    """Add to the file; of a candidate that failed it says nothing."""
    path = times_path(device)
    kept = _read(path)
    for key, found in new.items():
        kept[key] = {candidate: us for candidate, us in found.us.items() if candidate not in found.failed}
    write_private(path, (json.dumps(kept, indent=1) + "\n").encode())


def _read(path: Path) -> Times:
    """Times that were measured before. Empty if the file is missing or none of ours: they are measured again then."""
    held = read_private(path, MAX_BYTES)
    try:
        return {} if held is None else _Kept.model_validate_json(held).root
    except ValidationError:
        return {}


# --- measuring ------------------------------------------------------------------------------------------------------


def _all_measured(groups: Mapping[str, Nodes], hints: Mapping[str, int], device: torch.device) -> dict[str, Measured]:
    """Measurements of each group. The device's memory, and torch's random numbers, are as before."""
    if not groups:
        return {}
    if has_inductor(device):
        if device.type != "cpu":
            private_inductor.warmed()
        compile_together(_for_inductor(groups, hints, device))
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        clock = _clock(device)
        found = {key: measured(nodes, hints, clock) for key, nodes in groups.items()}
    if clock.on_device:
        del clock
        torch.cuda.empty_cache()
    return found


def _for_inductor(
    groups: Mapping[str, Nodes], hints: Mapping[str, int], device: torch.device
) -> Iterator[tuple[str, Sequence[Example]]]:
    """The kernels that Inductor compiles for candidates, and the dense tensors that they read."""
    for node in (n for nodes in groups.values() for n in nodes.get("inductor", ()) if n.op == COMPILED):
        inputs, text = node.args
        assert isinstance(inputs, tuple)
        kinds = [value.tensor for value in inputs if isinstance(value, Value)]
        sizes = [tuple(evaluate(d, hints) for d in kind.shape) for kind in kinds]
        yield (
            str(text),
            [Example(s, dense_strides(s), TO_TORCH[k.dtype], device) for s, k in zip(sizes, kinds, strict=True)],
        )


def _clock(device: torch.device) -> Clock:
    try:
        return Clock(device, is_cold=True)
    except torch.OutOfMemoryError:  # of candidates that find their operands in a cache, too, the fastest is chosen
        return Clock(device, is_cold=False)


def measured(nodes: Nodes, hints: Mapping[str, int], clock: Clock) -> Measured:
    """The times of a group's candidates, which take turns. Without a compiler, Inductor has none.

    Raises:
        KernelError: a candidate broke the device.
    """
    found = Measured()
    runs: dict[Candidate, Callable[[], object]] = {}
    host_s: dict[Candidate, float] = {}
    operands: dict[str, torch.Tensor] = {}
    taken: dict[Candidate, list[float]] = {candidate: [] for candidate in nodes}
    with failures_raised():
        for candidate, some in nodes.items():
            if candidate == "inductor" and not has_inductor(clock.device):
                continue
            with _failing_into(found.failed, candidate, clock):
                run = _prepared(some, hints, clock.device, operands)
                for _ in range(NUM_WARMUPS):
                    run()
                host_s[candidate] = min(clock.host_s(run) for _ in range(NUM_WARMUPS))
                runs[candidate] = run
        for _ in range(NUM_ROUNDS):
            for candidate, run in runs.items():
                if candidate not in found.failed:
                    with _failing_into(found.failed, candidate, clock):
                        taken[candidate] += clock.seconds(run, 1, host_s[candidate])
    for candidate, seconds in taken.items():
        is_there = bool(seconds) and candidate not in found.failed
        found.us[candidate] = 1e6 * median(seconds) if is_there else NEVER_US
    return found


@contextmanager
def _failing_into(failed: MutableMapping[Candidate, str], candidate: Candidate, clock: Clock) -> Iterator[None]:
    """Makes an exception the reason why a candidate is left out, as long as the device lives on.

    Raises:
        KernelError: it does not.
    """
    try:
        yield
        clock.synchronize()
    except Exception as error:
        failed[candidate] = in_one_line(error)
        try:
            clock.synchronize()
        except RuntimeError as broken:
            raise KernelError(
                f'the candidate "{candidate}" for running a group broke the device ({in_one_line(broken)}), which no '
                'process recovers from; start again with kernels="aten", which runs no generated kernel'
            ) from error


def _prepared(
    nodes: Sequence[Node], hints: Mapping[str, int], device: torch.device, made: dict[str, torch.Tensor]
) -> Callable[[], object]:
    """A call of these nodes on random operands; those that are made already are shared."""
    inside = {r.name for n in nodes for r in n.results}
    operands = {v.name: v for n in nodes for v in n.operands if v.name not in inside}
    steps = Steps(Region(tuple(nodes), tuple(operands.values()), (), ()), device, {})
    missing = [v for v in operands.values() if _place(v) not in made]
    made.update(zip(map(_place, missing), _random(missing, hints, device), strict=True))
    given = [_place(v) for v in operands.values()]
    return lambda: steps([made[place] for place in given])


def _place(value: Value) -> str:
    """A value among the operands of all candidates."""
    return f"{value.name}: {value.type}"


def _random(values: Iterable[Value], hints: Mapping[str, int], device: torch.device) -> Iterable[torch.Tensor]:
    for value in values:
        kind = value.type
        assert isinstance(kind, TensorType), "kernels read tensors"
        shape = [evaluate(d, hints) for d in kind.shape]
        strides = [evaluate(d, hints) for d in kind.strides or dense_strides(kind.shape)]
        extent = 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
        flat = torch.empty(max(extent, 0), dtype=TO_TORCH[kind.dtype], device=device)
        flat = flat.normal_() if flat.is_floating_point() else flat.random_(0, 2)
        yield flat.as_strided(shape, strides)
