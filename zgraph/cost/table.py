"""Time of each node of a graph: measured where there is a measurement, a roofline and alpha-beta models elsewhere."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from zgraph.cost.hardware import Hardware, read_text, shown
from zgraph.cost.memory import local_bytes
from zgraph.cost.network import COLLECTIVES, Network
from zgraph.cost.rest import UPDATE_PASSES
from zgraph.cost.work import attention_kernel, work
from zgraph.errors import HardwareError
from zgraph.ir import (
    OPS,
    Axis,
    Graph,
    Mesh,
    Node,
    TensorType,
    Type,
    model_axes,
    num_data_ranks,
    num_ranks,
    num_shards,
)
from zgraph.ir.axis_rules import axis_of
from zgraph.ir.codecs import HEAD_BYTES
from zgraph.ir.coded_rules import expected_bytes
from zgraph.ir.external_ops import MATMUL
from zgraph.ir.op_rows import Transfer
from zgraph.ir.ops import moved_bytes, outer_bytes
from zgraph.ir.ops import transfer as transfer_of
from zgraph.ir.ranked_rows import ROUNDS
from zgraph.ir.symbols import evaluate

Us = Annotated[float, Field(ge=0)]

OUTER = frozenset({"outer_all_to_all_start", "outer_all_gather_start"})
"""Collectives of the ranks that hold the same shard."""

MAX_BYTES = 64 << 20
"""Of a table's file."""


class AlphaBeta(BaseModel):
    """Alpha-beta model of a collective: latency and bandwidth, fitted to what was measured."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    latency_us: float = Field(ge=0)
    bytes_per_s: float = Field(gt=0, description="bytes that one rank sends")


class CostTable(BaseModel):
    """Costs of one kind of hardware, with measurements on top.

    Args:
        hardware: the profile that answers for whatever was not measured.
        per_host: ranks that share a host; 0 takes full hosts.
        ops: microseconds by `signature`.
        transfers: models by collective (all_gather, ...) or copy (offload, reload).
        groups: microseconds of the ways to run ops that can be one kernel, op by op ("aten"), as that ("kernel"), ...,
            by the `signature` of the kernel, behind that of the matmul before it where there is one.
        attention: the kernel that attention runs as, where it is not the one that the graph names.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    hardware: Hardware
    per_host: Annotated[int, Field(ge=0)] = 0
    ops: Mapping[str, Us] = {}
    transfers: Mapping[str, AlphaBeta] = {}
    groups: Mapping[str, Mapping[str, Us]] = {}
    attention: str = ""

    def group_us(self, key: str) -> Mapping[str, Us]:
        """Times of the ways to run a group: of this one, else of the one that differs least, and in sizes alone."""
        if key in self.groups:
            return self.groups[key]
        alike = [other for other in self.groups if _without_sizes(other) == _without_sizes(key)]
        nearest = min(alike, key=lambda other: (abs(math.log(_numel(other) / _numel(key))), other), default=None)
        return {} if nearest is None else self.groups[nearest]

    def node_us(self, graph: Graph, node: Node, hints: Mapping[str, int]) -> float:
        """Time of a node of the compute lane, in microseconds."""
        measured = self.ops.get(signature(node, hints)) if self.ops else None
        return measured if measured is not None else self.roofline_us(graph, node, hints)

    def roofline_us(self, graph: Graph, node: Node, hints: Mapping[str, int]) -> float:
        """The larger of computing and moving memory (Williams, Waterman, Patterson: "Roofline", 2009).

        The matmul rate falls for small ones: FLOP / (FLOP + half) of the best rate, and size / (size + half) by the
        smallest size. Attention has the rate of its kernel.
        """
        computing_us, moving_us = self.bounds_us(graph, node, hints)
        return self.hardware.device.launch_us + max(computing_us, moving_us) if computing_us or moving_us else 0.0

    def bounds_us(self, graph: Graph, node: Node, hints: Mapping[str, int]) -> tuple[float, float]:
        """Microseconds that a node computes, and that it moves memory; both 0 where it does neither, as a view."""
        done = work(graph, node)
        flop, num_bytes = evaluate(done.flop, hints), evaluate(done.num_bytes, hints)
        device = self.hardware.device
        share = device.fused_share if node.op.startswith("zgraph.") else device.memory_share
        moving = num_bytes / (device.memory_bytes_per_s * share)
        computing = 0.0
        if flop:
            share = self._matmul_share(node, evaluate(done.size, hints))
            computing = (flop / share + device.matmul_half_flop) / device.rate(done.dtype)
        if node.op in ROUNDS:  # what it sends is on its way while it computes
            sent = OPS[node.op].wire_bytes(node, graph.mesh)
            computing = max(computing, self.along(node, graph.mesh).direct_us(sent) / 1e6)
        return 1e6 * computing, 1e6 * moving

    def _matmul_share(self, node: Node, size: float) -> float:
        """The share of the best matmul rate that an op reaches."""
        device = self.hardware.device
        if kernel := attention_kernel(node):
            found = device.attention_rate(self.attention or kernel)
            if found is not None:
                best = found.backward if "backward" in node.op else found.forward
                return best * size / (size + found.half_sequence) if size else best
        share = device.sustained * (device.generated_matmul_rate or 1.0 if node.op == MATMUL else 1.0)
        return share * size / (size + device.matmul_half_dim) if size else share

    def update_us(self, master_bytes: float) -> float:
        """AdamW's update of masters on the device, in microseconds: as fast as its memory lets it."""
        device = self.hardware.device
        return 1e6 * UPDATE_PASSES * master_bytes / (device.memory_bytes_per_s * device.update_share)

    def start_us(self, start: Node, hints: Mapping[str, int]) -> float:
        """Time for the compute lane to hand a collective over, in microseconds; 0 where it was not measured."""
        return self.ops.get(signature(start, hints), 0.0) if self.ops else 0.0

    def transfer_us(self, graph: Graph, start: Node, hints: Mapping[str, int]) -> float:
        """Time of a collective or a copy on its lane once it has begun, in microseconds."""
        if OPS[start.op].lane != "comm":
            return self.copy_us(local_bytes(start.operands[0].type, graph.mesh, hints), moved(start).name)
        staged = self.copy_us(OPS[start.op].scratch_bytes(start, graph.mesh)) if _is_staged(start) else 0.0
        return staged + self._wire_us(graph, start)

    def copy_us(self, num_bytes: int, kind: str = "reload") -> float:
        """Time of a copy between the device and its host, in microseconds."""
        if line := self.transfers.get(kind):
            return line.latency_us + 1e6 * num_bytes / line.bytes_per_s
        link = self.hardware.host_link
        return link.latency_us + 1e6 * num_bytes / link.bytes_per_s

    @property
    def latency_bytes(self) -> float:
        """Bytes that a copy to the host moves in a time as long as its latency."""
        link = self.hardware.host_link
        return link.latency_us * link.bytes_per_s / 1e6

    def _wire_us(self, graph: Graph, start: Node) -> float:
        kind = moved(start).name
        if start.op in OUTER:
            outer = self._copies(graph.mesh)
            if kind not in COLLECTIVES:
                return outer.direct_us(OPS[start.op].wire_bytes(start, graph.mesh))
            return outer.quote(kind, outer_bytes(start, graph.mesh)).us
        if line := self.transfers.get(kind):
            return line.latency_us + 1e6 * OPS[start.op].wire_bytes(start, graph.mesh) / line.bytes_per_s
        network = self.along(start, graph.mesh)
        if kind not in COLLECTIVES:
            return network.direct_us(OPS[start.op].wire_bytes(start, graph.mesh))
        whole = expected_bytes(start, graph.mesh) or moved_bytes(start, graph.mesh)
        if moved(start).exchanges:
            return network.quote(kind, whole).us
        if moved(start).is_shared:
            everyone = (*model_axes(graph.mesh), Axis("all", num_data_ranks(graph.mesh)))
            return self.network(everyone).quote(kind, whole).us
        us = network.quote(kind, whole).us
        if expected_bytes(start, graph.mesh):  # heads travel before
            us += network.quote(kind, graph.num_shards * HEAD_BYTES).us
        if start.op == "reduce_scatter_start" and num_data_ranks(graph.mesh) > graph.num_shards:
            us += self._copies(graph.mesh).quote("all_reduce", whole / graph.num_shards).us
        return us

    def gather_alpha_beta(self, mesh: Mesh) -> AlphaBeta:
        """Alpha-beta model of an all-gather: latency and bandwidth in the bytes that one rank sends.

        It is measured, or else a line through two sizes of the network's model.
        """
        if line := self.transfers.get("all_gather"):
            return line
        network, large = self.network(mesh), 1e9
        latency_us, large_us = network.quote("all_gather", 0.0).us, network.quote("all_gather", large).us
        sent = large * (network.num_ranks - 1) / network.num_ranks
        return AlphaBeta(latency_us=latency_us, bytes_per_s=1e6 * sent / (large_us - latency_us))

    def network(self, mesh: Mesh) -> Network:
        """The links among the ranks of one shard axis."""
        count, beside = num_shards(mesh), num_ranks(model_axes(mesh))
        if beside > 1:  # ranks of a model axis are neighbours
            each = max((self.per_host or self.hardware.devices_per_host) // beside, 1)
            return Network(self.hardware, count, min(each, count) if count % min(each, count) == 0 else 1)
        if self.per_host:
            return Network(self.hardware, count, min(self.per_host, count))
        return Network.of(self.hardware, count)

    def along(self, start: Node, mesh: Mesh) -> Network:
        """The links among the ranks that a collective is of: those of its model axis, or of one shard axis."""
        if start.option("axis") is None:
            return self.network(mesh)
        _, count = axis_of(start, mesh)
        each = min(self.per_host or self.hardware.devices_per_host, count)
        return Network(self.hardware, count, each if count % each == 0 else 1)

    def _copies(self, mesh: Mesh) -> Network:
        """The links among the ranks that hold the same shard."""
        count = num_data_ranks(mesh) // num_shards(mesh)
        beside = num_shards(mesh) * num_ranks(model_axes(mesh))
        each = max((self.per_host or self.hardware.devices_per_host) // beside, 1)
        return Network(self.hardware, count, each if count % each == 0 else 1)


def moved(start: Node) -> Transfer:
    """Transfer that a start begins."""
    found = transfer_of(start)
    assert found is not None, f"{start.op} moves nothing"
    return found


def _is_staged(start: Node) -> bool:
    """Whether a gather takes its shards from the host."""
    return moved(start).brings and start.operands[0].tensor.is_on_host


def signature(node: Node, hints: Mapping[str, int]) -> str:
    """Key of a node's measurement: the op, the types of its operands with sizes as numbers, and its kernel."""
    kernels = [f"; {a}" for a in node.args if isinstance(a, str) and node.op.startswith("zgraph.")]
    return f"{node.op}({', '.join(_text(v.type, hints) for v in node.operands)}{''.join(kernels)})"


def _text(kind: Type, hints: Mapping[str, int]) -> str:
    if not isinstance(kind, TensorType):
        return str(kind)
    shape = "x".join(str(evaluate(d, hints)) for d in kind.shape)
    strides = "" if kind.strides is None else "|" + "x".join(str(evaluate(d, hints)) for d in kind.strides)
    return f"{kind.dtype.value}[{shape}{strides}]"


_SIZES = re.compile(r"\[([0-9x]*)(?:\|[0-9x]*)?\]")
"""Sizes and strides of an operand in a signature."""


def _without_sizes(key: str) -> str:
    return _SIZES.sub("[]", key)


def _numel(key: str) -> int:
    """Numbers in all operands of a signature, at least 1."""
    shapes = (found[1].split("x") if found[1] else [] for found in _SIZES.finditer(key))
    return max(sum(math.prod(map(int, sizes)) for sizes in shapes), 1)


def save_table(table: CostTable, path: Path) -> None:
    """Write a table that `load_table` reads back."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(table.model_dump_json(indent=1))


def load_table(path: Path) -> CostTable:
    """Read a table.

    Raises:
        HardwareError: the file is missing or no cost table.
    """
    try:
        return CostTable.model_validate_json(read_text(path, MAX_BYTES))
    except OSError as error:
        raise HardwareError(f"cannot read the cost table {shown(path)}: {error.strerror}") from None
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()[:5])
        raise HardwareError(f"{shown(path)} is no cost table: {problems}; write one with zgraph.profile") from None
    except ValueError as error:
        raise HardwareError(f"{shown(path)} is no cost table: {error}; write one with zgraph.profile") from None
