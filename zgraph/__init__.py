"""zgraph: a declarative graph compiler for memory-sharded (ZeRO) training on PyTorch.

    model = zgraph.compile(model, stage=3)

The public names below are loaded when they are first used, so that the torch-free parts (`zgraph.ir`,
`zgraph.passes`, `zgraph.cost`) can be imported without torch.
"""

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zgraph.version import __version__ as __version__

if TYPE_CHECKING:
    from zgraph import deepspeed, errors, hf, ir, lightning, optim, passes
    from zgraph.api import compile, feedback, gathered, join, no_sync, recipe, report
    from zgraph.capture import trace
    from zgraph.compiler.machine_profile import profile_machine
    from zgraph.compiler.profiler import profile
    from zgraph.distillation import KeptLogits, distill, keep_logits, prune_layers
    from zgraph.engine.checkpoint.export import export_hf
    from zgraph.engine.initialize import add_config_arguments, init_distributed, initialize_engine
    from zgraph.engine.initialize import initialize_engine as initialize
    from zgraph.estimate.calibration import calibrate
    from zgraph.estimate.plan import plan, sweep
    from zgraph.inference import export_model, infer, serving
    from zgraph.optim.elastic import elastic
    from zgraph.optim.local_steps import local_steps
    from zgraph.options.lengths import Lengths
    from zgraph.options.searched import search_placements
    from zgraph.passes.core.registry import register_pass

__all__ = [
    "KeptLogits",
    "Lengths",
    "add_config_arguments",
    "calibrate",
    "compile",
    "deepspeed",
    "distill",
    "elastic",
    "errors",
    "export_hf",
    "export_model",
    "feedback",
    "gathered",
    "hf",
    "infer",
    "init_distributed",
    "initialize",
    "initialize_engine",
    "ir",
    "join",
    "keep_logits",
    "lightning",
    "local_steps",
    "no_sync",
    "optim",
    "passes",
    "plan",
    "profile",
    "profile_machine",
    "prune_layers",
    "recipe",
    "register_pass",
    "report",
    "search_placements",
    "serving",
    "sweep",
    "trace",
]

_HOMES = {
    "zgraph.api": ("compile", "feedback", "gathered", "join", "no_sync", "recipe", "report"),
    "zgraph.capture": ("trace",),
    "zgraph.compiler.machine_profile": ("profile_machine",),
    "zgraph.compiler.profiler": ("profile",),
    "zgraph.distillation": ("KeptLogits", "distill", "keep_logits", "prune_layers"),
    "zgraph.engine.checkpoint.export": ("export_hf",),
    "zgraph.engine.initialize": ("add_config_arguments", "init_distributed", "initialize", "initialize_engine"),
    "zgraph.estimate.calibration": ("calibrate",),
    "zgraph.estimate.plan": ("plan", "sweep"),
    "zgraph.inference": ("export_model", "infer", "serving"),
    "zgraph.optim.elastic": ("elastic",),
    "zgraph.optim.local_steps": ("local_steps",),
    "zgraph.options.lengths": ("Lengths",),
    "zgraph.options.searched": ("search_placements",),
    "zgraph.passes.core.registry": ("register_pass",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

for _folder in ("passes", "codegen", "runtime"):
    if not (Path(__file__).parent / _folder).is_dir():
        raise ImportError(
            f"{Path(__file__).parent / _folder} is no folder: it is a symbolic link to the folder {_folder} at the top "
            "of the repository, which this checkout has lost. Run: git config core.symlinks true && "
            "git checkout -- zgraph (on Windows in developer mode), or install the package with pip"
        )


def __getattr__(name: str) -> Any:
    if name in _HOME_OF:
        return getattr(import_module(_HOME_OF[name]), name)
    if name in __all__:
        return import_module(f"zgraph.{name}")
    raise AttributeError(f"module 'zgraph' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
