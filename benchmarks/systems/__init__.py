"""The systems that are measured, one file each, in the order of the table."""

from __future__ import annotations

from benchmarks.errors import UnknownName
from benchmarks.systems.base import Role, Step, System
from benchmarks.systems.coded import CODED
from benchmarks.systems.ddp import DDP
from benchmarks.systems.deepspeed_zero import DEEPSPEED
from benchmarks.systems.fsdp2 import FSDP2
from benchmarks.systems.layouts import LAYOUTS
from benchmarks.systems.optimizers import OPTIMIZERS
from benchmarks.systems.plain import PLAIN
from benchmarks.systems.zgraph_stages import ZGRAPH

SYSTEMS: tuple[System, ...] = (*PLAIN, *DDP, *FSDP2, *DEEPSPEED, *ZGRAPH)

BY_NAME = {system.name: system for system in (*SYSTEMS, *CODED, *OPTIMIZERS, *LAYOUTS)}

__all__ = ["BY_NAME", "SYSTEMS", "Role", "Step", "System", "select"]


def select(words: list[str], *, with_codes: bool = False) -> list[System]:
    """The systems whose name contains one of the words, whatever the case; all of them if there are no words.

    with_codes: also those that send codes, which approximate.

    Raises UnknownName for a word that is in no name.
    """
    systems = (*SYSTEMS, *CODED) if with_codes else SYSTEMS
    for word in words:
        if not any(word.lower() in system.name.lower() for system in systems):
            names = ", ".join(system.name for system in systems)
            raise UnknownName(f"no system is called {word!r}", f"Use part of one of: {names}")
    wanted = words or [""]
    return [system for system in systems if any(word.lower() in system.name.lower() for word in wanted)]
