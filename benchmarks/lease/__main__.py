"""python -m benchmarks.lease --out FOLDER"""

from __future__ import annotations

import importlib.util
import sys

NEEDED = ("torch", "triton", "numpy", "networkx", "sympy", "pydantic", "rich", "typer", "safetensors", "transformers")


def main() -> None:
    """Check that everything is installed, then run a lease or, as its child, one part."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        sys.exit(
            f"NotInstalled: zgraph and its lease need {', '.join(missing)}, which {sys.executable} does not have. "
            f"Run: {sys.executable} -m pip install {' '.join(missing)}"
            + (" (torch and triton as your GPU needs them)" * bool({"torch", "triton"} & {*missing}))
        )
    if sys.argv[1:2] == ["part"]:
        from benchmarks.lease.child import main as run_part

        run_part(sys.argv[2:])
    else:
        from benchmarks.lease.cli import run

        run()


if __name__ == "__main__":
    main()
