"""Results of AOTAutograd that are kept, by the key of torch's own cache of them.

Torch keeps these results itself where Inductor compiles, in files of its own. Here they are bytes that the caller has.
The key is torch's (`autograd_cache_key`: the graph's code, its inputs, modes, configurations and versions) with what
tracing reads beside that: where nodes come from, and the flags by which torch chooses kernels. Only graphs of torch's
own functions on plain tensors of fixed sizes have a key: the code of others is not seen by it. Tried on torch 2.13.0.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import os
import pickle
import re
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from torch._functorch import config as functorch_config
from torch._functorch._aot_autograd import graph_compile
from torch._functorch._aot_autograd.aot_autograd_result import BundledAOTAutogradResult
from torch._functorch._aot_autograd.autograd_cache import AOTAutogradCache
from torch._functorch._aot_autograd.schemas import SerializableAOTDispatchCompiler
from torch._guards import TracingContext
from torch._inductor.output_code import OutputCode
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

__all__ = ["Code", "Keeping", "Unkeyed", "as_torch_keeps", "is_data", "keeping"]

Run = Callable[[list[Any]], Sequence[Any]]

_META = frozenset(
    [
        "stack_trace",
        "example_value",
        "nn_module_stack",
        "source_fn_stack",
        "tensor_dict",
        "grapharg",
        "creation_timestamp",
    ]
)
"""Notes at nodes of a graph without annotations. Where there is another, tracing may read it."""

_SERIAL = re.compile(r"(?<=in zgraph_forward_)\d+")
"""Of the function that is captured, in the names of frames: how many there were before in this process."""

_NAMESPACES = frozenset({"aten", "prims", "zgraph"})

_ROOTS = frozenset({"torch", "_operator", "math", "builtins"})

_VARIABLES = ("TORCH", "PYTORCH", "ATEN", "MKL", "ONEDNN", "DNNL", "CUDA", "CUBLAS", "CUDNN", "NVIDIA")
_OF_LAUNCHERS = ("TORCHELASTIC_", "CUDA_VISIBLE_DEVICES")
"""Variables that are in the key, and those of them that say which process this is."""

_OF_TORCH = frozenset({"aten/linalg_lu_solve.out/MPS", "aten/_foreach_mm/CUDA"})
"""Kernels of ATen's ops that torch itself writes in Python, beside those that tell shapes."""

_AOT = "torch._functorch._aot_autograd"

_CLASSES = frozenset(
    {
        ("builtins", "list"),
        ("collections", "defaultdict"),
        ("torch", "Size"),
        ("torch", "Tensor"),
        ("torch._subclasses.functional_tensor", "FunctionalTensor"),
        (__name__, "Code"),
        *(
            (f"{_AOT}.aot_autograd_result", name)
            for name in ("BundledAOTAutogradResult", "BundledCompiledForward", "BundledCompiledBackward")
        ),
        *((f"{_AOT}.descriptors", name) for name in ("PlainAOTOutput", "TangentAOTInput")),
        *((f"{_AOT}.runtime_wrappers", name) for name in ("AOTDedupeWrapper", "AOTSyntheticBaseWrapper")),
        *(
            (f"{_AOT}.schemas", name)
            for name in (
                "InputAliasInfo",
                "MemoryFormatMeta",
                "MutationType",
                "OutputAliasInfo",
                "OutputType",
                "PlainTensorMeta",
                "ViewAndMutationMeta",
            )
        ),
    }
)
"""All that a result may be made of: data and enumerations. Where one needs more, it is not kept."""


class Unkeyed(RuntimeError):
    """A graph has no key, and why."""


@dataclass
class Code(OutputCode):
    """One half of a program, as AOTAutograd holds it.

    Args:
        phase: "forward", "backward" or "inference".
        run: the half; None in a result that was kept, until it is given one.
    """

    phase: str = ""
    run: Run | None = None

    def __post_init__(self) -> None:
        self._boxed_call = True

    def __call__(self, inputs: Sequence[Any]) -> Any:
        assert self.run is not None, "a result that was kept is given its program before it is called"
        return self.run(inputs)  # type: ignore[arg-type]

    def prepare_for_serialization(self) -> None:
        self.run = None

    def post_compile(self, example_inputs: Any, constants: Any, graph_kwargs: Any) -> None:
        pass

    def set_triton_bundle(self, triton_bundle: Any) -> None:
        pass


@dataclass
class Keeping:
    """State of one graph, for which a result is asked.

    Args:
        find: the bytes that are kept for a key; None where nothing is.
        salt: text of all else that the caller's part of tracing depends on.

    `key` is the graph's, empty where it has none; `codes` are the halves of a result that was found; `made` are the
    bytes of a new one, empty where it cannot be kept.
    """

    find: Callable[[str], bytes | None]
    salt: str
    key: str = ""
    codes: list[Code] = field(default_factory=list)
    made: bytes = b""

    def lookup(self, own: str, *_: Any) -> tuple[Any, bytes] | None:
        """Answer to what torch asks for by its own key."""
        self.key = hashlib.sha256(f"{own}\n{self.salt}".encode()).hexdigest()
        if (held := self.find(self.key)) is None:
            return None
        entry = _loaded(held)
        self.codes = [half.result for half in (entry.compiled_fw, entry.compiled_bw) if half is not None]
        return entry, held

    def save(self, _: str, entry: Any, remote: bool) -> None:
        """Take note of what torch has made."""
        del remote
        entry.pre_save()
        bare = dataclasses.replace(
            entry,
            aot_joint_graph_str=None,
            aot_forward_graph_str=None,
            aot_backward_graph_str=None,
            min_cut_info_str=None,
            sanitized_aot_config=None,
            serialized_bw_module=None,
        )
        if entry.guards_expr or entry.maybe_subclass_meta is not None or _has_guards():
            return
        try:
            held = pickle.dumps(bare)
        except (pickle.PicklingError, TypeError, AttributeError):
            return
        self.made = held if is_data(held) else b""

    def compiler(self, phase: Callable[[], str], compile_half: Callable[..., Run]) -> Any:
        """A compiler of halves whose results can be kept."""

        def compiled(gm: fx.GraphModule, examples: Sequence[Any]) -> Code:
            return Code(phase(), compile_half(gm, examples))

        return SerializableAOTDispatchCompiler(Code, compiled)


@contextmanager
def keeping(
    gm: fx.GraphModule, examples: Sequence[Any], salt: str, find: Callable[[str], bytes | None]
) -> Iterator[Keeping]:
    """Have AOTAutograd ask for what is kept of a graph, and tell what it makes.

    Args:
        gm: the graph.
        examples: its inputs.
        salt: text of what the caller's compilers depend on.
        find: the bytes that are kept for a key; None where nothing is.

    Raises:
        Unkeyed: the graph has no key; the message says why.
    """
    _check(gm, examples)
    kept = Keeping(find, "\n".join([salt, *_state(), *_places(gm)]))
    _settings_before.append({name: getattr(functorch_config, name) for name in _CONFIG})
    try:
        with _installed({"_lookup": kept.lookup, "save": kept.save}, lambda gm: None, _CONFIG):
            yield kept
    finally:
        _settings_before.pop()


_CONFIG = {
    "enable_autograd_cache": True,
    "enable_remote_autograd_cache": False,
    "bundled_autograd_cache": True,
    "force_non_lazy_backward_lowering": True,
}
"""Settings with which AOTAutograd asks for what is kept, and tells what it has made."""

_settings_before: list[dict[str, Any]] = []
"""Those of the user, while a graph is kept. Torch compiles one graph at a time."""

_OWN: tuple[dict[str, Any], Any] = (
    {name: getattr(AOTAutogradCache, name) for name in ("_lookup", "save")},
    vars(graph_compile)["serialize_graph_module"],
)
"""Methods by which torch itself asks and tells, and how it writes the graph of a backward: with the code of halves."""


@contextmanager
def as_torch_keeps() -> Iterator[None]:
    """Have AOTAutograd ask and tell as it would by itself, for graphs that are compiled while another is."""
    with _installed(*_OWN, _settings_before[-1] if _settings_before else {}):
        yield


@contextmanager
def _installed(methods: dict[str, Any], serialize: Any, settings: dict[str, Any]) -> Iterator[None]:
    """These methods of torch's cache and these settings."""
    cache: Any = AOTAutogradCache
    tracing: Any = graph_compile
    before, serialized = {name: getattr(cache, name) for name in methods}, tracing.serialize_graph_module
    for name, method in methods.items():
        setattr(cache, name, staticmethod(method))
    tracing.serialize_graph_module = serialize
    try:
        with functorch_config.patch(settings):
            yield
    finally:
        for name, method in before.items():
            setattr(cache, name, staticmethod(method))
        tracing.serialize_graph_module = serialized


def _check(gm: fx.GraphModule, examples: Sequence[Any]) -> None:
    """Raise Unkeyed for a graph that torch's key does not tell from another."""
    for example in examples:
        kind = type(example)
        if kind not in (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer, FakeTensor):
            raise Unkeyed(f"an input is a {kind.__name__}")
        if example.layout is not torch.strided or any(
            not isinstance(s, int) for s in (*example.shape, *example.stride())
        ):
            raise Unkeyed("an input has a size that is a symbol, or another layout")
    if _get_current_dispatch_mode_stack_without_fakes() or torch._C._functorch.peek_interpreter_stack() is not None:
        raise Unkeyed("a mode of torch sees each op")
    if torch._C._len_torch_function_stack() or torch._C._autograd._top_saved_tensors_default_hooks(True) is not None:
        raise Unkeyed("a mode of torch sees each function, or hooks see what is saved")
    own = (name for name in torch.library._impls if name.startswith("aten/") and not name.endswith("/Meta"))
    if overridden := sorted({*own} - _OF_TORCH):
        raise Unkeyed(f"an op of torch has another kernel: {overridden[0]}")
    for node in gm.graph.nodes:
        if unknown := node.meta.keys() - _META:
            raise Unkeyed(f"%{node.name} has {min(unknown)}, which tracing may read")
        if node.op in ("get_attr", "call_module"):
            raise Unkeyed(f"%{node.name} holds a tensor or a function")
        if node.op == "call_function" and not _is_known(node.target):
            raise Unkeyed(f"%{node.name} calls {node.target}, whose code is not torch's")


def _get_current_dispatch_mode_stack_without_fakes() -> list[Any]:
    return [mode for mode in _get_current_dispatch_mode_stack() if type(mode).__name__ != "FakeTensorMode"]


def _is_known(target: Any) -> bool:
    """Whether a function is torch's or Python's own, all of whose code has a version in the key."""
    if isinstance(target, torch._ops.OpOverload | torch._ops.OpOverloadPacket):
        return str(target).partition(".")[0] in _NAMESPACES
    if not isinstance(target, types.BuiltinFunctionType | types.FunctionType | types.MethodDescriptorType):
        return False
    root = (getattr(target, "__module__", None) or "").partition(".")[0]
    owner = getattr(target, "__self__", None)
    return root in _ROOTS or (root == "" and isinstance(owner, type) and owner.__module__.startswith("torch"))


def _places(gm: fx.GraphModule) -> Iterator[str]:
    """Where each node comes from: its module and the lines of code, which the captured graph tells of."""
    for node in gm.graph.nodes:
        stack = [(path, f"{kind.__module__}.{kind.__qualname__}") for path, kind in _modules(node)]
        lines = _SERIAL.sub("", node.meta.get("stack_trace") or "")
        yield f"{node.name} {node.op} {stack} {lines}"


def _modules(node: fx.Node) -> Iterator[tuple[str, type]]:
    for path, kind in (node.meta.get("nn_module_stack") or {}).values():
        yield str(path), kind if isinstance(kind, type) else type(kind)


def _state() -> Iterator[str]:
    """Flags and variables by which torch chooses what an op is traced as."""
    backends: Any = torch.backends
    cuda, core = backends.cuda, torch._C
    yield f"attention {cuda.flash_sdp_enabled()} {cuda.mem_efficient_sdp_enabled()} {cuda.math_sdp_enabled()}"
    yield f"attention {cuda.cudnn_sdp_enabled()} {cuda.fp16_bf16_reduction_math_sdp_allowed()}"
    yield f"attention {core._get_sdp_priority_order()} {core._get_overrideable_sdp_enabled()}"
    yield f"fast paths {backends.mha.get_fastpath_enabled()} {torch.get_float32_matmul_precision()}"
    yield f"libraries {core._get_mkldnn_enabled()} {core._get_cudnn_enabled()} {core._get_nnpack_enabled()}"
    yield f"libraries {backends.mkldnn.is_available()} {backends.mkl.is_available()} {backends.openmp.is_available()}"
    yield f"libraries {core._get_cudnn_deterministic()} {core._get_cudnn_benchmark()}"
    yield f"defaults {torch.get_default_dtype()} {torch.get_default_device()} {torch.is_inference_mode_enabled()}"
    yield f"deterministic {torch.are_deterministic_algorithms_enabled()}"
    yield f"fills {core._get_deterministic_fill_uninitialized_memory()}"
    yield f"processor {backends.cpu.get_cpu_capability()}"
    for name, value in sorted(os.environ.items()):
        if name.startswith(_VARIABLES) and not name.startswith(_OF_LAUNCHERS):
            yield f"{name}={value}"


def _has_guards() -> bool:
    """Whether tracing has found what a later call must be asked for: which of its inputs overlap, say."""
    context = TracingContext.try_get()
    return context is not None and bool(context.guards_context.aotautograd_guards)


class _Reader(pickle.Unpickler):
    """Reads results, and nothing that could run code."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _CLASSES:
            return super().find_class(module, name)
        if module == "torch" and isinstance(found := getattr(torch, name, None), torch.dtype):
            return found
        raise pickle.UnpicklingError(f"{module}.{name} is no part of a result of AOTAutograd")


def is_data(held: bytes) -> bool:
    """Whether bytes are a result that can be read, and nothing else."""
    try:
        _loaded(held)
    except (pickle.PickleError, AttributeError, TypeError, ValueError, EOFError, IndexError, KeyError, ImportError):
        return False
    return True


def _loaded(held: bytes) -> Any:
    """A result from its bytes. Raises pickle.PicklingError or UnpicklingError if it is none, or is more than data."""
    found = _Reader(io.BytesIO(held)).load()
    halves = (getattr(found, name, None) for name in ("compiled_fw", "compiled_bw"))
    if not isinstance(found, BundledAOTAutogradResult) or not all(
        half is None or isinstance(half.result, Code) for half in halves
    ):
        raise pickle.UnpicklingError("it is no result of AOTAutograd")
    return found
