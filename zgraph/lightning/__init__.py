"""Lightning's Trainer over zgraph: `Trainer(strategy=zgraph.lightning.Strategy())`; nothing else imports lightning."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from zgraph.lightning.strategy import Strategy

__all__ = ["Strategy"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(import_module("zgraph.lightning.strategy"), name)
    raise AttributeError(f"module 'zgraph.lightning' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
