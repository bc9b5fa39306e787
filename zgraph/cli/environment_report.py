"""Facts about a machine for a bug report: versions, processors, GPUs, variables and caches, and nothing secret.

Whatever is missing, or fails when asked, is left out or said in its place.
"""

from __future__ import annotations

import getpass
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from zgraph.environment import cache_folder
from zgraph.version import package_versions

PACKAGES = ("torch", "triton", "transformers", "numpy", "pydantic", "networkx", "sympy", "rich", "typer")

TOPOLOGY = (("nvidia-smi", "topo", "-m"), ("rocm-smi", "--showtopo"))
"""Commands that print how the GPUs of a host are linked."""

SECONDS = 10
"""How long one of these may take."""


def bug_report() -> dict[str, Any]:
    """Sections by title, each a mapping; home folders are ~ and the user is $USER. It never raises."""
    sections: dict[str, Callable[[], dict[str, Any]]] = {
        "versions": _versions,
        "machine": _machine,
        "torch": _torch,
        "topology": _topology,
        "environment": _environment,
        "caches": _caches,
    }
    return {title: _without_names(_asked(section)) for title, section in sections.items()}


def _asked(section: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    try:
        return section()
    except Exception as error:  # whatever is broken is what the report is for
        return {"error": f"{type(error).__name__}: {error}"}


def _versions() -> dict[str, Any]:
    return dict(package_versions(PACKAGES, missing="not installed"))


def _machine() -> dict[str, Any]:
    models = re.findall(r"^model name\s*:\s*(.*)$", _text("/proc/cpuinfo"), re.M)
    memory = dict(re.findall(r"^(MemTotal|MemAvailable):\s*(\d+) kB$", _text("/proc/meminfo"), re.M))
    return {
        "platform": platform.platform(),
        "processor": models[0] if models else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "cores to use": cores(),
        "memory_bytes": 1024 * int(memory["MemTotal"]) if "MemTotal" in memory else None,
        "available_bytes": 1024 * int(memory["MemAvailable"]) if "MemAvailable" in memory else None,
    }


def cores() -> int:
    """Cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _torch() -> dict[str, Any]:
    """CUDA or ROCm that torch was built for, and the GPUs that it sees."""
    import torch

    found: dict[str, Any] = {
        "built for": f"CUDA {torch.version.cuda}"
        if torch.version.cuda
        else f"ROCm {torch.version.hip}"
        if torch.version.hip
        else "processors",
        "backends": [b for b in ("nccl", "gloo", "mpi", "ucc") if torch.distributed.is_backend_available(b)],
        "threads": torch.get_num_threads(),
    }
    if not torch.cuda.is_available():
        return {**found, "GPUs": []}
    names = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    found["GPUs"] = [f"{p.name}, {p.total_memory / 2**30:.1f} GiB, {p.major}.{p.minor}" for p in names]
    if torch.distributed.is_nccl_available():
        found["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[no-untyped-call]
    return found


def _topology() -> dict[str, Any]:
    found = {}
    for command in TOPOLOGY:
        if shutil.which(command[0]) is None:
            continue
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
            found[" ".join(command)] = re.sub(r"\x1b\[[0-9;]*m", "", done.stdout or done.stderr).rstrip()
        except (OSError, subprocess.TimeoutExpired) as error:
            found[" ".join(command)] = str(error)
    return found


def _environment() -> dict[str, Any]:
    return {name: value for name, value in sorted(os.environ.items()) if name.startswith("ZGRAPH_")}


def _caches() -> dict[str, Any]:
    """Bytes and files of each folder; those that are not there are left out."""
    folders = (
        cache_folder(),
        Path.home() / ".cache" / "zgraph",
        Path(os.environ.get("TRITON_CACHE_DIR", Path.home() / ".triton" / "cache")),
        Path(os.environ.get("TORCHINDUCTOR_CACHE_DIR", f"/tmp/torchinductor_{getpass.getuser()}")),
    )
    return {str(folder): _size(folder) for folder in dict.fromkeys(folders) if folder.is_dir()}


def _size(folder: Path) -> dict[str, int]:
    num_bytes = num_files = 0
    for path, _, names in os.walk(folder):
        for name in names:
            try:
                num_bytes += os.lstat(os.path.join(path, name)).st_size
            except OSError:
                continue  # gone since
            num_files += 1
    return {"bytes": num_bytes, "files": num_files}


def _text(path: str) -> str:
    try:
        return Path(path).read_text(errors="replace")
    except OSError:
        return ""


def _without_names(found: Any) -> Any:
    """The same with ~ for the home folder, and $USER for the user's name in any other path."""
    if isinstance(found, Mapping):
        return {_without_names(key): _without_names(value) for key, value in found.items()}
    if isinstance(found, list):
        return [_without_names(item) for item in found]
    return _anonymous(found) if isinstance(found, str) else found


def _anonymous(text: str) -> str:
    for home in dict.fromkeys((str(Path.home()), os.path.expanduser("~"), os.path.realpath(Path.home()))):
        if home.strip("/"):
            text = re.sub(rf"{re.escape(home)}(?![\w.-])", "~", text)
    try:
        user = getpass.getuser()
    except (OSError, KeyError):
        return text
    return re.sub(rf"(?<=[/_]){re.escape(user)}(?![A-Za-z0-9])", "$USER", text)
