"""Runs of a function on tensors without data, in which each tensor is known by a term: what it was computed by.

A term is a hash of the op, its numbers and the terms of its operands, so that two runs with the same terms of results
compute the same, whatever Python code they came from. Memory has the term, and a tensor that of its memory with its
place in it: a view is told by its place, and a write to one tensor is seen through all that share its memory. Whether
an operand requires a gradient is part of its term, so that what is detached differs from what is not.

Tried on torch 2.11.0 and 2.13.0.
"""

from __future__ import annotations

import hashlib
import random
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from types import FrameType
from typing import Any

import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack
from torch.utils._python_dispatch import _disable_current_modes as without_modes

from zgraph.bridge.private_compile import capturing
from zgraph.bridge.private_fake import FakeTensor, FakeTensorMode

__all__ = ["NoTerm", "Terms", "global_state", "is_marked", "on_tensors_without_data", "storage_of"]

MAX_CONSTANT_BYTES = 1 << 16
"""Bytes of a tensor that is neither a parameter, a buffer nor an input; a larger one has no term."""

_PLAIN = (type(None), bool, int, float, complex, str, torch.dtype, torch.device, torch.layout, torch.memory_format)


class NoTerm(RuntimeError):
    """An operand has no term: a generator of random numbers, a large constant, a size that depends on data."""


def storage_of(tensor: torch.Tensor) -> int:
    """A number for the memory of a tensor, the same for all that share it."""
    return int(tensor.untyped_storage()._cdata)


class Terms(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Ops run on tensors without data, and their results have terms.

    Args:
        names: of the tensors that are known from before, by `id`.

    `num_ops` counts the ops, and `regions` is a hash of which of them ran within `torch.utils.checkpoint`.
    """

    def __init__(self, names: Mapping[int, str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names = names
        self.num_ops = 0
        self._fakes = FakeTensorMode(allow_non_fake_inputs=True)
        self._memory: dict[int, str] = {}
        self._known: dict[str, tuple[int, str]] = {}
        self._alive: list[torch.Tensor] = []
        self._num_draws = 0
        self._in_region = False
        self._regions = hashlib.sha256()

    @property
    def regions(self) -> str:
        return self._regions.hexdigest()

    @property
    def written(self) -> dict[str, str]:
        """The terms of memory that is known from before and was written to, by the name of its tensor."""
        return {name: self._memory[at] for name, (at, before) in self._known.items() if self._memory[at] != before}

    @property
    def known_storages(self) -> set[int]:
        """The memory that is known from before."""
        return {at for at, _ in self._known.values()}

    def fake(self, tensor: torch.Tensor) -> FakeTensor:
        """The tensor without data in the place of one that is known from before, or of a constant."""
        made = tensor if isinstance(tensor, FakeTensor) else self._fakes.from_tensor(tensor, static_shapes=True)
        storage = storage_of(made)
        if storage not in self._memory:
            name = self.names.get(id(tensor))
            self._memory[storage] = name if name is not None else _constant(tensor)
            if name is not None:
                self._known[name] = storage, name
            self._alive += [made, tensor]
        return made

    def term(self, tensor: torch.Tensor) -> str:
        """The term of a tensor. Raises NoTerm if it has none."""
        made = self.fake(tensor)
        place = f"{made.dtype} {tuple(made.shape)} {made.stride()} {made.storage_offset()} {made.device.type}"
        return _hash(self._memory[storage_of(made)], place, str(tensor.requires_grad))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        profile = sys.getprofile()
        sys.setprofile(None)
        try:
            return self._run(func, args, kwargs or {})
        finally:
            sys.setprofile(profile)

    def _run(self, func: Any, args: Any, kwargs: Any) -> Any:
        leaves = pytree.tree_leaves((args, kwargs))
        words = [str(func), str(torch.is_grad_enabled()), *(self._word(leaf) for leaf in leaves)]
        if torch.Tag.nondeterministic_seeded in func.tags:
            self._num_draws += 1
            words.append(f"draw {self._num_draws}")
        made_by = _hash(*words)
        self._note_region()
        given = {storage_of(self.fake(leaf)) for leaf in leaves if isinstance(leaf, torch.Tensor)}
        args, kwargs = pytree.tree_map_only(torch.Tensor, self.fake, (args, kwargs))
        made = func(*args, **kwargs)
        for index, name in (*_written(func), *_written_unsaid(func, args)):
            written = args[index] if index < len(args) else kwargs.get(name)
            for tensor in pytree.tree_leaves(written):
                if isinstance(tensor, torch.Tensor):
                    at = storage_of(tensor)
                    self._memory[at] = _hash("written", made_by, self._memory[at], str(index))
        for index, result in enumerate(pytree.tree_leaves(made)):
            if isinstance(result, torch.Tensor) and storage_of(result) not in given:
                self._memory[storage_of(result)] = _hash(made_by, str(index))
                self._alive.append(result)
        return made

    def _word(self, leaf: Any) -> str:
        if isinstance(leaf, torch.Tensor):
            return self.term(leaf)
        if isinstance(leaf, _PLAIN):
            return f"{type(leaf).__name__} {leaf!r}"
        raise NoTerm(f"an op is given a {type(leaf).__name__}")

    def _note_region(self) -> None:
        self.num_ops += 1
        hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
        if hooks is not None and not all(str(getattr(h, "__module__", "")).startswith("torch.") for h in hooks):
            raise NoTerm("it has hooks for saved tensors, which run in the backward")
        in_region = hooks is not None
        if in_region != self._in_region:
            self._in_region = in_region
            self._regions.update(f"{self.num_ops} ".encode())


@cache
def _written(func: Any) -> tuple[tuple[int, str], ...]:
    """The arguments of an op that it writes to: positions and names."""
    arguments = enumerate(func._schema.arguments)
    return tuple((i, a.name) for i, a in arguments if a.alias_info is not None and a.alias_info.is_write)


_NORMS = {"aten::native_batch_norm", "aten::cudnn_batch_norm", "aten::miopen_batch_norm"}


def _written_unsaid(func: Any, args: Sequence[Any]) -> tuple[tuple[int, str], ...]:
    """The arguments that an op writes to without its schema saying so: the means and variances of norms in training."""
    is_norm = func._schema.name in _NORMS and len(args) > 5 and bool(args[5])
    return ((3, "running_mean"), (4, "running_var")) if is_norm else ()


def _constant(tensor: torch.Tensor) -> str:
    """The term of memory that nobody has named: of what it holds."""
    if isinstance(tensor, FakeTensor) or tensor.layout is not torch.strided or tensor.is_meta:
        raise NoTerm("a tensor without data comes from elsewhere")
    if tensor.untyped_storage().nbytes() > MAX_CONSTANT_BYTES:
        raise NoTerm(f"a tensor of shape {tuple(tensor.shape)} is neither a parameter, a buffer nor an input")
    with without_modes(), torch.no_grad():
        held = bytes(tensor.detach().cpu().untyped_storage().tolist())  # type: ignore[no-untyped-call]
    return f"constant {hashlib.sha256(held).hexdigest()}"


def _hash(*words: str) -> str:
    return hashlib.blake2b("\0".join(words).encode(), digest_size=16).hexdigest()


Profile = Callable[[FrameType, str, Any], None]


@contextmanager
def on_tensors_without_data(terms: Terms, profile: Profile | None = None) -> Iterator[None]:
    """Ops run on tensors without data for the length of a `with`, as if a capture saw them.

    Random numbers are afterwards as before, and so are autocast's copies. `profile` is told of Python functions that
    are called, but for those within ops.
    """
    state, random_state, flag = torch.get_rng_state(), random.getstate(), torch.compiler._is_compiling_flag
    before = sys.getprofile()
    torch.compiler._is_compiling_flag = True
    try:
        torch.clear_autocast_cache()
        with capturing(), terms._fakes, terms:
            sys.setprofile(profile)
            yield
    finally:
        sys.setprofile(before)
        torch.compiler._is_compiling_flag = flag
        torch.clear_autocast_cache()
        random.setstate(random_state)
        torch.set_rng_state(state)


def is_marked(tensor: torch.Tensor) -> bool:
    """Whether some size of a tensor is marked as one that changes."""
    names = "_dynamo_dynamic_indices", "_dynamo_weak_dynamic_indices", "_dynamo_unbacked_indices"
    return any(getattr(tensor, name, None) for name in names)


def global_state(devices: Sequence[str]) -> tuple[object, ...]:
    """Settings of torch in this thread that a capture depends on; a word that it cannot be reused in for modes that
    see every op.
    """
    if _get_current_dispatch_mode_stack() or torch._C._len_torch_function_stack():
        return ("modes",)
    if torch._C._functorch.peek_interpreter_stack() is not None or sys.getprofile() is not None:
        return ("modes",)
    autocast = tuple((torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in devices)
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        autocast,
        torch.is_autocast_cache_enabled(),
        torch.get_default_dtype(),
        torch.get_default_device(),
        torch.get_deterministic_debug_mode(),
        torch.get_float32_matmul_precision(),
        torch.get_num_threads(),
        torch.are_deterministic_algorithms_enabled(),
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction,
        torch._C._get_flash_sdp_enabled(),
        torch._C._get_mem_efficient_sdp_enabled(),
        torch._C._get_math_sdp_enabled(),
        torch._C._get_cudnn_sdp_enabled(),
        torch.backends.mkldnn.enabled,
        torch._C._autograd._top_saved_tensors_default_hooks(True) is not None,
    )
