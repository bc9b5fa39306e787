"""Compute capabilities of GPUs by their profiles, and what follows from them."""

from __future__ import annotations

from collections.abc import Mapping

from zgraph.cost.hardware import Hardware

Capability = tuple[int, int]
"""Major and minor number."""

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


def alike_capability(hardware: Hardware) -> Capability | None:
    """A compute capability that stands for all with the same ops, so that models are captured once for them."""
    found = capability_of(hardware)
    if found is None or found < _USUAL:
        return found
    return (9, 0) if found[0] in (9, 10) and found[1] == 0 else _USUAL


def planned_library_bytes(planned: Hardware) -> int:
    """Bytes that the matmul library keeps in torch's allocator on NVIDIA's GPUs, without settings of the environment; 0
    of a processor."""
    capability = capability_of(planned)
    return 0 if capability is None else 32 << 20 if capability >= (9, 0) else 8320 << 10
