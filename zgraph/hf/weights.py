"""Whole weights of a compiled model, as transformers saves them."""

from __future__ import annotations

import os
from typing import Any

from torch import nn

from zgraph.compiler.compiled_model import compiled_model
from zgraph.engine.checkpoint.tensors import whole_state_dict


def save_pretrained(model: nn.Module, save_directory: str | os.PathLike[str], **options: Any) -> None:
    """`save_pretrained` of transformers: all ranks gather the weights, the first writes them.

    Raises:
        PeerError: another rank does not call it.
    """
    session = compiled_model(model).session
    is_first = options.pop("is_main_process", session.store.rank == 0)
    state = options.pop("state_dict", None)
    if state is None:
        if not session.is_alone:
            session.begin_call()
            session.peers.agree("saving of the weights: save_pretrained is for all ranks to call", "")
        state = whole_state_dict(model, keep=is_first)
    if is_first:
        type(model).save_pretrained(model, save_directory, state_dict=state, **options)  # type: ignore[attr-defined]
