"""Offload to the host's memory: as the user asks for it, or as a memory budget makes it necessary."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from zgraph.errors import UsageError
from zgraph.passes.core.base import Choice

Offload = str | Iterable[str] | None

STEP_SHARE = 0.25
"""The part of a memory budget that is left to the step itself where the compiler chooses what is at rest."""

_WHAT = ("activations", "optimizer", "parameters")


@dataclass(frozen=True)
class Resting:
    """Bytes of one parameter on a rank: of its master, and of the copy that is computed with."""

    master_bytes: int
    copy_bytes: int

    @property
    def device_bytes(self) -> int:
        """With nothing offloaded: the master, AdamW's two moments, and the gradient."""
        return 4 * self.master_bytes


def activations(offload: Offload, memory_budget: int | None, *, is_gpu: bool) -> Choice:
    """Whether values of the forward wait for the backward on the host: as the budget asks for it; all where the user
    wants it and sets no budget."""
    if offload == "auto":
        return "auto" if is_gpu else "never"
    if "activations" not in _asked(offload):
        return "never"
    return "always" if memory_budget is None else "auto"


def places(offload: Offload, *, is_gpu: bool) -> tuple[str, ...]:
    """Choices of what is at rest on the host, the same for all parameters; the preferred one comes first.

    Raises:
        UsageError: `offload` names nothing that can be offloaded.
    """
    if offload == "auto":
        return ("", "optimizer", "parameters") if is_gpu else ("",)
    asked = _asked(offload)
    return ("parameters" if "parameters" in asked else "optimizer" if "optimizer" in asked else "",)


def of_parameters(
    offload: Offload, resting: Mapping[str, Resting], memory_budget: int | None, *, is_gpu: bool
) -> dict[str, str]:
    """Offload of each parameter to the host: "optimizer" or "parameters". Parameters without any are left out.

    Args:
        offload: as given to `zgraph.compile`.
        resting: the parameters in the order of the model.
        memory_budget: bytes that one rank may have alive; None sets no limit.
        is_gpu: whether the device has separate memory.

    Raises:
        UsageError: `offload` names nothing that can be offloaded.
    """
    if offload == "auto":
        return _chosen(resting, memory_budget) if is_gpu and memory_budget is not None else {}
    (what,) = places(offload, is_gpu=is_gpu)
    return dict.fromkeys(resting, what) if what else {}


def _asked(offload: Offload) -> set[str]:
    names = {offload} if isinstance(offload, str) else set(offload or ())
    if "gradients" in names:
        raise UsageError(
            "torch keeps a gradient where its parameter lies: offload='optimizer' takes masters, gradients and the "
            "optimizer's state to the host together"
        )
    if unknown := sorted(map(str, names - set(_WHAT))):
        raise UsageError(f"offload must be 'auto', None, or any of {', '.join(_WHAT)}, not {', '.join(unknown)}")
    return names


def _chosen(resting: Mapping[str, Resting], memory_budget: int) -> dict[str, str]:
    """As little as makes room for the step, the last parameters first: there is the most to hide their copies behind.

    Masters and optimizer states go first, and of parameters what is computed with too only where that is not enough.
    """
    limit = (1 - STEP_SHARE) * memory_budget
    left = float(sum(r.device_bytes for r in resting.values()))
    found: dict[str, str] = {}
    for what in ("optimizer", "parameters"):
        for name, rests in reversed(list(resting.items())):
            if left <= limit:
                return found
            left -= rests.device_bytes - rests.copy_bytes if what == "optimizer" else rests.copy_bytes
            found[name] = what
    return found
