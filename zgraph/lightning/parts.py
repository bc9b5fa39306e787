"""The parts of a LightningModule that are compiled: all of it, or the modules that its steps call."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from lightning.pytorch import LightningModule
from torch import nn

from zgraph.errors import UsageError
from zgraph.options.validate import ATTRIBUTE

_HOLDERS = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)


def parts_of(module: LightningModule, names: Sequence[str]) -> list[nn.Module]:
    """The modules to compile.

    Args:
        module: the LightningModule.
        names: of its modules; with none it is the LightningModule itself if that has a forward of its own, and
            otherwise each module in its attributes that has parameters.

    Raises:
        UsageError: a part has no forward, is none, or a parameter is in no part.
    """
    if compiled := [part for part in module.modules() if ATTRIBUTE in part.__dict__]:
        parts = compiled  # by the module's own configure_model, or by a fit before this one
    elif names:
        parts = [_named(module, name) for name in names]
    elif type(module).forward is not LightningModule.forward:
        parts = [module]
    else:
        parts = [part for part in module.children() if any(True for _ in part.parameters())]
    _check(module, parts)
    return parts


def _named(module: LightningModule, name: str) -> nn.Module:
    try:
        part: nn.Module = module.get_submodule(name)
    except AttributeError:
        raise UsageError(f"modules: {type(module).__name__} has no module {name!r}") from None
    return part


def _check(module: LightningModule, parts: Sequence[nn.Module]) -> None:
    names = {id(part): name for name, part in module.named_modules()}
    if holders := [names[id(part)] for part in parts if isinstance(part, _HOLDERS)]:
        raise UsageError(
            f"{', '.join(holders)}: a list of modules has no forward to compile; give {type(module).__name__} a "
            "forward, which is then compiled whole, and call self(...) in its steps"
        )
    inside = {id(p) for part in parts for p in part.parameters()}
    if outside := [name for name, p in module.named_parameters() if id(p) not in inside]:
        raise UsageError(
            f"{', '.join(outside[:5])}: parameters in no compiled module; give {type(module).__name__} a forward, "
            "which is then compiled whole, or put them into one of its modules"
        )


def compiled_parts(module: nn.Module) -> Iterator[Any]:
    """The modules within a module, itself among them, that are compiled."""
    return (part for part in module.modules() if ATTRIBUTE in part.__dict__)
