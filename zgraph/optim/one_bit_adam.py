"""Adam whose momentum travels in one bit a number, while the variance is frozen.

The momentum of a step is linear in the gradients of the ranks; what divides it is not, and must be the same on all.
So each rank adds its own gradient to the momentum that all have, codes that with what earlier codes left out, and all
take the mean of the codes as the momentum: 1-bit Adam (Tang et al., ICML 2021, algorithm 1). The variance is updated in
a few steps alone, ever more seldom, by gradients that are averaged in fp32: 0/1 Adam (Lu et al., arXiv 2202.06009,
section 4), without its local steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from zgraph.bridge import private_runtime
from zgraph.errors import UsageError
from zgraph.ir.codecs import Codec, Sized, parse_codec
from zgraph.ir.layout import chunk_rows
from zgraph.optim.flat import check_numbers
from zgraph.optim.replicas import group_like
from zgraph.optim.runs import local, saved_states
from zgraph.optim.travel import Travel
from zgraph.runtime.gradients import is_unreduced
from zgraph.runtime.shards import ShardStore, Slot, slots_at_rest

STAGES = (0, 1)
"""Those that leave a gradient whole on the rank that made it."""


class OneBitAdam(Optimizer):
    """Adam with decoupled weight decay, whose momentum travels as codes once the variance is frozen.

    Until then it is AdamW: gradients are averaged in fp32 in `step`. A parameter without a gradient counts as one whose
    gradient is zero. An element whose variance is still zero has no momentum: codes of a block move all its elements,
    and nothing would divide the move. A step whose momentum is not finite on some rank changes nothing on any, and
    counts in `skipped`.

    Args:
        params: parameters, or groups of them, of one model that `zgraph.compile` has at stage 0 or 1. From here on its
            backwards leave gradients unreduced.
        lr: the learning rate.
        betas: decay of momentum and variance.
        eps: added to the denominator.
        weight_decay: decoupled from the gradient.
        codec: of the momentum.
        freeze_step: the last step that may update the variance.
        doubling: updates of the variance after which the steps between two are twice as many, as in 0/1 Adam; 0 updates
            it in every step until it is frozen, as 1-bit Adam does.

    Each rank holds the whole momentum in fp32, what codes have left out, and whether there is a variance: 9 bytes a
    parameter. The variance lies as the parameter does.

    Raises:
        UsageError: an argument means nothing, or a parameter is of another stage, of another model or of none.
        CodecError: the codec's text does not parse.
    """

    takes_unreduced = True

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        codec: str | Codec = "sign(block=256)",
        freeze_step: int = 100_000,
        doubling: int = 16,
    ) -> None:
        check_numbers({"lr": lr, "eps": eps, "weight_decay": weight_decay}, {"beta1": betas[0], "beta2": betas[1]})
        if freeze_step < 1 or doubling < 0:
            raise UsageError(
                f"freeze_step must be 1 or more and doubling 0 or more, not {freeze_step} and {doubling}: the first "
                "step needs a variance"
            )
        self.codec = parse_codec(codec) if isinstance(codec, str) else codec
        if isinstance(self.codec, Sized):
            raise UsageError(f'{self.codec} is a codec of parameters; take "sign(block=256)"')
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        if len({tuple(group["betas"]) for group in self.param_groups}) > 1:
            raise UsageError("OneBitAdam has one momentum for all groups: give them the same betas")
        self.freeze_step, self.doubling = freeze_step, doubling
        self.num_steps = self.num_updates = self.skipped = 0
        self._store, self._slots = _slots([p for group in self.param_groups for p in group["params"]])
        numel = sum(slot.placeholder.shape.numel() for slot in self._slots)
        self._momentum = torch.zeros(numel, device=self._store.device)
        self._has_variance = torch.zeros(numel, dtype=torch.bool, device=self._store.device)
        self._variances = [torch.zeros_like(local(s.parameter), dtype=torch.float32) for s in self._slots]
        self._travel: Travel | None = None
        if self._store.num_ranks > 1:
            self._travel = Travel(self.codec, numel, group_like(self._store.ranks.data_group), self._store.device)
        self._store.keeps_gradients = True
        self._note_steps()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's, before the first step alone. Raises UsageError later."""
        if hasattr(self, "_slots"):
            raise UsageError("OneBitAdam codes all parameters together: give it all groups at once")
        super().add_param_group(param_group)

    # --- the step ----------------------------------------------------------------------------------------------------

    def updates_variance(self, step: int) -> bool:
        """Whether a step, counted from 1, updates the variance; each is by itself in the schedule."""
        if step > self.freeze_step:
            return False
        due, interval, count = 1, 1, 0
        while due < step:
            count += 1
            interval *= 2 if self.doubling and count % self.doubling == 0 else 1
            due += interval
        return due == step

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update all parameters. All ranks call it together."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        own = torch.cat([self._own(slot).reshape(-1) for slot in self._slots])
        beta1, beta2 = self.param_groups[0]["betas"]
        gradient: torch.Tensor | None = None
        has_variance = self._has_variance
        if self.updates_variance(self.num_steps + 1):
            gradient = self._averaged(own)
            has_variance = has_variance | (gradient.square() * (1 - beta2) > 0)
            made = self._momentum * beta1 + gradient * (1 - beta1)
        else:
            made = (self._momentum * beta1 + own * (1 - beta1)) * has_variance
            made = self._travel.mean(made) if self._travel is not None else made
        made = made * has_variance  # a product, so that what is not finite is found
        if not bool(made.isfinite().all()):
            self.skipped += 1
            return loss
        self._momentum.copy_(made)
        self._has_variance = has_variance
        self.num_steps += 1
        self.num_updates += gradient is not None
        self._update(gradient)
        return loss

    def _own(self, slot: Slot) -> torch.Tensor:
        """A gradient of this rank, whole and in fp32: the mean over ranks is the model's."""
        held: Any = slot.parameter.grad
        if held is None:
            return torch.zeros(slot.placeholder.shape, device=self._store.device)
        if not is_unreduced(slot):
            return (held.full_tensor() if isinstance(held, DTensor) else held).float()
        return (held._local_tensor * self._store.num_ranks if isinstance(held, DTensor) else held).float()

    def _averaged(self, own: torch.Tensor) -> torch.Tensor:
        if self._travel is None:
            return own
        total = own.cpu() / self._store.num_ranks
        dist.all_reduce(total, group=self._travel.group)
        return total.to(own.device)

    def _update(self, gradient: torch.Tensor | None) -> None:
        groups = {id(p): group for group in self.param_groups for p in group["params"]}
        gradients = self._parts(gradient) if gradient is not None else iter([None] * len(self._slots))
        for slot, variance, part, momentum in zip(
            self._slots, self._variances, gradients, self._parts(self._momentum), strict=True
        ):
            group = groups[id(slot.parameter)]
            beta1, beta2 = group["betas"]
            if part is not None:
                variance.mul_(beta2).addcmul_(part, part, value=1 - beta2)
            denominator = (variance / (1 - beta2**self.num_updates)).sqrt_().add_(group["eps"])
            parameter = local(slot.parameter)
            parameter.mul_(1 - group["lr"] * group["weight_decay"])
            parameter.addcdiv_(momentum, denominator, value=-group["lr"] / (1 - beta1**self.num_steps))
        private_runtime.bump_version([slot.parameter for slot in self._slots])

    def _parts(self, flat: torch.Tensor) -> Iterator[torch.Tensor]:
        """Of what is as long as all parameters, of each what lies where this rank's part of it is."""
        at = 0
        for slot in self._slots:
            shape, held = slot.placeholder.shape, local(slot.parameter)
            whole, at = flat[at : at + shape.numel()].view(shape), at + shape.numel()
            if slot.is_sharded:
                begin = self._store.shard * chunk_rows(shape[0], self._store.num_shards)
                whole = whole[begin : begin + len(held)]
            yield whole

    # --- checkpoints -------------------------------------------------------------------------------------------------

    @property
    def sent_bytes(self) -> int:
        """Bytes of codes that this rank has sent so far."""
        return self._travel.sent_bytes if self._travel is not None else 0

    def state_dict(self) -> dict[str, Any]:
        """As torch's, with `rest`, what codes have left out: each state placed as its parameter. All ranks call it.

        Rests are split evenly over the ranks on the way: the run goes on from exactly what is saved.
        """
        rest = self._travel.evened() if self._travel is not None else torch.zeros_like(self._momentum)
        kept = zip(self._slots, self._variances, self._parts(self._momentum), self._parts(rest), strict=True)
        for slot, variance, momentum, due in kept:
            self.state[slot.parameter] = {
                "step": torch.tensor(float(self.num_steps)),
                "num_updates": torch.tensor(float(self.num_updates)),
                "exp_avg": _like(slot, momentum),
                "exp_avg_sq": _like(slot, variance),
                "rest": _like(slot, due),
            }
        return super().state_dict()

    def load_state_dict(self, state_dict: Any) -> None:
        """Go on from what `state_dict` gave. All ranks call it together."""
        super().load_state_dict(state_dict)
        saved = {id(parameter): state for parameter, state in saved_states(self, state_dict)}
        states = [saved.get(id(slot.parameter)) or {} for slot in self._slots]
        self._note_steps()
        if not all(states):
            return
        self.num_steps, self.num_updates = (int(states[0][key]) for key in ("step", "num_updates"))
        for variance, state in zip(self._variances, states, strict=True):
            variance.copy_(local(state["exp_avg_sq"]))
        self._momentum.copy_(torch.cat([_whole(state["exp_avg"]) for state in states]))
        self._has_variance.copy_(torch.cat([_whole(state["exp_avg_sq"]) for state in states]) > 0)
        rest = torch.cat([_whole(state["rest"]) for state in states])
        if self._travel is not None:
            self._travel.put(rest)

    def _note_steps(self) -> None:
        """Have states before the first step, too: torch's `get_state_dict` makes those of an optimizer by a step."""
        for slot in self._slots:
            self.state[slot.parameter].setdefault("step", torch.tensor(float(self.num_steps)))


def _slots(parameters: list[torch.Tensor]) -> tuple[ShardStore, list[Slot]]:
    """The slots of parameters, and the store of all of them."""
    known = slots_at_rest()
    found = [known[id(p)] for p in parameters if p.requires_grad and id(p) in known]
    if not found or len(found) < sum(p.requires_grad for p in parameters) or len({id(s) for s, _ in found}) > 1:
        raise UsageError("OneBitAdam takes the parameters of one model: call zgraph.compile(model, stage=1) first")
    store = found[0][0]
    for _, slot in found:
        stage = store.default_stage if slot.stage is None else slot.stage
        if store.num_ranks > 1 and (stage not in STAGES or slot.offload or store.ranks.num_model):
            raise UsageError(
                f"OneBitAdam codes gradients that are whole on the rank that made them, and {slot.name} is of stage "
                f"{stage}{', offloaded' * bool(slot.offload)}{', cut along model axes' * (store.ranks.num_model > 0)}; "
                'compile with stage=1, or take zgraph.optim.AdamW and compress="sign"'
            )
    return store, [slot for _, slot in found]


def _like(slot: Slot, part: torch.Tensor) -> torch.Tensor:
    own = part.clone()
    return private_runtime.dtensor_like(own, slot.parameter) if isinstance(slot.parameter, DTensor) else own


def _whole(state: torch.Tensor) -> torch.Tensor:
    return (state.full_tensor() if isinstance(state, DTensor) else state).reshape(-1).float()
