"""Muon over shards: each matrix is orthogonalised on one rank (K. Jordan et al.: "Muon: An optimizer for hidden layers
in neural networks", 2024)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch.distributed.tensor import DTensor
from torch.optim.optimizer import ParamsT

from zgraph.errors import UsageError
from zgraph.optim.adamw import AdamW
from zgraph.optim.exchange import Exchange, Team
from zgraph.optim.flat import FlatOptimizer, Group, Kernels, check_numbers
from zgraph.optim.newton_schulz import COEFFICIENTS, AdjustLr, Coefficients, adjusted_lr, flop, orthogonalised
from zgraph.optim.roles import Roles
from zgraph.optim.runs import Run, gradient_of, local
from zgraph.optim.shares import Matrix
from zgraph.runtime.shards import ShardStore, Slot, slots_at_rest

UseMuon = bool | Callable[[str], bool] | None

MOMENTUM = "momentum_buffer"


class Due(NamedTuple):
    """A matrix to update, of a group."""

    parameter: torch.Tensor
    group: Group


class Muon(AdamW):
    """Muon for the matrices of hidden layers, AdamW for all else, over local shards.

    Momentum is sharded as its parameter is. For Newton-Schulz each matrix travels to one rank, and the result back;
    ranks share the work by its FLOP. Where a matrix is whole on all ranks (stage 0), they share it all the same.

    A parameter's role is that which it has in the compiled model, by the types of its modules, as groups must be known
    before anything is captured: matrices are parameters of two dimensions and weights of convolutions, flattened
    behind the first dimension. Without embeddings and the output's weight, which is what `get_output_embeddings()`
    returns, an `lm_head`, or else the last `nn.Linear`; a weight that is tied to one of these is one of them. Each
    group is split in two, of which one has `use_muon=True`.

    Args:
        params: parameters or groups of them, sharded by `zgraph.compile` or plain. In a group, `use_muon` goes before
            the roles, `lr` is that of its matrices, and `adam_lr` that of the rest.
        lr: the learning rate of matrices.
        weight_decay: decoupled from the gradient, of both.
        momentum: how much of the last direction is kept.
        nesterov: whether to look ahead along the new direction.
        ns_coefficients: of the quintic.
        eps: the least norm that a matrix is divided by.
        ns_steps: Newton-Schulz iterations.
        adjust_lr_fn: how the learning rate follows from a matrix's shape, "original" or "match_rms_adamw", as in
            `torch.optim.Muon`; None is "original".
        adam_lr: the learning rate of all else.
        adam_betas: AdamW's.
        adam_eps: AdamW's.
        use_muon: whether a parameter is a matrix, by its name, or all are that have two dimensions or more; by default
            its role decides.
        ns_dtype: in which matrices travel and are multiplied: `torch.bfloat16`, as in `torch.optim.Muon`, or
            `torch.float32`. None takes bfloat16 on GPUs, and float32 on processors, few of which multiply bfloat16.
        bucket_bytes: of the matrices that a rank gets at once; up to six times as much is alive.
        kernels: "aten" or "triton", as in `FlatOptimizer`, for AdamW's part.

    Raises:
        UsageError: an argument means nothing, the role of a parameter is not known, or it is complex.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_coefficients: Coefficients = COEFFICIENTS,
        eps: float = 1e-7,
        ns_steps: int = 5,
        adjust_lr_fn: AdjustLr | None = None,
        *,
        adam_lr: float = 3e-4,
        adam_betas: tuple[float, float] = (0.9, 0.999),
        adam_eps: float = 1e-8,
        use_muon: UseMuon = None,
        ns_dtype: torch.dtype | None = None,
        bucket_bytes: int = 64 << 20,
        kernels: Kernels = "aten",
    ) -> None:
        check_numbers({"lr": lr, "eps": eps}, {"momentum": momentum})
        if adjust_lr_fn not in (None, "original", "match_rms_adamw"):
            raise UsageError(f'adjust_lr_fn must be "original" or "match_rms_adamw", not {adjust_lr_fn!r}')
        if ns_dtype not in (None, torch.bfloat16, torch.float32):
            raise UsageError(f"ns_dtype must be torch.bfloat16 or torch.float32, not {ns_dtype}")
        if not 0 < ns_steps < 100 or len(ns_coefficients) != 3 or bucket_bytes < 1:
            raise UsageError("ns_steps must be from 1 to 99, ns_coefficients three numbers, bucket_bytes positive")
        self.use_muon, self.ns_dtype, self.bucket_bytes = use_muon, ns_dtype, bucket_bytes
        self._of_matrices = {
            "lr": lr,
            "momentum": momentum,
            "nesterov": nesterov,
            "ns_coefficients": tuple(ns_coefficients),
            "eps": eps,
            "ns_steps": ns_steps,
            "adjust_lr_fn": adjust_lr_fn or "original",
        }
        self._matrices: set[torch.Tensor] = set()
        super().__init__(params, adam_lr, adam_betas, adam_eps, weight_decay, kernels=kernels)

    # --- groups ----------------------------------------------------------------------------------------------------

    def add_param_group(self, param_group: Group) -> None:
        """Add a group, split by the roles of its parameters.

        Raises:
            UsageError: the role of one is not known, or it is complex.
        """
        options = {key: value for key, value in param_group.items() if key != "params"}
        given, adam_lr = options.pop("use_muon", self.use_muon), options.pop("adam_lr", None)
        listed = param_group["params"]
        listed = [listed] if isinstance(listed, torch.Tensor) else [*listed]
        matrices = self._chosen(listed, given)
        for are_matrices in (True, False):
            members = [p for p, is_matrix in zip(listed, matrices, strict=True) if is_matrix is are_matrices]
            if not members and listed:
                continue
            group = {**options, "params": members, "use_muon": are_matrices}
            if are_matrices:
                group = {**self._of_matrices, **group}
            elif adam_lr is not None or (given is None and "lr" in options):
                group["lr"] = self.defaults["lr"] if adam_lr is None else adam_lr
            super().add_param_group(group)

    def _chosen(self, listed: Sequence[Any], given: UseMuon) -> list[bool]:
        """Whether each parameter is a matrix. Some may come with their names."""
        roles, found = Roles(), []
        for entry in listed:
            parameter = _tensor(entry)
            if parameter.is_complex():
                raise UsageError("Muon does not take complex parameters: give their real view, or another optimizer")
            name = entry[0] if isinstance(entry, tuple) else roles.name(parameter)
            if callable(given) and name is not None:
                is_matrix: bool | None = given(name)
            else:
                is_matrix = given if isinstance(given, bool) else roles.is_matrix(parameter)
            if parameter.dim() < 2 or not parameter.numel():
                is_matrix = False
            if is_matrix is None or (callable(given) and name is None and parameter.dim() > 1):
                raise UsageError(
                    "Muon knows the roles of parameters from a compiled model, and one of these is in none: make the "
                    "optimizer after zgraph.compile, or give use_muon= (with names: model.named_parameters())"
                )
            found.append(bool(is_matrix))
        return found

    # --- states ----------------------------------------------------------------------------------------------------

    def _keys(self, group: Group) -> tuple[str, ...]:
        return (MOMENTUM,) if group["use_muon"] else super()._keys(group)

    def _lay_out(self, parameters: list[torch.Tensor]) -> None:
        self._matrices = {p for group in self.param_groups if group["use_muon"] for p in group["params"]}
        super()._lay_out(parameters)

    def _in_place(self, parameter: torch.Tensor) -> bool:
        return parameter not in self._matrices and super()._in_place(parameter)

    def _admit(self, parameter: torch.Tensor, run: Run, index: int, keys: tuple[str, ...]) -> bool:
        if keys == (MOMENTUM,):
            return FlatOptimizer._admit(self, parameter, run, index, keys)
        return super()._admit(parameter, run, index, keys)

    # --- the update ------------------------------------------------------------------------------------------------

    def _update_all(self, due: Sequence[list[torch.Tensor]]) -> None:
        alone, exchanges = self._split()
        for exchange in exchanges:
            exchange.begin()
        for group, parameters in zip(self.param_groups, due, strict=True):
            if not group["use_muon"]:
                self._update_group(group, parameters)
        for one in alone:
            self._take(one, self._orthogonalised(one, self._direction(one)))
        for exchange in exchanges:
            exchange.finish()

    def _split(self) -> tuple[list[Due], list[Exchange]]:
        """Matrices with a gradient that this rank updates by itself, and an exchange of the others for each model."""
        alone: list[Due] = []
        shared: dict[ShardStore, list[tuple[Slot, Due]]] = defaultdict(list)
        known = slots_at_rest()
        for group in self.param_groups:
            for parameter in group["params"] if group["use_muon"] else ():
                one = Due(parameter, group)
                store, slot = known.get(id(parameter), (None, None))
                if store is not None and slot is not None and store.num_shards > 1:
                    shared[store].append((slot, one))
                elif isinstance(parameter, DTensor) and any(p.is_shard() for p in parameter.placements):
                    raise UsageError("Muon steps over what zgraph.compile has sharded, and nothing else: compile it")
                elif parameter.grad is not None:
                    alone.append(one)
        return alone, [self._exchange(Team(store), members) for store, members in shared.items()]

    def _exchange(self, team: Team, members: Sequence[tuple[Slot, Due]]) -> Exchange:
        team.agree([slot.name for slot, _ in members], [one.parameter.grad is not None for _, one in members])
        due = [(slot, one) for slot, one in members if one.parameter.grad is not None]
        matrices = [_matrix(one, slot.is_sharded) for slot, one in due]
        return Exchange(
            team,
            matrices,
            self._dtype(team.device),
            self.bucket_bytes,
            lambda n: self._direction(due[n][1]),
            lambda n, whole: self._orthogonalised(due[n][1], whole),
            lambda n, rows: self._take(due[n][1], rows),
        )

    def _dtype(self, device: torch.device) -> torch.dtype:
        return self.ns_dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)

    def _direction(self, one: Due) -> torch.Tensor:
        """This rank's rows of what is orthogonalised, with the momentum moved on."""
        held = local(self._momentum(one))
        gradient, decay = gradient_of(one.parameter).to(held.dtype), one.group["momentum"]
        held.lerp_(gradient, 1 - decay)
        return _as_rows(gradient.lerp(held, decay) if one.group["nesterov"] else held)

    def _momentum(self, one: Due) -> torch.Tensor:
        run, index = self._places[one.parameter]
        self._admit(one.parameter, run, index, self._keys(one.group))
        found: torch.Tensor = self.state[one.parameter][MOMENTUM]
        return found

    def _orthogonalised(self, one: Due, whole: torch.Tensor) -> torch.Tensor:
        group = one.group
        whole = whole.to(self._dtype(whole.device))
        return orthogonalised(whole, group["ns_steps"], group["ns_coefficients"], group["eps"])

    def _take(self, one: Due, rows: torch.Tensor) -> None:
        """Move this rank's rows of the parameter."""
        held, rate, group = local(one.parameter), float(one.group["lr"]), one.group
        height, width = _size(one.parameter)
        held.mul_(1 - rate * group["weight_decay"])
        adjusted = adjusted_lr(rate, height, width, group["adjust_lr_fn"])
        held.add_(rows.to(held.device).reshape(held.shape), alpha=-adjusted)


def _matrix(one: Due, is_sharded: bool) -> Matrix:
    rows, columns = _size(one.parameter)
    return Matrix(rows, columns, is_sharded, flop(rows, columns, one.group["ns_steps"]))


def _size(parameter: torch.Tensor) -> tuple[int, int]:
    """Rows and columns of the whole, flattened behind the first dimension."""
    return parameter.shape[0], parameter.shape[1:].numel()


def _as_rows(own: torch.Tensor) -> torch.Tensor:
    return own.reshape(own.shape[0], own.shape[1:].numel())


def _tensor(entry: Any) -> torch.Tensor:
    """A parameter that may come with its name."""
    found: torch.Tensor = entry[1] if isinstance(entry, tuple) else entry
    return found
