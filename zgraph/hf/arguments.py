"""TrainingArguments whose `deepspeed` is read by zgraph: the package of that name need not be there."""

from __future__ import annotations

import functools
import json
from typing import Any

import transformers

from zgraph.errors import UsageError

Base: Any = object  # the methods are those of transformers.TrainingArguments, which `enabled` puts behind this class


class Arguments(Base):  # type: ignore[misc]
    """Class that `enabled` puts before a class of TrainingArguments.

    Its `deepspeed` (a mapping, the path of a JSON file, or JSON) is the configuration of `zgraph.hf.Trainer`. Another
    Trainer, which would take no notice of it, raises UsageError.
    """

    is_read = False

    def __post_init__(self) -> None:
        given = vars(self)["deepspeed"]
        self.deepspeed = None  # else transformers hands it to the package
        super().__post_init__()
        self.deepspeed = json.loads(given) if isinstance(given, str) and given.startswith("{") else given

    @property
    def deepspeed_plugin(self) -> None:
        if self.deepspeed is not None and not self.is_read:
            raise UsageError(
                "deepspeed= of zgraph.hf.TrainingArguments is read by zgraph.hf.Trainer: take it, or "
                "zgraph.hf.enable(MyTrainer)"
            )

    @deepspeed_plugin.setter
    def deepspeed_plugin(self, _: None) -> None:
        pass

    @property
    def _no_sync_in_gradient_accumulation(self) -> bool:
        return True

    def __reduce__(self) -> tuple[Any, ...]:
        return _made, (type(self).__mro__[2],), self.__dict__  # a checkpoint has the arguments


@functools.cache
def enabled(kind: type[Any]) -> type[Any]:
    """A class of TrainingArguments whose `deepspeed` zgraph reads."""
    if issubclass(kind, Arguments):
        return kind
    names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "__doc__": kind.__doc__}
    return type(kind.__name__, (Arguments, kind), names)


def _made(kind: Any) -> Any:
    return object.__new__(enabled(kind))


TrainingArguments: Any = enabled(transformers.TrainingArguments)
TrainingArguments.__module__ = __name__
