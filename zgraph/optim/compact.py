"""AdamW with moments of 8 bits, over parameters that need no masters."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from typing import Any, Literal

import torch
from torch.optim.optimizer import ParamsT

from zgraph.errors import UsageError
from zgraph.optim.adamw import AdamW
from zgraph.optim.blocks import BLOCK_NUMEL
from zgraph.optim.flat import Group
from zgraph.optim.quantised import decode, encode, num_blocks
from zgraph.optim.rounding import stochastic
from zgraph.optim.runs import Run, first_row, gradient_of, local, saved_states

Rounding = Literal["stochastic", "nearest"]
Bits = Literal[8, 32]

MIN_COLUMNS, MIN_NUMEL = 64, 4096
"""Of a parameter whose moments are coded: for shorter rows scales would take more than they save."""

MOMENTS = ("exp_avg", "exp_avg_sq")
CODES = tuple(f"{key}_code" for key in MOMENTS)
SCALES = tuple(f"{key}_scale" for key in MOMENTS)
_CUDA_NUMEL = 1 << 24
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class CompactAdamW(AdamW):
    """AdamW in few bytes: moments in 8 bits, and parameters in bfloat16 that are rounded at random, without masters.

    At rest a rank holds 6.1 bytes for each of its parameters in bfloat16: two for it, two for its gradient, and two
    for both moments with their scales. Moments are coded in blocks of at most 256 numbers of a row, and the update is
    computed in fp32. Moments of vectors, of parameters of less than 4096 elements, and of those with rows of less than
    64, are kept in fp32. What a rank does to a row is what any number of ranks does to it, to the last bit, given the
    same gradients.

    Args:
        params: parameters or groups of them, sharded by `zgraph.compile` or plain, in bfloat16, float16 or float32.
        lr: the learning rate.
        betas: the decay of the two moments.
        eps: added to the denominator.
        weight_decay: decoupled from the gradient.
        state_bits: 8, or 32 for moments in fp32.
        rounding: of parameters in bfloat16: "stochastic", by draws that are a function of the seed, the step, the
            parameter and the place in it, or "nearest".
        seed: of these draws, at least 0. It is an option of each group, which checkpoints hold.

    Raises:
        UsageError: an argument means nothing, or a parameter's dtype or sharding is another.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        state_bits: Bits = 8,
        rounding: Rounding = "stochastic",
        seed: int = 0,
    ) -> None:
        if state_bits not in (8, 32) or rounding not in ("stochastic", "nearest"):
            raise UsageError('state_bits must be 8 or 32, and rounding "stochastic" or "nearest"')
        if not 0 <= seed < 1 << 63:
            raise UsageError(f"seed must be from 0 to below 2^63, not {seed}")
        self.state_bits, self.rounding, self.seed = state_bits, rounding, seed
        self._numbers: dict[torch.Tensor, int] = {}
        super().__init__(params, lr, betas, eps, weight_decay)

    def add_param_group(self, param_group: Group) -> None:
        """Add a group. Raises UsageError if a parameter's dtype is no floating one of at most 32 bits."""
        super().add_param_group({"seed": self.seed, **param_group})
        for parameter in self.param_groups[-1]["params"]:
            if parameter.dtype not in _DTYPES:
                raise UsageError(f"CompactAdamW takes bfloat16, float16 and float32, not {parameter.dtype}")

    # --- states ----------------------------------------------------------------------------------------------------

    def _in_place(self, parameter: torch.Tensor) -> bool:
        return False

    def _make(self, parameter: torch.Tensor, key: str) -> torch.Tensor:
        shape = parameter.shape
        if key in SCALES:
            shape = torch.Size((shape[0], num_blocks(shape[1:].numel())))
        return torch.empty(shape, dtype=torch.uint8 if key in CODES else torch.float32, device=parameter.device)

    def _admit(self, parameter: torch.Tensor, run: Run, index: int, keys: tuple[str, ...]) -> bool:
        return super()._admit(parameter, run, index, (*CODES, *SCALES) if self._is_coded(parameter) else keys)

    def _is_coded(self, parameter: torch.Tensor) -> bool:
        """Whether its moments are: the same on all ranks."""
        is_large = parameter.numel() >= MIN_NUMEL and parameter.shape[1:].numel() >= MIN_COLUMNS
        return self.state_bits == 8 and parameter.dim() > 1 and is_large

    def load_state_dict(self, state_dict: Any) -> None:
        """As torch's, which casts states to the parameter's dtype: here they keep theirs."""
        super().load_state_dict(state_dict)
        for parameter, state in saved_states(self, state_dict):
            for key, value in state.items():
                local(self.state[parameter][key]).copy_(local(torch.as_tensor(value)))

    # --- the update ------------------------------------------------------------------------------------------------

    def _update_group(self, group: Group, parameters: list[torch.Tensor]) -> None:
        for parameter in parameters:
            run, index = self._places[parameter]
            is_new = self._admit(parameter, run, index, self._keys(group))
            (age,) = self._ages(run, [index], [is_new])
            self._move(parameter, group, age)

    def _move(self, parameter: torch.Tensor, group: Group, age: float) -> None:
        """Update a parameter, some rows after others."""
        held, gradient, state = local(parameter), gradient_of(parameter), self.state[parameter]
        if not held.numel():
            return
        number, start = self._number(parameter), first_row(parameter) * parameter.shape[1:].numel()
        rows, gradients = _as_rows(held), _as_rows(gradient)
        moments = [_Moment(state, key) for key in MOMENTS]
        for part in _parts(rows):
            moved = self._moved(group, age, rows[part].float(), gradients[part].float(), moments, part)
            if held.dtype == torch.bfloat16 and self.rounding == "stochastic":
                place = start + part.start * rows.shape[1]
                moved = stochastic(moved.view(-1), group["seed"], int(age), number, place).view(moved.shape)
            rows[part] = moved
        if not rows.is_set_to(held):
            held.copy_(rows.view(held.shape))

    def _moved(
        self,
        group: Group,
        age: float,
        values: torch.Tensor,
        gradient: torch.Tensor,
        moments: list[_Moment],
        part: slice,
    ) -> torch.Tensor:
        """The new values of some rows, in fp32. All ops round once, so that places do not matter: none may fuse a
        product and a sum."""
        (beta1, beta2), rate = group["betas"], float(group["lr"])
        first, second = (moment.read(part) for moment in moments)
        first.mul_(beta1).add_(gradient * (1 - beta1))
        second.mul_(beta2).add_(gradient.square().mul_(1 - beta2))
        for moment, numbers in zip(moments, (first, second), strict=True):
            moment.write(part, numbers)
        divisor = second.sqrt_().mul_((1 - beta2**age) ** -0.5).add_(group["eps"])
        step = first.div_(divisor).mul_(rate / (1 - beta1**age))
        return values.mul(1 - rate * group["weight_decay"]).sub_(step)

    def _number(self, parameter: torch.Tensor) -> int:
        """The parameter's place among all of them."""
        if parameter not in self._numbers:
            listed = chain.from_iterable(group["params"] for group in self.param_groups)
            self._numbers = {p: number for number, p in enumerate(listed)}
        return self._numbers[parameter]


class _Moment:
    """A moment of a parameter, fp32 or in codes.

    Args:
        state: of the parameter.
        key: the name of the moment.
    """

    def __init__(self, state: Group, key: str) -> None:
        self.is_signed = key == MOMENTS[0]
        self.plain = _as_rows(local(state[key])) if key in state else None
        if self.plain is None:
            self.codes, self.scales = _as_rows(local(state[f"{key}_code"])), local(state[f"{key}_scale"])

    def read(self, part: slice) -> torch.Tensor:
        """The numbers of some rows, a copy where they are coded."""
        if self.plain is not None:
            return self.plain[part].clone()
        return decode(self.codes[part], self.scales[part], is_signed=self.is_signed)

    def write(self, part: slice, numbers: torch.Tensor) -> None:
        """Keep new ones."""
        if self.plain is not None:
            self.plain[part] = numbers
        else:
            encode(numbers, self.codes[part], self.scales[part], is_signed=self.is_signed)


def _as_rows(own: torch.Tensor) -> torch.Tensor:
    """In two dimensions: a view, where it is dense."""
    return own.reshape(own.shape[0], -1) if own.dim() > 1 else own.reshape(-1, 1)


def _parts(rows: torch.Tensor) -> Iterator[slice]:
    """As many rows as a processor's cache holds with all that is computed of them; many more on a GPU."""
    each = max((_CUDA_NUMEL if rows.is_cuda else BLOCK_NUMEL) // rows.shape[1], 1)
    for at in range(0, rows.shape[0], each):
        yield slice(at, min(at + each, rows.shape[0]))
