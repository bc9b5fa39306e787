"""The reference interpreter: any graph, before or after any pass, on N simulated ranks in one process.

It is the meaning of the IR: plain torch, one node after another, every rank in step, nothing overlapped. Values are
held as each rank would see them: a sharded value is its list of padded chunks; one that varies, or of which a reduction
is pending, its list of own values. Ranks are numbered row by row of the mesh: those that differ along data axes alone
follow one another.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch

from zgraph.bridge import coded_ranks, float8, ring
from zgraph.bridge import processor_attention as _attention  # noqa: F401 - registers kernels
from zgraph.bridge.aten import TO_TORCH, resolve, to_torch
from zgraph.bridge.parts import from_chunks, moved, padded_chunks, part_of, together, total
from zgraph.bridge.ranked_ops import runs
from zgraph.bridge.routes import on_ranks
from zgraph.bridge.sized_ranks import SizedRanks, is_sized
from zgraph.errors import InterpretError
from zgraph.ir import (
    Axis,
    DType,
    ExternalOp,
    Graph,
    Input,
    Mesh,
    Node,
    Output,
    TensorType,
    data_axes,
    model_axes,
    num_data_ranks,
    num_ranks,
    num_shards,
)
from zgraph.ir.axis_rules import axis_of, changed_axis
from zgraph.ir.layout import bucket_layout
from zgraph.ir.rules import PARTS, ROUTED
from zgraph.ir.rules.ring import RING

Ranks = list[Any]
"""One value as each rank has it."""

_CPU = torch.device("cpu")


class Caller(Protocol):
    """Runs ops that are not zgraph's own, on one rank. It may seed torch's generator, which is put back in the end."""

    def __call__(
        self, node: Node, row: ExternalOp, rank: int, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> Any: ...


class Torch:
    """Runs them as torch does; rank r draws its random numbers from `seed + r`."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.states: dict[int, torch.Tensor] = {}

    def __call__(self, node: Node, row: ExternalOp, rank: int, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        if not row.random:
            return resolve(node.op)(*args, **kwargs)
        if rank not in self.states:
            self.states[rank] = torch.Generator().manual_seed(self.seed + rank).get_state()
        torch.random.set_rng_state(self.states[rank])
        made = resolve(node.op)(*args, **kwargs)
        self.states[rank] = torch.random.get_rng_state()
        return made


class Interpreter:
    """Runs graphs on simulated ranks. What it holds and keeps lives on from one run to the next.

    Args:
        num_ranks: how many; 0 takes the graph's mesh.
        seed: rank r draws its random numbers from `seed + r`.
        caller: runs ops that are not zgraph's own, if not as torch does.

    Attributes:
        held: the gradients of earlier micro-steps that `accumulate` adds, by the name of the parameter.
        syncs: whether the run ends a step. Where it does not, gathers with `keep` leave what they bring in `kept`.
        kept: what gathers with `keep` take in the place of gathering again.
        rests: what codes have left out so far, by the parameters, and by whether it is of an owner's second code.
    """

    def __init__(self, num_ranks: int = 0, seed: int = 0, caller: Caller | None = None) -> None:
        self.num_ranks, self.seed, self.caller = num_ranks, seed, caller
        self.held: dict[str, Ranks] = {}
        self.kept: dict[str, Ranks] = {}
        self.rests: dict[tuple[tuple[str, ...], bool], Ranks] = {}
        self.sized = SizedRanks()
        self.syncs = True

    def run(
        self, graph: Graph, inputs: Mapping[str, Any], resident: Mapping[str, Ranks] | None = None
    ) -> list[Ranks | None]:
        """The outputs of `graph`, each as every rank has it (None where there is none).

        Args:
            graph: what to run.
            inputs: by value name, a whole tensor (or number) that every rank sees, or a list with one a rank. Whole
                tensors are cut into shards where the graph has an input sharded.
            resident: inputs whose memory outlives the run, by value name, as each rank holds them at rest: what is
                written to them stays. The others are copied.

        Raises:
            InterpretError: an input is missing or has another shape than the graph says.
        """
        mesh = graph.mesh or (Axis("all", self.num_ranks or 1),)
        if self.num_ranks not in (0, num_ranks(mesh)):
            raise InterpretError(f"the graph is for {graph.num_ranks} ranks, not {self.num_ranks}")
        at_rest, caller = resident or {}, self.caller or Torch(self.seed)
        env = {i.value.name: at_rest.get(i.value.name) or _placed(i, inputs, mesh) for i in graph.inputs}
        returned = graph.output_names
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            for position, node in enumerate(graph.nodes):
                operands = [env[v.name] for v in node.operands]
                for name, value in zip(
                    (r.name for r in node.results),
                    self._execute(graph, node, operands, env, mesh, caller),
                    strict=True,
                ):
                    env[name] = value
                for name in {v.name for v in (*node.operands, *node.results)} - returned:
                    if graph.users.get(name, (position,))[-1] == position:
                        del env[name]
        return [None if o.value is None else env[o.value.name] for o in graph.outputs]

    def _execute(
        self, graph: Graph, node: Node, operands: list[Ranks], env: Mapping[str, Ranks], mesh: Mesh, caller: Caller
    ) -> Sequence[Ranks]:
        if node.op == "all_gather_start" and node.option("keep"):
            return self._gather(node, operands, mesh)
        if is_sized(node):
            return [self.sized.run(node, operands[0], mesh)]
        if rule := RULES.get(node.op):
            return rule(node, operands, mesh)
        if node.op == "encode":
            return [coded_ranks.encode(node, operands[0], mesh, self.rests)]
        if node.op == "release":
            return self._release(operands[0])
        if node.op == "accumulate":
            return [self._accumulate(node, operands[0])]
        row = graph.foreign.get(node.op)
        if row is None:
            raise InterpretError(f"the graph does not declare {node.op}: it needs a line: op {node.op}")
        by_rank: list[list[Any]] = []
        for rank in range(num_ranks(mesh)):
            if row.random and rank >= num_data_ranks(mesh):  # ranks along a model axis draw the same
                by_rank.append([_cloned(made) for made in by_rank[rank % num_data_ranks(mesh)]])
                continue
            own = {v.name: env[v.name][rank] for v in node.operands}
            args = [to_torch(a, _CPU, lambda v: own[v.name]) for a in node.args]  # noqa: B023 - used at once
            kwargs = {k: to_torch(a, _CPU, lambda v: own[v.name]) for k, a in node.kwargs}  # noqa: B023
            made = caller(node, row, rank, args, kwargs)
            by_rank.append(list(made) if row.multi else [made])
        return [[ranks[i] for ranks in by_rank] for i in range(len(node.results))]

    def _gather(self, node: Node, operands: list[Ranks], mesh: Mesh) -> Sequence[Ranks]:
        """Results of a gather: those that an earlier micro-step kept, or else the shards put together."""
        names = [r.name for r in node.results]
        if not self.kept.keys() >= set(names):
            made = _reshard(node, operands, mesh)
            if self.syncs:
                return made
            self.kept.update(zip(names, made, strict=True))
        return [self.kept[name] for name in names]

    def _release(self, released: Ranks) -> Sequence[Ranks]:
        """Poison what is released, so that whoever reads it after all gets nonsense; but not what is kept."""
        kept = {t.untyped_storage().data_ptr() for t in itertools.chain(*self.kept.values())}
        for tensor in released:
            if tensor.untyped_storage().data_ptr() not in kept:
                tensor.fill_(torch.nan if tensor.is_floating_point() else -1)
        return []

    def _accumulate(self, node: Node, gradients: Ranks) -> Ranks:
        held = self.held.pop(str(node.option("target")), None)
        return gradients if held is None else [h + g for h, g in zip(held, gradients, strict=True)]


def whole(output: Output, ranks: Ranks, count: int = 0) -> Ranks:
    """An output's value as whole tensors: the shards put together again, or each rank's own.

    Args:
        output: of the graph that made it.
        ranks: the value.
        count: how many shards there are, if not as many as ranks.
    """
    kind = output.value.type if output.value is not None else None
    if isinstance(kind, TensorType) and kind.is_sharded:
        count = count or len(ranks)
        joined = [from_chunks(ranks[first : first + count], kind) for first in range(0, len(ranks), count)]
        return [joined[rank // count] for rank in range(len(ranks))]
    return ranks


def shards(wholes: Ranks, kind: TensorType, count: int) -> Ranks:
    """Each rank's padded chunk of its own whole tensor, or the tensor itself where the type is not sharded.

    Args:
        wholes: the whole tensor as each rank has it.
        kind: what it is at rest.
        count: how many shards there are.
    """
    if not kind.is_sharded:
        return wholes
    return [padded_chunks(tensor, kind, count)[rank % count] for rank, tensor in enumerate(wholes)]


def mean(values: Sequence[torch.Tensor]) -> torch.Tensor:
    """The mean in the order of the ranks: the meaning of every averaging collective."""
    return total(values) / len(values)


# --- values on ranks ---------------------------------------------------------------------------------------------


def _placed(entry: Input, inputs: Mapping[str, Any], mesh: Mesh) -> Ranks:
    name, kind = entry.value.name, entry.value.type
    if name not in inputs:
        raise InterpretError(f"the input %{name} is missing; the graph has {', '.join(sorted(inputs))} given")
    given, num_data = inputs[name], num_data_ranks(mesh)
    values = given if isinstance(given, list) else [given] * num_ranks(mesh)
    if len(values) == num_data:
        values = values * (num_ranks(mesh) // num_data)
    if len(values) != num_ranks(mesh):
        raise InterpretError(f"%{name} was given for {len(values)} ranks, not {num_ranks(mesh)}")
    if not isinstance(kind, TensorType):
        return values
    found: Ranks = []
    for number in range(num_ranks(mesh) // num_data):
        block = [part_of(value, kind, mesh, number) for value in values[number * num_data : (number + 1) * num_data]]
        for value in block:
            sizes = [d for d in kind.shape if isinstance(d, int)]
            if value.dim() != len(kind.shape) or (len(sizes) == len(kind.shape) and list(value.shape) != sizes):
                raise InterpretError(f"%{name} was given with shape {tuple(value.shape)}, but it is {kind}")
        if kind.is_sharded:
            found += _cut(block[0].to(TO_TORCH[kind.dtype]), kind, data_axes(mesh))
        else:
            found += [v.clone() for v in block]
    return found


def assembled(kind: TensorType, ranks: Ranks, mesh: Mesh) -> torch.Tensor:
    """The whole tensor that the first of those ranks that differ along model axes alone have together.

    Args:
        kind: its type.
        ranks: what each rank has.
        mesh: of the graph.
    """
    count = num_data_ranks(mesh)
    blocks = [ranks[first : first + count] for first in range(0, len(ranks), count)]
    parts = [from_chunks(b[: num_shards(mesh)], kind) if kind.is_sharded else b[0] for b in blocks]
    for axis, place in reversed(list(zip(model_axes(mesh), kind.placement, strict=False))):
        parts = [together(parts[first : first + axis.size], place) for first in range(0, len(parts), axis.size)]
    whole_tensor: torch.Tensor = parts[0]
    return whole_tensor


def _cloned(made: Any) -> Any:
    return made.clone() if isinstance(made, torch.Tensor) else made


def _cut(tensor: torch.Tensor, kind: TensorType, mesh: Mesh) -> Ranks:
    """The padded chunks of a whole tensor, one a rank: the same ones for all that differ in other axes only."""
    pieces = padded_chunks(tensor, kind, num_shards(mesh))
    return [pieces[rank % len(pieces)].clone() for rank in range(num_ranks(mesh))]


# --- zgraph's own ops --------------------------------------------------------------------------------------------

Rule = Callable[[Node, list[Ranks], Mesh], Sequence[Ranks]]


def _change(ranks: Ranks, old: TensorType, new: TensorType, mesh: Mesh) -> Ranks:
    """A value at another placement."""
    if old.placement == new.placement:
        return [r.clone() for r in ranks]
    if (index := changed_axis(old, new, mesh)) is not None:
        return moved(ranks, old, new, index, mesh)
    count, axes = num_data_ranks(mesh), data_axes(mesh)
    blocks = [ranks[first : first + count] for first in range(0, len(ranks), count)]
    return [rank for block in blocks for rank in _reduced(block, old, new, axes)]


def _reduced(ranks: Ranks, old: TensorType, new: TensorType, mesh: Mesh) -> Ranks:
    """A value at another placement along the data axes."""
    if old.is_sharded:
        count = num_shards(mesh)
        return [from_chunks(ranks[r - r % count : r - r % count + count], old) for r in range(len(ranks))]
    if old.reduction is None:
        raise InterpretError(f"nothing says how {old} becomes {new}: pending(%value, reduce=...) does")
    if old.reduction == "root":
        return [ranks[0].clone() for _ in ranks]
    divisor = old.divisor(axis.size for axis in mesh)
    reduced = total(ranks) if divisor == 1 else total(ranks) / divisor
    return _cut(reduced, new, mesh) if new.is_sharded else [reduced] * len(ranks)


def _reshard(node: Node, operands: list[Ranks], mesh: Mesh) -> Sequence[Ranks]:
    return [
        _change(ranks, v.tensor, r.tensor, mesh)
        for ranks, v, r in zip(operands, node.operands, node.results, strict=True)
    ]


def _same(node: Node, operands: list[Ranks], mesh: Mesh) -> Sequence[Ranks]:
    return operands


def _pack(node: Node, operands: list[Ranks], mesh: Mesh) -> Sequence[Ranks]:
    kinds = [v.tensor for v in node.operands]
    layout = bucket_layout(kinds, num_shards(mesh))
    sharded = kinds[0].is_sharded
    packed = []
    for rank in range(num_ranks(mesh)):
        bucket = operands[0][rank].new_zeros(1 if sharded else num_shards(mesh), layout.part_numel)
        for ranks, kind, offset, chunk in zip(operands, kinds, layout.offsets, layout.chunks, strict=True):
            rows = [ranks[rank]] if sharded else padded_chunks(ranks[rank], kind, num_shards(mesh))
            for row, piece in zip(bucket, rows, strict=True):
                row[offset : offset + chunk] = piece
        packed.append(bucket.view(-1))
    return [packed]


def _unpack(node: Node, operands: list[Ranks], mesh: Mesh) -> Sequence[Ranks]:
    kinds = [r.tensor for r in node.results]
    layout = bucket_layout(kinds, num_shards(mesh))
    members: list[Ranks] = []
    for kind, offset, chunk in zip(kinds, layout.offsets, layout.chunks, strict=True):
        if kind.is_sharded:
            members.append([bucket[offset : offset + chunk].clone() for bucket in operands[0]])
        else:
            spans = [b.view(num_shards(mesh), -1)[:, offset : offset + chunk] for b in operands[0]]
            members.append([from_chunks(list(span), kind) for span in spans])
    return members


def _cast(node: Node, operands: list[Ranks], mesh: Mesh) -> Sequence[Ranks]:
    dtype = node.option("dtype")
    assert isinstance(dtype, DType)
    return [[t.to(TO_TORCH[dtype], memory_format=torch.contiguous_format, copy=True) for t in operands[0]]]


def _exchange(node: Node, operands: list[Ranks], mesh: Mesh) -> Sequence[Ranks]:
    if node.option("axis") is not None:
        return _reshard(node, operands, mesh)
    return coded_ranks.exchange(node, operands, mesh)


def _copy(node: Node, operands: list[Ranks], mesh: Mesh) -> Sequence[Ranks]:
    return [[t.clone(memory_format=torch.contiguous_format) for t in operands[0]]]


def _ranked(node: Node, operands: list[Ranks], mesh: Mesh) -> Sequence[Ranks]:
    """An op that knows its rank along an axis."""
    index, size = axis_of(node, mesh)
    step = num_ranks(mesh[index + 1 :])
    made = [
        runs(node, _CPU, rank // step % size, size)(*(ranks[rank] for ranks in operands))
        for rank in range(num_ranks(mesh))
    ]
    return [list(ranks) for ranks in zip(*made, strict=True)] if len(node.results) > 1 else [made]


RULES: Mapping[str, Rule] = {
    "reshard": _reshard,
    "all_gather_start": _reshard,
    "reduce_scatter_start": _reshard,
    "all_reduce_start": _reshard,
    "broadcast_start": _reshard,
    "all_to_all_start": _exchange,
    **coded_ranks.RULES,
    **dict.fromkeys(("slice", "first_rank", "offload_start", "reload_start"), _reshard),
    **dict.fromkeys(PARTS.values(), _ranked),
    **dict.fromkeys(RING.values(), ring.on_ranks),
    **dict.fromkeys(ROUTED.values(), on_ranks),
    "wait": _same,
    "pending": _same,
    "pack": _pack,
    "unpack": _unpack,
    "cast": _cast,
    **dict.fromkeys(float8.PARTS, float8.on_ranks),
    "copy": _copy,
}

__all__ = ["RULES", "Caller", "Interpreter", "Ranks", "Torch", "assembled", "mean", "shards", "total", "whole"]
