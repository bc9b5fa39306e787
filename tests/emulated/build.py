"""The library of the emulated device: built once for each torch and each state of its source."""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
from pathlib import Path

SOURCES = Path(__file__).parent / "device"
FLAGS = ("-O0", "-fPIC", "-shared", "-std=c++20", "-DNDEBUG", "-ltorch_cpu", "-lc10")


def compiler() -> str | None:
    """The C++ compiler; None where there is none."""
    return shutil.which(os.environ.get("CXX", "g++"))


def torch_folder() -> Path:
    """Where torch is installed, without importing it."""
    found = importlib.util.find_spec("torch")
    assert found is not None
    assert found.origin is not None
    return Path(found.origin).parent


def cache_folder() -> Path:
    """Where libraries are kept: ZGRAPH_TESTS_CACHE names it to processes whose other caches are elsewhere."""
    found = os.environ.get("ZGRAPH_TESTS_CACHE")
    return Path(found) if found else Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "zgraph-tests"


def library() -> Path:
    """The path of the library, which is built if it is missing: half a minute."""
    files = sorted(SOURCES.iterdir())
    state = hashlib.sha256(b"".join(file.read_bytes() for file in files))
    state.update(f"{importlib.metadata.version('torch')} {torch_folder()} {FLAGS}".encode())
    folder = cache_folder()
    path = folder / f"emulated-{state.hexdigest()[:16]}.so"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        draft = path.with_suffix(f".{os.getpid()}")
        _compile(draft)
        draft.replace(path)
    return path


def _compile(target: Path) -> None:
    torch = torch_folder()
    found = compiler()
    assert found is not None, "no C++ compiler"
    places = [f"-I{torch}/include", f"-I{torch}/include/torch/csrc/api/include", f"-L{torch}/lib"]
    command = [found, str(SOURCES / "device.cpp"), *places, *FLAGS, f"-Wl,-rpath,{torch}/lib", "-o", str(target)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stderr[-6000:]}"
