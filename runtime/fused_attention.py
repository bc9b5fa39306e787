"""Attention by functions as one kernel on GPUs, which Inductor makes. What torch runs by itself is dense."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.utils import _pytree as pytree

from zgraph.bridge.private_inductor import inductor
from zgraph.errors import in_one_line
from zgraph.ir import HIGHER_ORDER, Graph, Node, print_graph
from zgraph.ir.graph import graphs_in

ATTENTIONS = (f"{HIGHER_ORDER}.flex_attention.default", f"{HIGHER_ORDER}.flex_attention_backward.default")

MAX_SIZES = 8
"""Sizes that one kernel is compiled for; others are computed by torch's dense kernel."""


class FusedAttention:
    """Calls of attention by the same functions: compiled for each sizes when these first come.

    Where Inductor cannot compile them, torch's dense kernel computes the same, and a warning says so.

    Args:
        op: the dense kernel.
        wanted: which results are read.
    """

    def __init__(self, op: Callable[..., Sequence[Any]], wanted: Sequence[bool]) -> None:
        self.op, self.wanted = op, wanted
        self.compiled: dict[Any, Callable[..., Sequence[Any]]] = {}

    def __call__(self, *args: Any) -> Sequence[Any]:
        leaves, spec = pytree.tree_flatten(args)
        at = [i for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)]
        tensors = [leaves[i] for i in at]
        kinds = tuple((t.shape, t.stride(), t.dtype, t.device) for t in tensors)
        key = (kinds, tuple(leaf for leaf in leaves if isinstance(leaf, int | float | str | None)))
        run = self.compiled.get(key)
        if run is None:
            if len(self.compiled) == MAX_SIZES:
                _tell(f"it came with more than {MAX_SIZES} sizes; pad inputs to few")
            run = self._compile(leaves, spec, at) if len(self.compiled) < MAX_SIZES else self._dense
            self.compiled[key] = run
        return run(args, tensors)

    def _dense(self, args: Sequence[Any], _tensors: list[torch.Tensor]) -> Sequence[Any]:
        return self.op(*args)

    def _compile(self, leaves: Sequence[Any], spec: Any, at: Sequence[int]) -> Callable[..., Sequence[Any]]:
        places = {i: position for position, i in enumerate(at)}

        def of_tensors(*given: torch.Tensor) -> list[torch.Tensor]:
            filled = [given[places[i]] if i in places else leaf for i, leaf in enumerate(leaves)]
            made = self.op(*pytree.tree_unflatten(filled, spec))
            return [result for result, wanted in zip(made, self.wanted, strict=True) if wanted]

        try:
            compiled = inductor(of_tensors, [leaves[i] for i in at])
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            _tell(f"Inductor cannot compile it ({in_one_line(error)})")
            return self._dense

        def run(_args: Sequence[Any], tensors: list[torch.Tensor]) -> list[Any]:
            made = iter(compiled(tensors))
            return [next(made) if wanted else None for wanted in self.wanted]

        return run


class FusedAttentions:
    """The attention of one program. Layers that call the same functions share what is compiled."""

    def __init__(self) -> None:
        self._found: dict[Any, FusedAttention] = {}

    def of(self, node: Node, op: Callable[..., Sequence[Any]], users: Mapping[str, Any], kept: frozenset[str]) -> Any:
        """Callable that runs a node.

        Args:
            node: attention by functions.
            op: the dense kernel.
            users: who reads each value of the graph.
            kept: values that the graph returns.
        """
        wanted = tuple(r.name in users or r.name in kept for r in node.results)
        key = (node.op, wanted, tuple(_text(graph) for graph in graphs_in(node.args)))
        return self._found.setdefault(key, FusedAttention(op, wanted))


def _text(graph: Graph) -> str:
    return print_graph(replace(graph, name=""), origins=False)


def _tell(why: str) -> None:
    warnings.warn(f"attention by functions takes the memory of all scores: {why}", stacklevel=3)
