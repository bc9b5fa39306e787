"""Advice for errors of torch that come of parameters being DTensors: a note at an error that nobody catches."""

from __future__ import annotations

import re

_WHOLE = "call .full_tensor() of it first, on every rank"
ADVICE = (
    (
        r"got mixed torch\.Tensor and DTensor",
        "the parameters and gradients of a compiled model are DTensors. Run the model by calling it, and a part of it "
        "within `with zgraph.gathered(model):`. Where a parameter or gradient meets a plain tensor (a penalty in the "
        f"loss, a mask, a state dict for an eager model), {_WHOLE}",
    ),
    (r"for tensor subclasses|unevenly sharded|invalid python storage", f"this is a DTensor, a shard: {_WHOLE}"),
    (
        r"aten\._foreach_\S+ does not have a sharding strategy",
        "pass foreach=False to the optimizer, whose parameters are shards",
    ),
    (
        r"does not have a sharding strategy|operations that require placement changes",
        f"torch does not do this with DTensors: {_WHOLE}. An optimizer that does it steps at stage=0 alone; "
        "torch.optim.AdamW and those of zgraph.optim step over shards",
    ),
    (
        r"Attempted to set the storage of a tensor on device",
        "torch.compile does not take the parameters of a model that zgraph.compile has compiled; leave torch.compile "
        "out, around the model and around an optimizer's step",
    ),
    (
        r"appears to not have been used in the graph",
        'a tensor that a hook kept is an output of the captured graph, not a value within; pass fullgraph="eager" to '
        "zgraph.compile to differentiate for it",
    ),
)
"""Patterns of messages, and what to do."""


def advice(error: BaseException) -> str:
    """Remedy for an error of torch's; empty where none is known."""
    said = str(error)
    return next((f"zgraph: {words}." for pattern, words in ADVICE if re.search(pattern, said)), "")
