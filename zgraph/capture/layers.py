"""Stacks of repeated layers, and models with most of them left out.

Two laws say which layers repeat: `every_setting` where the graph of one stands for that of another, `kinds_and_shapes`
where its figures do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn

_OF_ALL_MODULES = frozenset(vars(nn.Module())) - {"training"}


@dataclass(frozen=True, eq=False)
class RepeatedLayers:
    """Layers that are run one after the other.

    Args:
        layers: the module that holds them.
        period: after how many layers they are the same again, the first aside: 1, or 2 where two kinds take turns.
    """

    layers: nn.ModuleList | nn.Sequential
    period: int

    def length(self, fewest: int) -> int:
        """Layers to begin with: whole periods fewer than the stack has, and a period after the first of them."""
        fewest = max(fewest, self.period + 1)
        return fewest + (len(self.layers) - fewest) % self.period


Law = Callable[[nn.Module, Sequence[nn.Module]], list[dict[str, Any]]]
"""From a model and the layers of a list to all that each layer is told by."""


def every_setting(model: nn.Module, layers: Sequence[nn.Module]) -> list[dict[str, Any]]:
    """All that layers are told by, to the last attribute, and their entries in lists of the model's configuration."""
    lists = _lists(model, len(layers))
    return [
        _settings(layer) | {f"entry {n}": some[i] for n, some in enumerate(lists)} for i, layer in enumerate(layers)
    ]


def kinds_and_shapes(model: nn.Module, layers: Sequence[nn.Module]) -> list[dict[str, Any]]:
    """The class of each layer, and the shapes and dtypes of its parameters."""
    return [{"": type(m), **{name: (p.shape, p.dtype) for name, p in m.named_parameters()}} for m in layers]


def stacks(
    model: nn.Module, law: Law = every_setting, kinds: tuple[type[nn.Module], ...] = (nn.ModuleList, nn.Sequential)
) -> list[RepeatedLayers]:
    """The stacks of a model; none inside a layer of another.

    Args:
        model: on any device.
        law: which layers are the same.
        kinds: of the modules that may hold them.
    """
    found: list[RepeatedLayers] = []
    inside: set[nn.Module] = set()
    for module in model.modules():
        if isinstance(module, nn.ModuleList | nn.Sequential) and isinstance(module, kinds) and module not in inside:
            if period := _period(law(model, [*module])):
                found.append(RepeatedLayers(module, period))
                inside.update(module.modules())
    return found


@contextmanager
def shortened(lengths: Mapping[nn.Module, int]) -> Iterator[None]:
    """Stacks with their first layers only."""
    whole = {stack: dict(stack._modules) for stack in lengths}
    try:
        for stack, length in lengths.items():
            stack._modules = {str(i): whole[stack][str(i)] for i in range(length)}
        yield
    finally:
        for stack, modules in whole.items():
            stack._modules = modules


def _period(settings: Sequence[Mapping[str, Any]]) -> int:
    """After how many layers they are the same again, all but the first; 0 if they are not, twice over."""
    for period in range(1, len(settings) // 3 + 1):
        if all(_are_alike(*pair, period) for pair in zip(settings[1:], settings[1 + period :], strict=False)):
            return period
    return 0


def _settings(layer: nn.Module) -> dict[str, Any]:
    """All that a layer is by: the kinds of its modules, the metadata of its tensors, hooks, and every attribute."""
    found: dict[str, Any] = {}
    for path, module in layer.named_modules():
        hooks = *module._forward_hooks.values(), *module._forward_pre_hooks.values()
        found[path] = type(module), hooks
        for name, tensor in (module._parameters | module._buffers).items():
            found[f"{path}.{name}"] = tensor if tensor is None else (tensor.shape, tensor.dtype, tensor.requires_grad)
        found |= {
            f"{path}.{name}": _plain(value) for name, value in vars(module).items() if name not in _OF_ALL_MODULES
        }
    return found


def _plain(value: Any) -> Any:
    """The value, or what can be compared in its place."""
    return (value.func, value.args, value.keywords) if isinstance(value, partial) else value


def _are_alike(first: Mapping[str, Any], second: Mapping[str, Any], distance: int) -> bool:
    """Whether settings are the same, numbers of layers aside."""
    return first.keys() == second.keys() and all(
        a is b or (a == b) is True or (type(a) is type(b) is int and b - a == distance)
        for a, b in ((first[key], second[key]) for key in first)
    )


def _lists(model: nn.Module, length: int) -> list[Any]:
    """Lists of so many entries among the attributes of modules and of their configurations: one entry a layer."""
    holders = {id(held): held for module in model.modules() for held in (module, getattr(module, "config", None))}
    lists = [value for held in holders.values() for value in getattr(held, "__dict__", {}).values()]
    return [value for value in lists if isinstance(value, list | tuple) and len(value) == length]
