"""`zgraph.search_placements`: how the parameters of a model are best cut for tensor parallelism, before anything is."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text
from torch import nn

from zgraph.bridge.dtypes import Dtype, as_dtype_or_none
from zgraph.bridge.target import Target, cost_table
from zgraph.capture import trace
from zgraph.capture.layers import RepeatedLayers, kinds_and_shapes, shortened, stacks
from zgraph.cost import CostTable
from zgraph.errors import UsageError
from zgraph.ir import Axis, Shard
from zgraph.passes import Context, parse_recipe
from zgraph.passes.placements import Search
from zgraph.viz import as_text

FEW_LAYERS = 2
"""Layers of a stack that stand for all."""

TOKENS = 2048
"""Tokens of the row that a language model is searched with where none is given."""


@dataclass(frozen=True)
class FoundPlacements(Mapping[str, str]):
    """Result of `zgraph.search_placements`: a mapping from parameters to placements. Prints as a table.

    Args:
        model: the name of the model's class.
        num_ranks: ranks that compute together.
        hardware: the name of the hardware.
        places: of the parameters that are cut, by name.
        total_us: time of a step of the layers that were searched, nothing hidden behind anything else.
        bound_us: what no placement of them goes below.
        sent_bytes: bytes that a rank sends along the axis in a step of these layers.
        searched: the parameters of these layers, each with its placement and its next best, if that was asked for.
    """

    model: str
    num_ranks: int
    hardware: str
    places: Mapping[str, str]
    total_us: float
    bound_us: float
    sent_bytes: int
    searched: tuple[tuple[str, str, str], ...] = field(default=(), compare=False)

    def __getitem__(self, name: str) -> str:
        return self.places[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.places)

    def __len__(self) -> int:
        return len(self.places)

    @property
    def gap(self) -> float:
        """How far the time is above its lower bound, as a share of that."""
        return max(self.total_us / self.bound_us - 1, 0.0) if self.bound_us else 0.0

    @property
    def summary(self) -> str:
        """The time of what was searched, its lower bound and the gap between them, and the bytes sent, in words."""
        took = f"{self.total_us / 1e3:,.2f} ms, lower bound {self.bound_us / 1e3:,.2f} ms, gap {self.gap:.2%}"
        return f"layers that were searched: {took}, {self.sent_bytes / 2**20:,.1f} MiB sent by a rank"

    def __rich__(self) -> RenderableType:
        title = f"{self.model} over {self.num_ranks} ranks of {self.hardware}"
        table = Table(title=title, title_justify="left")
        for column in ("parameter", "placement", "next best"):
            table.add_column(column)
        for row in self.searched:
            table.add_row(*row)
        return Group(table, Text(self.summary))

    def __str__(self) -> str:
        return as_text(self, width=150)


def search_placements(
    model: nn.Module,
    *args: Any,
    tensor_parallel: int,
    hardware: Target | None = None,
    num_ranks: int | None = None,
    param_dtype: Dtype | None = None,
    explain: bool = False,
    **kwargs: Any,
) -> FoundPlacements:
    """Searches for the placements of a model's parameters with which a step takes the least time, as a program.

    Time is that of every op on its part and of every collective, by the costs of the hardware, with nothing hidden.
    Values between the parameters are searched along with them: sequences may be cut. Repeated layers are placed alike,
    and captured twice only. The solver is HiGHS (Huangfu and Hall, 2018).

    Args:
        model: a module, on the meta device or any other; it is not changed.
        args, kwargs: what its forward is called with on one rank; only shapes and dtypes matter.
        tensor_parallel: ranks that compute each op together.
        hardware: as in `zgraph.compile`.
        num_ranks: all ranks; by default all devices of the hardware, or those that compute together.
        param_dtype: dtype to compute in, as in `zgraph.compile`.
        explain: whether to search for the next best placement of each parameter too.

    Returns:
        What `zgraph.compile(model, tensor_parallel=..., placements=...)` takes.

    Raises:
        UsageError: the numbers of ranks do not go together.
        HardwareError: there is no such hardware.
        CaptureError, GraphBreakError: as `zgraph.compile` does at the first call.
    """
    if isinstance(tensor_parallel, bool) or not isinstance(tensor_parallel, int) or tensor_parallel < 2:
        raise UsageError(f"tensor_parallel must be a number of ranks, 2 or more, not {tensor_parallel!r}")
    costs = cost_table(hardware, torch.device("cpu"))
    count = max(costs.hardware.num_devices, tensor_parallel) if num_ranks is None else num_ranks
    if count < 1 or count % tensor_parallel:
        raise UsageError(
            f"tensor_parallel={tensor_parallel} does not divide {count} ranks; take num_ranks= of a multiple of it"
        )
    return searched(model, args, kwargs, costs, tensor_parallel, count // tensor_parallel, param_dtype, explain=explain)


def searched(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    costs: CostTable,
    tensor: int,
    data: int,
    param_dtype: Dtype | None,
    *,
    explain: bool = False,
) -> FoundPlacements:
    """The search of `search_placements` for `tensor` ranks that compute together, and `data` such groups."""
    search, found = search_of(model, args, kwargs, costs, tensor, data, param_dtype)
    best = search.found
    places = {entry.target: best.places[entry.value.name] for entry in search.space.graph.params}
    named = {name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    standing = [(f"{name}.", stack) for name, module in named.items() for stack in found if stack.layers is module]
    every = ((name, places.get(_stand_in(name, standing))) for name, _ in model.named_parameters())
    rows = []
    for entry in search.space.graph.params:
        others = search.alternatives(entry.value.name)[:1] if explain else ()
        told = f"{others[0].place}: {others[0].more_us / 1e3:,.3f} ms more" if others else ""
        rows.append((entry.target, str(places[entry.target]), told))
    return FoundPlacements(
        type(model).__name__,
        tensor,
        costs.hardware.name,
        {name: str(place) for name, place in every if isinstance(place, Shard)},
        best.total_us,
        best.bound_us,
        best.sent_bytes,
        tuple(rows),
    )


def search_of(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    costs: CostTable,
    tensor: int,
    data: int,
    param_dtype: Dtype | None,
) -> tuple[Search, list[RepeatedLayers]]:
    """The program of a search, not solved yet, and the stacks of which a few layers stand for all."""
    found = [s for s in stacks(model, kinds_and_shapes, (nn.ModuleList,)) if len(s.layers) > s.length(FEW_LAYERS)]
    with shortened({s.layers: s.length(FEW_LAYERS) for s in found}):
        captured = trace(model, *args, param_dtype=as_dtype_or_none(param_dtype, "param_dtype"), **kwargs)
    axes = (Axis("tensor", tensor), Axis("shard", data))
    context = Context(mesh=axes, costs=costs)
    return Search(parse_recipe("canonicalize").run(captured, context), axes[0], context, {}), found


def _stand_in(name: str, standing: list[tuple[str, RepeatedLayers]]) -> str:
    """The parameter of the captured layers that stands for one of the model."""
    for prefix, stack in standing:
        if (number := re.match(rf"{re.escape(prefix)}([0-9]+)\.", name)) is not None:
            layer, length = int(number[1]), stack.length(FEW_LAYERS)
            if layer >= length:
                layer = length - stack.period + (layer - length) % stack.period
            return f"{prefix}{layer}.{name[number.end() :]}"
    return name


def usual_inputs(model: nn.Module) -> dict[str, torch.Tensor]:
    """Inputs that a language model of transformers is searched with where no inputs are given: one row of tokens.

    Raises:
        UsageError: it is none.
    """
    config = getattr(model, "config", None)
    if getattr(model, "main_input_name", "") != "input_ids" or not hasattr(config, "vocab_size"):
        raise UsageError(
            f'placements="auto" knows no inputs of {type(model).__name__}: search with your own, '
            "placements=zgraph.search_placements(model, batch, tensor_parallel=2), or say how its parameters are cut"
        )
    tokens = min(TOKENS, getattr(config, "max_position_embeddings", None) or TOKENS)
    row = torch.zeros(1, tokens, dtype=torch.int64, device="meta")
    return {"input_ids": row, "labels": row}
