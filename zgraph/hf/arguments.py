"""TrainingArguments whose `deepspeed` is read by zgraph: the package of that name need not be there."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass, field
from typing import Any

import transformers

from zgraph.errors import UsageError

Base: Any = object  # the methods are those of transformers.TrainingArguments, which `enabled` puts behind this class


class Arguments(Base):  # type: ignore[misc]
    """Class that `enabled` puts before a class of TrainingArguments.

    Its `deepspeed` (a mapping, the path of a JSON file, or JSON) is the configuration of `zgraph.hf.Trainer`. Another
    Trainer, which would take no notice of it, raises UsageError. So it is with the fields of its own: how many ranks
    compute together, along each axis, as `zgraph.compile` takes them.
    """

    is_read = False

    def __post_init__(self) -> None:
        given = vars(self)["deepspeed"]
        self.deepspeed = None  # else transformers hands it to the package
        super().__post_init__()
        self.deepspeed = json.loads(given) if isinstance(given, str) and given.startswith("{") else given

    @property
    def deepspeed_plugin(self) -> None:
        own = [name for name in _FIELDS if getattr(self, name, 1) != 1]
        if (self.deepspeed is not None or own) and not self.is_read:
            raise UsageError(
                f"{'=, '.join(own) or 'deepspeed'}= of zgraph.hf.TrainingArguments is read by zgraph.hf.Trainer: take "
                "it, or zgraph.hf.enable(MyTrainer)"
            )

    @deepspeed_plugin.setter
    def deepspeed_plugin(self, _: None) -> None:
        pass

    @property
    def _no_sync_in_gradient_accumulation(self) -> bool:
        return True

    def __reduce__(self) -> tuple[Any, ...]:
        return _made, (type(self).__mro__[2],), self.__dict__  # a checkpoint has the arguments


_FIELDS = {
    "tensor_parallel": "Ranks that compute each op together, with the same batch",
    "context_parallel": "Ranks that share each sequence of one batch",
    "expert_parallel": "Ranks that share the experts of a mixture",
}
"""Fields that a class of TrainingArguments gets, with what the command line says of them."""


@functools.cache
def enabled(kind: type[Any]) -> type[Any]:
    """A class of TrainingArguments whose `deepspeed` zgraph reads."""
    if issubclass(kind, Arguments):
        return kind
    names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "__doc__": kind.__doc__}
    own = {name: field(default=1, metadata={"help": f"{words} (zgraph)."}) for name, words in _FIELDS.items()}
    annotations = {"__annotations__": dict.fromkeys(own, int)}
    return dataclass(repr=False)(type(kind.__name__, (Arguments, kind), {**names, **annotations, **own}))


def _made(kind: Any) -> Any:
    return object.__new__(enabled(kind))


TrainingArguments: Any = enabled(transformers.TrainingArguments)
TrainingArguments.__module__ = __name__
