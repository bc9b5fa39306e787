"""One rank of benchmarks/one_calibration.py, in a process of its own."""

from __future__ import annotations

import sys
from pathlib import Path

from benchmarks.one_calibration import train

if __name__ == "__main__":
    rank, num_ranks, model, stage, compress, steps, folder, meeting = sys.argv[1:]
    train(int(rank), int(num_ranks), model, int(stage), compress, int(steps), Path(folder), Path(meeting))
