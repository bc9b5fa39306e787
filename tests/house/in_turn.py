"""Runs examples one after the other in the same processes, so that torch is imported once: `in_turn.py A.py B.py`."""

import os
import runpy
import sys
from pathlib import Path

import torch

for path in sys.argv[1:]:
    if os.environ.get("RANK", "0") == "0":
        print(f"--- {Path(path).name}", flush=True)
    torch.compiler.reset()
    sys.argv = [path]
    runpy.run_path(path, run_name="__main__")
