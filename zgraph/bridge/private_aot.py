"""AOTInductor: a function of tensors as a library of C++, which is one call from Python.

What it is made of is text: the graph, its inputs, the settings of Inductor, the processor and the version of torch. Two
functions of the same text are the same library. Tried on torch 2.13.0, on processors.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar, copy_context
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Any

import torch

from zgraph.bridge.private_files import is_private
from zgraph.bridge.private_inductor import Example, Tensors, traced
from zgraph.bridge.processor import processor

__all__ = ["Region", "Unsupported", "libraries_problem", "loaded", "num_compilers"]


class Unsupported(RuntimeError):
    """AOTInductor has no C++ for an op, or a library would hold values."""


class Region:
    """A function that can be built as a library.

    Args:
        function: is traced.
        examples: what it will be given.

    `text` is all that the library depends on, but for passes of the user's in Inductor: with one, `may_keep` is false.
    Raises Unsupported, or what tracing raises.
    """

    def __init__(self, function: Callable[..., Sequence[torch.Tensor]], examples: Sequence[Example]) -> None:
        self._function, self._examples = function, examples
        self.may_keep = not _has_own_passes()
        with traced(function, examples) as (graph, _):
            if graph.graph.find_nodes(op="get_attr"):
                raise Unsupported("it holds values of tensors")
            self.text = "\n".join([*_machine(), *map(repr, examples), graph.code])

    def build(self) -> Callable[[], bytes]:
        """Lower it to C++, in this thread. The function that is returned compiles that, in any thread, which takes
        seconds, and gives the library as torch's package of it (`.pt2`).

        Raises:
            Unsupported: it cannot be, or what torch raises.
        """
        from torch._inductor import config
        from torch._inductor.compile_fx import compile_fx_inner
        from torch._inductor.virtualized import V

        _put_off()
        put_off: list[Callable[[str], Any]] = []
        token = _compiles.set(put_off)
        settings: Any = config
        patches = {"aot_inductor.package": True, "aot_inductor.enable_line_tables": False}
        if not is_private(_headers()):
            patches["aot_inductor.precompile_headers"] = False
        try:
            with (
                traced(self._function, self._examples) as (graph, fakes),
                V.set_aot_compilation(True),
                settings.patch(patches),
            ):
                compile_fx_inner(graph, fakes, cpp_wrapper=True)
                context = copy_context()
        finally:
            _compiles.reset(token)
        (compile_,) = put_off
        return lambda: context.run(_packaged, compile_)


def libraries_problem() -> str:
    """Why this torch makes no libraries of regions; empty where it does."""
    if torch.__version__ >= "2.13":
        return ""
    return f"torch {torch.__version__} has one configuration of Inductor for all threads, and 2.13 one for each"


def num_compilers() -> int:
    """The number of functions to compile at the same time, as the user has set Inductor."""
    from torch._inductor import config

    return int(config.compile_threads or 1)


def loaded(package: bytes) -> Tensors:
    """The function that a package computes, as one call; the list that it is given is empty afterwards.

    The library is loaded from a folder of this process alone, which is gone at once.
    """
    with tempfile.TemporaryDirectory(prefix="zgraph-region-") as folder:
        path = Path(folder) / "region.pt2"
        path.write_bytes(package)
        loader = torch._C._aoti.AOTIModelPackageLoader(str(path), "model", False, 1, -1)
    run: Tensors = loader.boxed_run
    return run


def _packaged(compile_: Callable[[str], Any]) -> bytes:
    from torch.export.pt2_archive._package import package_pt2

    with tempfile.TemporaryDirectory(prefix="zgraph-region-") as folder:
        files = [f for f in compile_(folder) if str(f).endswith((".so", ".json"))]
        held = BytesIO()
        package_pt2(held, aoti_files={"model": files})
    return held.getvalue()


# --- inside torch ---------------------------------------------------------------------------------------------------

_compiles: ContextVar[list[Callable[[str], Any]] | None] = ContextVar("zgraph_compiles", default=None)
"""Compilations that were put off, in a context that lowers."""


_OWN_PASSES = (
    "pre_grad_custom_pass",
    "joint_custom_pre_pass",
    "joint_custom_post_pass",
    "post_grad_custom_pre_pass",
    "post_grad_custom_post_pass",
    "_pre_fusion_custom_pass",
    "_post_fusion_custom_pass",
    "custom_partitioner_fn",
)
"""Settings of Inductor that are functions of the user's, of which there is no text."""


def _has_own_passes() -> bool:
    from torch._inductor import config

    return any(getattr(config, name, None) for name in _OWN_PASSES)


def _machine() -> Iterator[str]:
    """Lines of all that a library depends on beside the graph."""
    from torch._inductor import config
    from torch._inductor.cpu_vec_isa import pick_vec_isa

    settings: Any = config
    deterministic: Any = torch.utils.deterministic
    instructions: Any = pick_vec_isa()
    yield f"torch {torch.__version__} {torch.version.git_version}"
    yield f"{type(instructions).__name__} {instructions.build_arch_flags()}, {torch.get_num_threads()} threads"
    yield f"processor {processor()}"
    yield f"{torch.get_default_dtype()}, deterministic {torch.get_deterministic_debug_mode()}"
    yield f"fills memory {deterministic.fill_uninitialized_memory}"
    yield from (f"{name} = {value!r}" for name, value in sorted(settings.save_config_portable().items()))


def _headers() -> Path:
    """Where torch keeps headers that it has compiled, which the compiler of C++ takes as they are."""
    from torch._inductor.codecache import _HEADER_DIR

    return Path(os.path.dirname(_HEADER_DIR))


@cache
def _put_off() -> None:
    """Have AOTInductor's C++ compiled later, in contexts that ask for it."""
    from torch._inductor import config
    from torch._inductor.codecache import AotCodeCompiler
    from torch._inductor.virtualized import V

    at_once = AotCodeCompiler.compile
    settings: Any = config

    def compile_(cls: type[Any], /, graph: Any, wrapper: str, kernels: str, proxied: str | None, **options: Any) -> Any:
        if (waiting := _compiles.get()) is None:
            return at_once(graph, wrapper, kernels, proxied, **options)
        if proxied:
            raise Unsupported("it has ops that AOTInductor calls through their schema")
        if graph.constants:
            raise Unsupported("it holds values of tensors")
        debug = V.debug

        def later(folder: str) -> Any:
            with (
                V.set_graph_handler(graph),
                V.set_debug_handler(debug),
                settings.patch({"aot_inductor.output_path": folder}),
            ):
                return at_once(graph, wrapper, kernels, None, **options)

        waiting.append(later)
        return [""]

    torch_class: Any = AotCodeCompiler
    torch_class.compile = classmethod(compile_)
