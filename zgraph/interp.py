"""The reference interpreter: any graph, before or after any pass, on N simulated ranks in one process.

It is the meaning of the IR: plain torch, one node after another, every rank in step, nothing overlapped. Values are
held as each rank would see them: a sharded value is its list of padded chunks, a varying one its list of own values.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from zgraph.aten import TO_TORCH, resolve, to_torch
from zgraph.errors import InterpretError
from zgraph.ir import DType, Graph, Input, Node, Output, Shard, TensorType
from zgraph.ir.layout import bucket_layout, chunk_numel

Ranks = list[Any]
"""One value as each rank has it."""

_CPU = torch.device("cpu")


class Interpreter:
    """Runs graphs on simulated ranks.

    Args:
        num_ranks: how many; 0 takes the graph's mesh.
        seed: rank r draws its random numbers from `seed + r`.
    """

    def __init__(self, num_ranks: int = 0, seed: int = 0) -> None:
        self.num_ranks, self.seed = num_ranks, seed
        self.held: dict[str, Ranks] = {}

    def run(self, graph: Graph, inputs: Mapping[str, Any]) -> list[Ranks | None]:
        """The outputs of `graph`, each as every rank has it (None where there is none).

        Args:
            graph: what to run.
            inputs: by value name, a whole tensor (or number) that every rank sees, or a list with one a rank. Whole
                tensors are cut into shards where the graph has an input sharded.

        Raises:
            InterpretError: an input is missing or has another shape than the graph says.
        """
        num_ranks = self.num_ranks or graph.num_ranks
        if graph.mesh and graph.num_ranks != num_ranks:
            raise InterpretError(f"the graph is for {graph.num_ranks} ranks, not {num_ranks}")
        states = [torch.Generator().manual_seed(self.seed + rank).get_state() for rank in range(num_ranks)]
        env = {i.value.name: _placed(i, inputs, num_ranks) for i in graph.inputs}
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            for node in graph.nodes:
                operands = [env[v.name] for v in node.operands]
                for name, value in zip(
                    (r.name for r in node.results), self._execute(graph, node, operands, env, num_ranks, states),
                    strict=True,
                ):  # fmt: skip
                    env[name] = value
        return [None if o.value is None else env[o.value.name] for o in graph.outputs]

    def _execute(
        self, graph: Graph, node: Node, operands: list[Ranks], env: Mapping[str, Ranks], num_ranks: int,
        states: list[torch.Tensor],
    ) -> Sequence[Ranks]:  # fmt: skip
        if rule := RULES.get(node.op):
            return rule(node, operands, num_ranks)
        if node.op == "accumulate":
            return [self._accumulate(node, operands[0])]
        row = graph.foreign[node.op]
        function = resolve(node.op)
        by_rank = []
        for rank in range(num_ranks):
            if row.random:
                torch.random.set_rng_state(states[rank])
            own = {v.name: env[v.name][rank] for v in node.operands}
            args = [to_torch(a, _CPU, lambda v: own[v.name]) for a in node.args]  # noqa: B023 - used at once
            kwargs = {k: to_torch(a, _CPU, lambda v: own[v.name]) for k, a in node.kwargs}  # noqa: B023
            made = function(*args, **kwargs)
            if row.random:
                states[rank] = torch.random.get_rng_state()
            by_rank.append(list(made) if row.multi else [made])
        return [[by_rank[r][i] for r in range(num_ranks)] for i in range(len(node.results))]

    def _accumulate(self, node: Node, gradients: Ranks) -> Ranks:
        held = self.held.pop(str(node.option("target")), None)
        return gradients if held is None else [h + g for h, g in zip(held, gradients, strict=True)]


def whole(output: Output, ranks: Ranks) -> Ranks:
    """An output's value as whole tensors: the shards put together again, or each rank's own."""
    kind = output.value.type if output.value is not None else None
    if isinstance(kind, TensorType) and kind.placement and isinstance(kind.placement[0], Shard):
        return [_joined(ranks, kind)] * len(ranks)
    return ranks


def mean(values: Sequence[torch.Tensor]) -> torch.Tensor:
    """The mean in the order of the ranks: the meaning of every averaging collective."""
    total = values[0].clone()
    for value in values[1:]:
        total = total + value
    return total / len(values)


# --- values on ranks ---------------------------------------------------------------------------------------------


def _placed(entry: Input, inputs: Mapping[str, Any], num_ranks: int) -> Ranks:
    name, kind = entry.value.name, entry.value.type
    if name not in inputs:
        raise InterpretError(f"the input %{name} is missing; the graph has {', '.join(sorted(inputs))} given")
    given = inputs[name]
    values = given if isinstance(given, list) else [given] * num_ranks
    if len(values) != num_ranks:
        raise InterpretError(f"%{name} was given for {len(values)} ranks, not {num_ranks}")
    if not isinstance(kind, TensorType):
        return values
    for value in values:
        sizes = [d for d in kind.shape if isinstance(d, int)]
        if value.dim() != len(kind.shape) or (len(sizes) == len(kind.shape) and list(value.shape) != sizes):
            raise InterpretError(f"%{name} was given with shape {tuple(value.shape)}, but it is {kind}")
    if kind.placement and isinstance(kind.placement[0], Shard):
        return _cut(values[0].to(TO_TORCH[kind.dtype]), kind, num_ranks)
    return [v.clone() for v in values]


def _cut(tensor: torch.Tensor, kind: TensorType, num_ranks: int) -> Ranks:
    """The padded chunks of a whole tensor, one a rank."""
    chunk = chunk_numel(kind.shape, num_ranks)
    padded = tensor.new_zeros(chunk * num_ranks)
    padded[: tensor.numel()] = tensor.reshape(-1)
    return [padded[r * chunk : (r + 1) * chunk].clone() for r in range(num_ranks)]


def _joined(chunks: Ranks, kind: TensorType) -> torch.Tensor:
    """A whole tensor from its padded chunks."""
    sizes = [int(d) for d in kind.shape]
    return torch.cat(chunks)[: int(kind.numel)].view(sizes).clone()


# --- zgraph's own ops --------------------------------------------------------------------------------------------

Rule = Callable[[Node, list[Ranks], int], Sequence[Ranks]]


def _change(ranks: Ranks, old: TensorType, new: TensorType, root: bool, num_ranks: int) -> Ranks:
    """A value at another placement."""
    if isinstance(old.placement[0], Shard):
        return [_joined(ranks, old) for _ in range(num_ranks)]
    if root:
        return [ranks[0].clone() for _ in range(num_ranks)]
    average = mean(ranks)
    return _cut(average, new, num_ranks) if isinstance(new.placement[0], Shard) else [average] * num_ranks


def _reshard(node: Node, operands: list[Ranks], num_ranks: int) -> Sequence[Ranks]:
    root = node.option("reduce") == "root" or node.op == "broadcast_start"
    return [
        _change(ranks, v.tensor, r.tensor, root, num_ranks)
        for ranks, v, r in zip(operands, node.operands, node.results, strict=True)
    ]


def _same(node: Node, operands: list[Ranks], num_ranks: int) -> Sequence[Ranks]:
    return operands


def _pack(node: Node, operands: list[Ranks], num_ranks: int) -> Sequence[Ranks]:
    kinds = [v.tensor for v in node.operands]
    layout = bucket_layout(kinds, num_ranks)
    sharded = isinstance(kinds[0].placement[0], Shard)
    packed = []
    for rank in range(num_ranks):
        bucket = operands[0][rank].new_zeros(1 if sharded else num_ranks, layout.part_numel)
        for ranks, kind, offset, chunk in zip(operands, kinds, layout.offsets, layout.chunks, strict=True):
            rows = [ranks[rank]] if sharded else _cut(ranks[rank], kind, num_ranks)
            for row, piece in zip(bucket, rows, strict=True):
                row[offset : offset + chunk] = piece
        packed.append(bucket.view(-1))
    return [packed]


def _unpack(node: Node, operands: list[Ranks], num_ranks: int) -> Sequence[Ranks]:
    kinds = [r.tensor for r in node.results]
    layout = bucket_layout(kinds, num_ranks)
    members: list[Ranks] = []
    for kind, offset, chunk in zip(kinds, layout.offsets, layout.chunks, strict=True):
        if isinstance(kind.placement[0], Shard):
            members.append([bucket[offset : offset + chunk].clone() for bucket in operands[0]])
        else:
            spans = [b.view(num_ranks, -1)[:, offset : offset + chunk] for b in operands[0]]
            members.append([_joined(list(span), kind) for span in spans])
    return members


def _cast(node: Node, operands: list[Ranks], num_ranks: int) -> Sequence[Ranks]:
    dtype = node.option("dtype")
    assert isinstance(dtype, DType)
    return [[t.to(TO_TORCH[dtype], memory_format=torch.contiguous_format) for t in operands[0]]]


def _copy(node: Node, operands: list[Ranks], num_ranks: int) -> Sequence[Ranks]:
    return [[t.clone(memory_format=torch.contiguous_format) for t in operands[0]]]


def _release(node: Node, operands: list[Ranks], num_ranks: int) -> Sequence[Ranks]:
    """Poison what is released, so that whoever reads it after all gets nonsense."""
    for tensor in itertools.chain(*operands):
        tensor.fill_(torch.nan if tensor.is_floating_point() else -1)
    return []


RULES: Mapping[str, Rule] = {
    "reshard": _reshard, "all_gather_start": _reshard, "reduce_scatter_start": _reshard, "all_reduce_start": _reshard,
    "broadcast_start": _reshard, "wait": _same, "pack": _pack, "unpack": _unpack, "cast": _cast, "copy": _copy,
    "release": _release,
}  # fmt: skip

__all__ = ["RULES", "Interpreter", "mean", "whole"]
