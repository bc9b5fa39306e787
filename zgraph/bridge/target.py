"""Target that `zgraph.compile` plans for: the costs of the hardware at hand, or of the one that the user names."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from pydantic import ByteSize, TypeAdapter, ValidationError

from zgraph.bridge.private_gpu import Capability
from zgraph.cost import CostTable, Hardware, hardware, load_table
from zgraph.cost.defaults import default_costs
from zgraph.cost.hardware import recognised
from zgraph.environment import ranks_here
from zgraph.errors import UsageError

Target = str | Path | Hardware | CostTable


def cost_table(target: Target | None, device: torch.device) -> CostTable:
    """The costs to plan with.

    Args:
        target: a profile's name (`h100`, `16x8-a100-80`), the path of a profile (.toml) or of a table that
            `zgraph.profile` wrote (.json), or one of these as an object. None takes what fits the device, and
            warns where no profile is its own.
        device: what the model is on.

    Raises:
        HardwareError: there is no such profile, or the file is none.
    """
    if isinstance(target, CostTable):
        return target
    if isinstance(target, Hardware):
        return CostTable(hardware=target)
    if target is not None:
        name = str(target)
        return load_table(Path(name)) if name.endswith(".json") else CostTable(hardware=hardware(name))
    if device.type == "cpu":
        return default_costs()
    return CostTable(hardware=hardware(_recognised(device)), per_host=ranks_here())


CAPABILITIES: Mapping[str, Capability] = {
    "v100": (7, 0),
    "a100": (8, 0),
    "a10": (8, 6),
    "l4": (8, 9),
    "rtx-4090": (8, 9),
    "h": (9, 0),
    "b200": (10, 0),
    "gb200": (10, 0),
    "gb300": (10, 3),
    "rtx-5090": (12, 0),
}
"""Compute capabilities of GPUs by how their profiles' names begin."""

_USUAL: Capability = (8, 0)
"""Taken for a GPU that is not among them: AMD's take the same attention."""


def capability_of(hardware: Hardware) -> Capability | None:
    """The compute capability of a GPU; None for a processor."""
    if not hardware.has_host:
        return None
    return next((found for name, found in CAPABILITIES.items() if hardware.name.startswith(name)), _USUAL)


UNKNOWN = "a100-40"
"""Profile for a GPU whose name says nothing; a warning tells of it."""


def _recognised(device: torch.device) -> str:
    """The name of the profile of a GPU; the nearest, with a warning, where it has none of its own."""
    title = torch.cuda.get_device_name(device)
    memory_bytes = torch.cuda.get_device_properties(device).total_memory
    found, is_own = recognised(title, memory_bytes)
    name = found or UNKNOWN
    if not is_own:
        warnings.warn(
            f"no hardware profile is that of this {title} ({memory_bytes / 2**30:.0f} GiB): its step is planned as "
            f'that of {name}. Say what it is like (hardware="h100"; zgraph hardware list has the names), write a '
            f'profile (zgraph hardware new mine --from {name} -o mine.toml, then hardware="mine.toml"), or measure: '
            "hardware=zgraph.profile(model, step).",
            stacklevel=2,
        )
    return name


def fingerprint_of(costs: CostTable) -> str:
    """The same for two tables only if they say the same: ranks with other costs would plan otherwise."""
    return hashlib.sha256(costs.model_dump_json().encode()).hexdigest()[:16]


MEMORY_MARGIN = 0.06
"""The share of a device's memory that stays free where no budget is given: for the driver, for communication, and for
what does not fit together in the allocator."""


def device_budget(device: torch.device) -> int | None:
    """Bytes of a GPU's memory that a rank may use; None on a processor, which has no separate memory."""
    if device.type == "cpu":
        return None
    return int((1 - MEMORY_MARGIN) * torch.cuda.get_device_properties(device).total_memory)


def num_bytes(size: int | str) -> int:
    """Bytes of a size such as 12_000_000, "12GiB" or "12GB".

    Raises:
        UsageError: it is none, or not positive.
    """
    try:
        found = int(TypeAdapter(ByteSize).validate_python(size))
    except ValidationError:
        found = 0
    if found <= 0:
        raise UsageError(f'memory_budget must be bytes, or a size such as "12GiB", not {size!r}')
    return found
