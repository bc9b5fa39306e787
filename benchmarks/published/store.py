"""Fitted constants in the files of hardware profiles, beside what they say already."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from benchmarks.published.fit import Constants, architecture, with_constants
from zgraph.cost import Accuracy, hardware
from zgraph.cost.hardware import FOLDER

FITTED = ("a100-40", "a100-80", "h100", "h100-96", "h100-nvl", "h200", "h20")
"""Profiles of the architectures that steps were published of."""

CARRIED = ("b200", "gb200", "gb300")
"""Profiles that have Hopper's shares, as no step was published of them, and no error bars of their own."""

SHARES = ("sustained", "matmul_half_dim", "memory_share", "fused_share", "update_share")


def store(constants: Constants, accuracies: Mapping[str, Accuracy]) -> list[Path]:
    """Write constants into the profiles; the files that were written.

    Args:
        constants: as fitted.
        accuracies: by architecture.
    """
    written = []
    for name in (*FITTED, *CARRIED):
        path = FOLDER / f"{name}.toml"
        profile = hardware(name)
        found = with_constants(profile, constants)
        text = path.read_text()
        for key in SHARES:
            text = _with_key(text, key, getattr(found.device, key))
        text = re.sub(r"(?m)^overlap_slowdown = .*$", f"overlap_slowdown = {found.overlap_slowdown:.3g}", text)
        for link in ("within", "between"):
            text = _with_share(text, link, getattr(found, link).share)
        text = re.sub(r"\n\[(device\.attention\.\w+|accuracy)\][^\[]*(?=\n\[|\Z)", "", text).rstrip() + "\n"
        for kernel, rate in found.device.attention.items():
            text += _table(f"device.attention.{kernel}", rate.model_dump())
        if name in FITTED:
            text += _table("accuracy", accuracies[architecture(profile)].model_dump())
        path.write_text(text)
        written.append(path)
    return written


def _with_key(text: str, key: str, value: float) -> str:
    line = f"{key} = {value:.3g}"
    if re.search(rf"(?m)^{key} = ", text):
        return re.sub(rf"(?m)^{key} = .*$", line, text)
    return re.sub(r"(?m)^(launch_us = .*)$", rf"\1\n{line}", text, count=1)


def _with_share(text: str, link: str, share: float) -> str:
    """The text with the share of a link, in the table of its name."""
    head, name, tail = text.partition(f"\n[{link}]")
    tail = re.sub(r"(?m)^share = .*\n", "", tail, count=1) if re.match(r"[^\[]*\nshare = ", tail) else tail
    return head + name + re.sub(r"(?m)^(latency_us = .*)$", rf"\1\nshare = {share:.3g}", tail, count=1)


def _table(name: str, fields: Mapping[str, float | int | str]) -> str:
    lines = [
        f'{k} = "{v}"' if isinstance(v, str) else f"{k} = {v:.3g}" if isinstance(v, float) else f"{k} = {v}"
        for k, v in fields.items()
    ]
    return f"\n[{name}]\n" + "\n".join(lines) + "\n"
