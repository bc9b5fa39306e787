"""The processor at hand, as far as compiled code depends on it."""

from __future__ import annotations

import platform
from functools import cache
from pathlib import Path


@cache
def processor() -> str:
    """The processor's model and what it can do, which a compiler of C++ makes use of."""
    try:
        first = Path("/proc/cpuinfo").read_text().partition("\n\n")[0].splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    told = (line.partition(":") for line in first)
    fields = {name.strip(): value.strip() for name, _, value in told}
    kinds = "vendor_id", "cpu family", "model", "model name", "stepping", "flags"
    arm = "CPU implementer", "CPU architecture", "CPU variant", "CPU part", "CPU revision", "Features"
    return f"{platform.machine()} {[fields[kind] for kind in (*kinds, *arm) if kind in fields]}"
