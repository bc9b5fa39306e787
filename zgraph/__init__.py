"""zgraph: a declarative graph compiler for memory-sharded (ZeRO) training on PyTorch.

    model = zgraph.compile(model, stage=3)

The public names below are loaded when they are first used, so that the torch-free parts (`zgraph.ir`,
`zgraph.passes`, `zgraph.cost`) can be imported without torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from zgraph.version import __version__ as __version__

if TYPE_CHECKING:
    from zgraph import optim
    from zgraph.api import compile, gathered, no_sync, recipe, report
    from zgraph.capture import trace
    from zgraph.compiler.profiler import profile, profile_machine
    from zgraph.engine.checkpoint.export import export_hf
    from zgraph.engine.initialize import add_config_arguments, init_distributed, initialize_engine
    from zgraph.engine.initialize import initialize_engine as initialize
    from zgraph.estimate.plan import plan, sweep

__all__ = [
    "add_config_arguments", "compile", "export_hf", "gathered", "init_distributed", "initialize", "initialize_engine",
    "no_sync", "optim", "plan", "profile", "profile_machine", "recipe", "report", "sweep", "trace",
]  # fmt: skip

_HOMES = {
    "compile": "zgraph.api",
    "add_config_arguments": "zgraph.engine.initialize",
    "init_distributed": "zgraph.engine.initialize",
    "export_hf": "zgraph.engine.checkpoint.export",
    "gathered": "zgraph.api",
    "initialize": "zgraph.engine.initialize",
    "initialize_engine": "zgraph.engine.initialize",
    "no_sync": "zgraph.api",
    "plan": "zgraph.estimate.plan",
    "sweep": "zgraph.estimate.plan",
    "profile": "zgraph.compiler.profiler",
    "profile_machine": "zgraph.compiler.profiler",
    "recipe": "zgraph.api",
    "report": "zgraph.api",
    "trace": "zgraph.capture",
}


_MODULES = frozenset({"optim"})


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(f"zgraph.{name}")
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'zgraph' has no attribute {name!r}")
