"""Parameters of a forward that is captured in pieces: between two of them eager code may read a parameter.

torch.compile captures what it can, and each piece is a graph with collectives of its own. The rest runs eagerly, and
sees placeholders. An op that reads one has the parameter gathered for its length, and once more for its backward:

    piece | y = op(x, placeholder)                                     | piece
          |   gather, compute, free        gather, backward, free, reduce |

Between the pieces no more of a model is whole than what one op reads, as FSDP2's eager hooks have it for a module.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.autograd.graph import saved_tensors_hooks
from torch.utils import _pytree as pytree

from zgraph.bridge import private_compile
from zgraph.bridge.private_pause import never_captured_alone
from zgraph.errors import StaleParametersError, UsageError
from zgraph.ir.layout import chunk_rows
from zgraph.runtime.eager_fallback import full
from zgraph.runtime.gradients import Gradient, delivered, with_unreduced
from zgraph.runtime.session import Session
from zgraph.runtime.shards import Slot

_METADATA = {
    "size",
    "dim",
    "ndimension",
    "numel",
    "nelement",
    "stride",
    "element_size",
    "is_floating_point",
    "is_complex",
    "is_contiguous",
    "storage_offset",
    "get_device",
    "register_hook",
    "register_post_accumulate_grad_hook",
    "requires_grad_",
    "__len__",
    "__hash__",
    "is_signed",
    "untyped_storage",
    "_typed_storage",
    "has_names",
    "_is_view",
    "_is_zerotensor",
    "is_conj",
    "is_inference",
    "is_neg",
    "is_pinned",
    "is_same_size",
    "is_shared",
}
"""Methods that read no values."""

_VALUES = {"data", "T", "mT", "H", "mH", "real", "imag"}
"""Properties that do."""


class Placeholder(nn.Parameter):
    """A parameter without memory, which ops outside of captured graphs read as the gathered parameter.

    Attributes:
        zgraph_name: name of the parameter it is the placeholder of; a graph is captured for this one alone.
        zgraph_pieces: gathers it.
    """

    zgraph_name: str
    zgraph_pieces: Pieces

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.compiler.is_compiling():
            for each in pytree.tree_leaves((args, kwargs)):
                # the comparison leaves a guard: a graph is captured for one parameter alone
                if isinstance(each, Placeholder) and each.zgraph_name == "":
                    raise AssertionError
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        with torch._C.DisableTorchFunctionSubclass():
            if _reads_no_values(func):
                return func(*args, **kwargs)
            first = next(a for a in pytree.tree_leaves((args, kwargs)) if isinstance(a, Placeholder))
            return first.zgraph_pieces.run(func, args, kwargs)


never_captured_alone(Placeholder.__torch_function__)


def _reads_no_values(func: Any) -> bool:
    name = getattr(func, "__name__", "")
    if name == "__get__":
        return getattr(getattr(func, "__self__", None), "__name__", "") not in _VALUES
    return name in _METADATA


CHECKPOINTED = (
    "torch.utils.checkpoint is around code that is not captured; its parameters are not there when it is computed "
    "again. Pass recompute=True to zgraph.compile instead, or make what is checkpointed one graph"
)


def in_pieces(forward: Callable[..., Any], session: Session) -> Callable[..., Any]:
    """`forward`, captured in pieces, with what its eager code does to parameters and buffers kept."""
    pieces = Pieces(session)

    def call(*args: Any, **kwargs: Any) -> Any:
        with private_compile.without_checkpoints(CHECKPOINTED), pieces.call():
            return forward(*args, **kwargs)

    return call


class Pieces:
    """Gathers the parameters that eager code between the pieces of a model reads.

    Args:
        session: whose parameters.
    """

    def __init__(self, session: Session) -> None:
        self.session = session
        self._written = 0
        self._given: list[tuple[Slot, torch.Tensor, torch.Tensor, int]] = []
        session.before_reading = self.write_back
        for slot in session.store.slots.values():
            if isinstance(slot.placeholder, Placeholder):
                slot.placeholder.zgraph_name, slot.placeholder.zgraph_pieces = slot.name, self

    @contextmanager
    def call(self) -> Iterator[None]:
        """One call of the model: what eager code writes to a parameter by `.data` is in the shards behind it."""
        buffers = [*self.session.store.model.buffers()]
        before = [b._version for b in buffers]
        self._given.clear()
        try:
            yield
            self.write_back()
            if self.session.num_ranks > 1 and before != [b._version for b in buffers]:
                self.session.store.share_buffers()
        finally:
            self._given.clear()

    def write_back(self) -> None:
        """Write to the shards what eager code wrote to gathered parameters that an op gave out."""
        for index, (slot, whole, given, version) in enumerate(self._given):
            if _version(given) != version:
                self._write_back(slot, whole)
                self._given[index] = slot, whole, given, _version(given)

    def run(self, func: Callable[..., Any], args: Any, kwargs: Mapping[str, Any]) -> Any:
        """An op on gathered parameters, which are freed behind it."""
        self.write_back()
        if getattr(func, "__name__", "") == "__set__":
            return self._set(func, *args)
        wholes: dict[int, tuple[Slot, torch.Tensor]] = {}

        def whole(leaf: Any) -> Any:
            if not isinstance(leaf, Placeholder):
                return leaf
            slot = self.session.store.slots[leaf.zgraph_name]
            if id(leaf) not in wholes:
                wholes[id(leaf)] = slot, self._gathered(slot)
            return wholes[id(leaf)][1]

        args, kwargs = pytree.tree_map(whole, (args, kwargs))
        versions = {key: _version(tensor) for key, (_, tensor) in wholes.items()}
        storages = {tensor.untyped_storage()._cdata: slot for slot, tensor in wholes.values()}

        def pack(tensor: torch.Tensor) -> Any:
            slot = storages.get(tensor.untyped_storage()._cdata)
            view = tensor.size(), tensor.stride(), tensor.storage_offset()
            return tensor if slot is None else (slot, view, self._version_of_others)

        with saved_tensors_hooks(pack, self._unpacked):
            result = func(*args, **kwargs)
        for key, (slot, tensor) in wholes.items():
            if _version(tensor) != versions[key]:
                _check_unwatched(slot, tensor)
                self._write_back(slot, tensor)
            elif _shows(result, tensor):
                self._given.append((slot, tensor, result, _version(result)))
        return result

    def _set(self, func: Callable[..., Any], placeholder: Placeholder, value: Any) -> None:
        """`parameter.data = value`, in eager code."""
        slot = self.session.store.slots[placeholder.zgraph_name]
        if func.__self__.__name__ != "data" or value.shape != placeholder.shape:  # type: ignore[attr-defined]
            raise UsageError(
                f"the forward assigns to {slot.name}.{func.__self__.__name__}; "  # type: ignore[attr-defined]
                "do it outside of the forward"
            )
        self._write_back(slot, value.detach().to(slot.placeholder.dtype))

    @private_compile.never_captured
    def _gathered(self, slot: Slot) -> torch.Tensor:
        if torch.is_grad_enabled() and slot.parameter.requires_grad:
            made: torch.Tensor = _Gather.apply(self.session, slot, slot.parameter)  # type: ignore[no-untyped-call]
            return made
        with torch.no_grad():
            return full(self.session, slot)

    @private_compile.never_captured
    def _unpacked(self, packed: Any) -> torch.Tensor:
        if isinstance(packed, torch.Tensor):
            return packed
        slot, view, version = packed
        if version != self._version_of_others:
            raise StaleParametersError(
                f"{slot.name} was changed (by optimizer.step() or load_state_dict?) between this forward and its "
                "backward, which would compute with the new value; run the backward first, or the forward again"
            )
        with torch.no_grad():
            return full(self.session, slot).as_strided(*view)

    @property
    def _version_of_others(self) -> int:
        """Grows whenever parameters are written to, but by the forward itself."""
        return self.session.store.version - self._written

    @private_compile.never_captured
    def _write_back(self, slot: Slot, whole: torch.Tensor) -> None:
        """Keep what eager code wrote to a gathered parameter."""
        store = self.session.store
        if slot.offload:
            store.copies.settle()
        before = store.version
        with torch.no_grad():
            if slot.is_sharded:
                start = store.shard * chunk_rows(whole.shape[0], store.num_shards)
                own = slot.parameter._local_tensor  # type: ignore[attr-defined]
                own.copy_(whole[start : start + own.shape[0]])
            elif whole.data_ptr() != slot.rest.data_ptr():
                slot.rest.copy_(whole)
        self._written += store.version - before


def _version(tensor: torch.Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def _check_unwatched(slot: Slot, whole: torch.Tensor) -> None:
    """Raise UsageError if a gathered parameter was written to while autograd recorded."""
    if whole.requires_grad:
        raise UsageError(
            f"the forward changes the parameter {slot.name} in place; do it within torch.no_grad(), as PyTorch demands "
            "of parameters that want gradients"
        )


def _shows(result: Any, whole: torch.Tensor) -> bool:
    """Whether an op gave out the memory of a gathered parameter, behind autograd's back (`.data`, `detach`)."""
    if not isinstance(result, torch.Tensor) or result.requires_grad:
        return False
    return bool(result.untyped_storage()._cdata == whole.untyped_storage()._cdata)


class _Gather(torch.autograd.Function):
    """From a parameter at rest to the whole one, and from a whole gradient to one at rest."""

    @staticmethod
    def forward(ctx: Any, session: Session, slot: Slot, parameter: torch.Tensor) -> torch.Tensor:
        ctx.session, ctx.slot = session, slot
        whole = full(session, slot)
        return whole.detach() if whole is slot.rest else whole  # an output that is an input would be the parameter

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, made: torch.Tensor) -> Any:
        session, slot = ctx.session, ctx.slot
        stage = session.store.default_stage if slot.stage is None else slot.stage
        is_unreduced = not session.reduces and not session.is_alone and stage < 2
        if not is_unreduced:
            made = session.mean(slot, with_unreduced(session, slot, made)).to(slot.rest.device, slot.rest.dtype)
        ((node, _),) = ctx.next_functions
        return None, None, delivered(session, slot, Gradient(made, is_unreduced), node)
