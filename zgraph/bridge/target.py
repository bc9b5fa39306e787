"""Target that `zgraph.compile` plans for: the costs of the hardware at hand, or of the one that the user names."""

from __future__ import annotations

import hashlib
import os
import re
import warnings
from pathlib import Path

import torch
from pydantic import ByteSize, TypeAdapter, ValidationError

from zgraph.cost import CostTable, Hardware, hardware, load_table
from zgraph.cost.defaults import default_costs
from zgraph.cost.hardware import recognised
from zgraph.cost.reserved import beside_bytes
from zgraph.environment import ALLOCATOR, ranks_here
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
    return CostTable(hardware=_recognised(device), per_host=ranks_here())


UNKNOWN = "a100-40"
"""Profile whose rates and links stand for those of a GPU whose name says nothing; a warning tells of it."""


def _recognised(device: torch.device) -> Hardware:
    """The profile of a GPU; where it has none of its own, one with the nearest's figures and the GPU's memory."""
    title = torch.cuda.get_device_name(device)
    memory_bytes = torch.cuda.get_device_properties(device).total_memory
    found, is_own = recognised(title, memory_bytes)
    name = found or UNKNOWN
    profile = hardware(name)
    if is_own:
        return profile
    warnings.warn(
        f"no hardware profile is that of this {title} ({memory_bytes / 2**30:.0f} GiB): its step is planned with the "
        f"rates and links of {name}, which are not its own. Measure it once (zgraph.profile_machine(), then "
        'hardware="this-machine"), say what it is like (hardware="h100"; zgraph hardware list has the names), or write '
        f'a profile (zgraph hardware new mine --from {name} -o mine.toml, then hardware="mine.toml").',
        stacklevel=2,
    )
    stem = re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-") or "gpu"
    own = {"name": f"unknown-{stem}"[:80], "source": f"of {title} the memory; all else is {name}'s"}
    return profile.model_copy(
        update={**own, "device": profile.device.model_copy(update={"memory_bytes": memory_bytes})}
    )


def fingerprint_of(costs: CostTable) -> str:
    """The same for two tables only if they say the same: ranks with other costs would plan otherwise."""
    return hashlib.sha256(costs.model_dump_json().encode()).hexdigest()[:16]


MEMORY_MARGIN = 0.06
"""The share of a device's memory that stays free where no budget is given: for the driver, for communication, and for
what does not fit together in the allocator."""

FRAGMENTED = 0.03
"""The share of the rest that an allocator with expandable segments leaves between what is alive."""

_WORKSPACE = re.compile(r":([0-9]+):([0-9]+)")


LARGEST_TAKEN = 1 / 16
"""The largest share of a device's memory that libraries are taken to need."""


def usable_bytes(memory_bytes: int, num_ranks: int) -> int:
    """Bytes of a GPU that a rank may use: all but the margin, which on small GPUs is what libraries need.

    Args:
        memory_bytes: of the GPU.
        num_ranks: in the job; one has nobody to communicate with.
    """
    taken = min(beside_bytes(num_ranks), LARGEST_TAKEN * memory_bytes)
    return int(memory_bytes - max(MEMORY_MARGIN * memory_bytes, taken + FRAGMENTED * (memory_bytes - taken)))


def planned_budget(planned: Hardware, num_ranks: int) -> int:
    """Bytes that a rank may use of a device that need not be here."""
    memory_bytes = planned.device.memory_bytes
    return usable_bytes(memory_bytes, num_ranks) if planned.has_host else int(memory_bytes * (1 - MEMORY_MARGIN))


def device_budget(device: torch.device, num_ranks: int = 1) -> int | None:
    """Bytes of a GPU's memory that a rank may use; None on a processor, which has no separate memory."""
    if device.type == "cpu":
        return None
    return usable_bytes(torch.cuda.get_device_properties(device).total_memory, num_ranks)


def library_bytes(device: torch.device) -> int:
    """Bytes that the matmul library keeps in torch's allocator for the stream that computes; 0 on a processor.

    As torch chooses (`CublasHandlePool.cpp`): CUBLAS_WORKSPACE_CONFIG, or 32 MiB since Hopper and 8,320 KiB before it;
    on AMD's GPUs 32 MiB, or 128 MiB since MI300.
    """
    if device.type == "cpu":
        return 0
    if sizes := _WORKSPACE.findall(os.environ.get("CUBLAS_WORKSPACE_CONFIG", "")):
        return sum(int(size) * int(count) << 10 for size, count in sizes)
    if torch.version.hip is not None:
        is_large = torch.cuda.get_device_properties(device).gcnArchName.startswith(("gfx94", "gfx95"))
        return (128 if is_large else 32) << 20
    return 32 << 20 if torch.cuda.get_device_capability(device) >= (9, 0) else 8320 << 10


EXPANDABLE = "expandable_segments:True"


def allocator_advice(device: torch.device) -> str:
    """The line that tells how to lose less memory between blocks; empty where nothing is to be said."""
    if device.type == "cpu" or any("expandable_segments" in os.environ.get(name, "") for name in ALLOCATOR):
        return ""
    return (
        f"set {ALLOCATOR[0]}={EXPANDABLE} before torch is imported: without it blocks of one size cannot be used for "
        "another, and more memory is reserved than a budget counts"
    )


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
