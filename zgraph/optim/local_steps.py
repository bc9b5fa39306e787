"""Local steps: replicas of a model train apart, and every so often they agree on how far they came.

Each replica takes `every` steps of its own optimizer. How far it went from where all began, the outer gradient, is
averaged over the replicas, and an outer optimizer takes a step from that beginning: DiLoCo (Douillard et al., 2023,
arXiv 2311.08105, algorithm 1). Parameters may take turns in fragments, and a fragment's mean may arrive some steps
after it was asked for, while the replica goes on: Streaming DiLoCo (Douillard et al., 2025, arXiv 2501.18512, sections
2.2 to 2.4).

Outer gradients travel as codes, with error feedback: as in `zgraph.passes.compress`, each replica codes its own, the
owner of a part adds what the codes stand for, and codes the mean once more.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from zgraph.environment import environment
from zgraph.errors import PeerError, StateDictError, UsageError
from zgraph.ir.codecs import Codec, Raw, Sized, parse_codec
from zgraph.optim.replicas import agree, group_like, take_first
from zgraph.optim.runs import local
from zgraph.optim.travel import Travel

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Nesterov:
    """The outer optimizer: SGD with Nesterov's momentum, on the mean of the outer gradients.

    Args:
        lr: the learning rate; 1 without momentum takes the mean of the replicas' parameters.
        momentum: how much of the last direction is kept, from 0 to below 1.

    Raises:
        UsageError: a number means nothing.
    """

    lr: float = 0.7
    momentum: float = 0.9

    def __post_init__(self) -> None:
        if not self.lr > 0 or not 0 <= self.momentum < 1:
            raise UsageError(f"Nesterov takes lr above 0 and momentum from 0 to below 1, not {self}")


@dataclass
class Fragment:
    """Parameters whose turn comes together.

    Args:
        names: of the parameters.
        parameters: this rank's shards.
        begin: where all replicas began, [numbers] in fp32.
        momentum: of the outer optimizer, likewise.
        travel: takes its outer gradients to the other replicas.
        agreed_at: the step after which all replicas held the same.
        due: the step after which the mean that is under way is taken in; 0 if none is.
        mean: the mean that is under way.
        left: where this replica was when it asked for it, if it went on meanwhile.
    """

    names: tuple[str, ...]
    parameters: list[torch.Tensor]
    begin: torch.Tensor
    momentum: torch.Tensor
    travel: Travel
    agreed_at: int = 0
    due: int = 0
    mean: Future[torch.Tensor] | None = None
    left: torch.Tensor | None = None

    @property
    def numels(self) -> list[int]:
        """Numbers of each shard."""
        return [p.numel() for p in self.parameters]

    def now(self) -> torch.Tensor:
        """Parameters as they are, [numbers] in fp32."""
        return torch.cat([p.detach().reshape(-1).float() for p in self.parameters])

    def put(self, flat: torch.Tensor) -> None:
        """Write all parameters."""
        with torch.no_grad():
            for parameter, part in zip(self.parameters, torch.split(flat, self.numels), strict=True):
                parameter.copy_(part.view(parameter.shape))


class LocalSteps:
    """Replicas of one model that train apart: what `zgraph.local_steps` returns.

    Attributes:
        every, fragments, delay, outer, codec: as given.
        steps: of the optimizer so far.
        skipped: outer steps that were not taken, as a replica's parameters were not finite.
    """

    def __init__(
        self,
        named: Sequence[tuple[str, nn.Parameter]],
        group: dist.ProcessGroup,
        every: int,
        outer: Nesterov,
        codec: Codec,
        fragments: int,
        delay: int,
    ) -> None:
        self.group, self.every, self.outer, self.codec, self.delay = group, every, outer, codec, delay
        self.steps, self.skipped = 0, 0
        self._named = dict(named)
        self._thread = ThreadPoolExecutor(1, "zgraph-local-steps")
        self.fragments = [self._fragment(names) for names in _split(named, fragments)]
        meshes = {p.device_mesh for _, p in named if isinstance(p, DTensor)}
        self._meshes = sorted(meshes, key=lambda mesh: mesh.mesh.flatten().tolist())

    def _fragment(self, names: Sequence[str]) -> Fragment:
        shards = [local(self._named[name]) for name in names]
        begin = torch.cat([s.detach().reshape(-1).float() for s in shards])
        travel = Travel(self.codec, begin.numel(), self.group, begin.device)
        return Fragment(tuple(names), shards, begin, torch.zeros_like(begin), travel)

    # --- the schedule ----------------------------------------------------------------------------------------------

    def after_step(self, *_: object) -> None:
        """Count a step of the optimizer, which calls it; ask for means whose turn it is, and take in those due.

        Raises:
            PeerError: a replica is gone, or does not come.
        """
        self.steps += 1
        for number, fragment in enumerate(self.fragments):
            if fragment.due and self.steps >= fragment.due:
                self._take(fragment)
            if self.steps % self.every == self._turn(number):
                self._ask(fragment)
                if not self.delay:
                    self._take(fragment)

    def _turn(self, number: int) -> int:
        """The step, modulo `every`, after which a fragment asks: they are spread over the steps between."""
        return (number + 1) * self.every // len(self.fragments) % self.every

    def synchronise(self) -> None:
        """Take an outer step with all fragments now, so that all replicas hold the same parameters.

        All replicas call it together: before a checkpoint, an evaluation, and after the last step.

        Raises:
            PeerError: a replica is gone, or does not come.
        """
        for fragment in self.fragments:
            if fragment.due:
                self._take(fragment)
        moved = [fragment for fragment in self.fragments if fragment.agreed_at != self.steps]
        for fragment in moved:
            self._ask(fragment)
        for fragment in moved:
            self._take(fragment)

    def _ask(self, fragment: Fragment) -> None:
        now = fragment.now()
        fragment.left = now if self.delay else None
        fragment.due = self.steps + self.delay
        gradient = fragment.begin - now
        ready = torch.cuda.current_stream().record_event() if gradient.is_cuda else None
        fragment.mean = self._thread.submit(fragment.travel.mean, gradient, ready)

    def _take(self, fragment: Fragment) -> None:
        """Take the outer step; what this replica moved since it asked stays."""
        assert fragment.mean is not None
        try:
            mean = fragment.mean.result()
        except RuntimeError as error:
            raise PeerError(
                f"outer step after step {self.steps}: another replica is gone, or did not come within "
                f"{environment().timeout_s:g} seconds; start again from the last checkpoint, or set ZGRAPH_TIMEOUT to "
                f"more seconds ({error})"
            ) from error
        since = fragment.now() - fragment.left if fragment.left is not None else None
        if self.steps == fragment.due - self.delay:
            fragment.agreed_at = self.steps
        fragment.mean, fragment.left, fragment.due = None, None, 0
        if self._is_finite(mean):
            fragment.momentum.mul_(self.outer.momentum).add_(mean)
            fragment.begin.sub_(mean.add_(fragment.momentum, alpha=self.outer.momentum), alpha=self.outer.lr)
        else:
            since = None
            self.skipped += 1
            log.warning(
                "outer step after step %d: not all replicas' parameters are finite from %s on; all go back to where "
                "these began",
                self.steps,
                fragment.names[0],
            )
        fragment.put(fragment.begin if since is None else fragment.begin + since)

    def _is_finite(self, mean: torch.Tensor) -> bool:
        """Whether a mean is finite on all ranks of a replica, each of which has that of its shards."""
        is_finite = mean.isfinite().all().int()
        for mesh in self._meshes:
            flag = is_finite.to(mesh.device_type)
            for dim in range(mesh.ndim):
                dist.all_reduce(flag, dist.ReduceOp.MIN, group=mesh.get_group(dim))
            is_finite = flag
        return bool(is_finite)

    # --- figures ---------------------------------------------------------------------------------------------------

    @property
    def sent_bytes(self) -> int:
        """Bytes that this rank has sent to other replicas so far."""
        return sum(f.travel.sent_bytes for f in self.fragments)

    @property
    def num_bytes(self) -> int:
        """Bytes of memory: beginnings, momentum, rests of codes, and where means that are under way were asked for."""
        left = sum(f.left.nbytes for f in self.fragments if f.left is not None)
        return left + sum(f.begin.nbytes + f.momentum.nbytes + f.travel.num_bytes for f in self.fragments)

    # --- checkpoints -----------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """State for a checkpoint: momentum and rests by parameter, placed as it is, and the step. All call it.

        Rests are split evenly over the replicas on the way, so that the run goes on from exactly what is saved.

        Raises:
            StateDictError: replicas hold different parameters, as steps were taken since they agreed.
        """
        if any(f.agreed_at != self.steps or f.due for f in self.fragments):
            raise StateDictError("replicas hold different parameters since the last step: call synchronise() first")
        found: dict[str, Any] = {"steps": self.steps}
        for fragment in self.fragments:
            kept = {"momentum": fragment.momentum, "rest": fragment.travel.evened(), "begin": fragment.begin}
            for key, flat in kept.items():
                for name, part in zip(fragment.names, torch.split(flat, fragment.numels), strict=True):
                    if key != "begin" or self._named[name].dtype != torch.float32:
                        found[f"{key}.{name}"] = self._placed(name, part)
        return found

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` gave, after the model has loaded its own state. All call it.

        Raises:
            StateDictError: a parameter is missing, or has another shape here.
        """
        for fragment in self.fragments:
            if fragment.mean is not None:
                fragment.mean.exception()  # its thread writes to the rests until it is there
            found = {key: [self._given(state, key, name) for name in fragment.names] for key in ("momentum", "rest")}
            fragment.momentum.copy_(torch.cat(found["momentum"]))
            fragment.travel.put(torch.cat(found["rest"]))
            for name, part, now in zip(
                fragment.names,
                torch.split(fragment.begin, fragment.numels),
                torch.split(fragment.now(), fragment.numels),
                strict=True,
            ):
                is_whole = self._named[name].dtype == torch.float32
                part.copy_(now if is_whole else self._given(state, "begin", name))
            fragment.due, fragment.mean, fragment.left = 0, None, None
            fragment.agreed_at = int(state["steps"])
        self.steps = int(state["steps"])

    def _given(self, state: Mapping[str, Any], key: str, name: str) -> torch.Tensor:
        found = state.get(f"{key}.{name}")
        if found is None or tuple(found.shape) != tuple(self._named[name].shape):
            has = "is missing" if found is None else f"has shape {tuple(found.shape)}"
            raise StateDictError(
                f"{key} of {name}, {tuple(self._named[name].shape)}, {has}; load what state_dict() of the local steps "
                "of this model gave"
            )
        return local(found).reshape(-1).float()

    def _placed(self, name: str, part: torch.Tensor) -> torch.Tensor:
        parameter = self._named[name]
        own = part.view(local(parameter).shape).clone()
        if not isinstance(parameter, DTensor):
            return own
        return DTensor.from_local(
            own,
            parameter.device_mesh,
            parameter.placements,
            run_check=False,
            shape=parameter.shape,
            stride=parameter.stride(),
        )


def _split(named: Sequence[tuple[str, nn.Parameter]], count: int) -> Iterator[list[str]]:
    """Names in so many parts, in order, of about as many numbers each."""
    total = sum(local(p).numel() for _, p in named)
    parts: list[list[str]] = [[] for _ in range(count)]
    before = 0
    for name, parameter in named:
        parts[min(before * count // max(total, 1), count - 1)].append(name)
        before += local(parameter).numel()
    return (part for part in parts if part)


def local_steps(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    mesh: DeviceMesh,
    *,
    every: int,
    outer: Nesterov | None = None,
    codec: str | Codec | None = "q8(block=256)",
    fragments: int = 1,
    delay: int = 0,
) -> LocalSteps:
    """Let replicas of a model train apart, and average how far they came every so many steps.

    Each replica is compiled over its own ranks; the ranks of a mesh of one more axis hold the same shard:

        mesh = init_device_mesh("cpu", (2, 4), mesh_dim_names=("outer", "inner"))
        model = zgraph.compile(model, stage=3, mesh=mesh["inner"])
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)
        outer = zgraph.local_steps(model, optimizer, mesh["outer"], every=50)

    All replicas begin with the parameters of the first. Steps of the optimizer are counted by a hook. Buffers and the
    optimizer's state stay each replica's own. DiLoCo: Douillard et al., 2023.

    Args:
        model: compiled by `zgraph.compile` over the ranks of one replica; or a plain module on one rank each.
        optimizer: of its parameters.
        mesh: of one axis, the ranks that hold this rank's shard in the other replicas.
        every: steps between two outer steps.
        outer: the outer optimizer, `Nesterov(0.7, 0.9)` by default.
        codec: of outer gradients, with error feedback; None sends them in fp32.
        fragments: in how many parts parameters take turns, so that less is sent at a time.
        delay: steps that a mean may take to arrive, while the replica goes on; less than `every`. 0 waits for it.

    Returns:
        The handle: `synchronise()`, `state_dict()`, `load_state_dict()`, `sent_bytes`.

    Raises:
        UsageError: an argument means nothing, or replicas disagree in one; on all ranks.
        CodecError: the codec does not parse.
    """
    if not isinstance(mesh, DeviceMesh) or mesh.ndim != 1 or mesh.size() < 2:
        raise UsageError(
            'mesh must have one axis of two ranks or more, those that hold the same shard: init_device_mesh("cpu", '
            '(2, 4), mesh_dim_names=("outer", "inner"))["outer"]'
        )
    outer, group = outer if outer is not None else Nesterov(), mesh.get_group()
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    problem: UsageError | None = None
    chosen: Codec = Raw()
    try:
        chosen = parse_codec(codec) if isinstance(codec, str) else codec if codec is not None else chosen
        _check(named, every, fragments, delay, chosen)
    except UsageError as error:
        problem = error
    shapes = ", ".join(f"{n} {tuple(local(p).shape)} {p.dtype}" for n, p in model.named_parameters())
    options = f"every={every}, outer={outer}, codec={chosen}, fragments={fragments}, delay={delay}"
    agree(group, problem, options, shapes)
    own = group_like(group)
    take_first(model, own)
    found = LocalSteps(named, own, every, outer, chosen, fragments, delay)
    optimizer.register_step_post_hook(found.after_step)
    return found


def _check(named: Sequence[tuple[str, nn.Parameter]], every: int, fragments: int, delay: int, codec: object) -> None:
    if isinstance(codec, Sized):
        raise UsageError(f"{codec} is a codec of parameters; take q8 or q4")
    if not named:
        raise UsageError("no parameter of the model is trained: there is nothing to average")
    if wide := [(name, p.dtype) for name, p in named if not p.is_floating_point() or p.dtype == torch.float64]:
        raise UsageError(f"outer gradients are fp32, and {wide[0][0]} is {wide[0][1]}; train in fp32 or less")
    for name, value, least in (("every", every, 1), ("fragments", fragments, 1), ("delay", delay, 0)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise UsageError(f"{name} must be a whole number from {least} on, not {value!r}")
    if delay >= every and delay:
        raise UsageError(f"delay={delay} steps must be less than every={every}: a mean arrives before the next is due")
    if fragments > every:
        raise UsageError(f"fragments={fragments} take turns within every={every} steps: take at most so many")
    if not isinstance(codec, Codec):
        raise UsageError(f'codec must be a codec such as "q8(block=256)", or None, not {codec!r}')


__all__ = ["LocalSteps", "Nesterov", "local_steps"]
