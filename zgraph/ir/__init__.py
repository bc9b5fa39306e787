"""The IR: typed values, one table of ops, immutable graphs, their text, and what makes one valid. No torch here."""

from zgraph.ir.builder import Builder
from zgraph.ir.graph import (
    Arg,
    ExternalOp,
    Graph,
    Input,
    InputKind,
    Node,
    Origin,
    Output,
    OutputKind,
    Phase,
    Token,
    Value,
)
from zgraph.ir.names import allow_namespace
from zgraph.ir.ops import OPS, Op
from zgraph.ir.parser import parse_graph
from zgraph.ir.plan import Instruction, Plan, Program
from zgraph.ir.printer import fingerprint, print_graph, print_node
from zgraph.ir.types import (
    DEVICE,
    HOST,
    Axis,
    DType,
    Mesh,
    NoneType,
    Partial,
    Placement,
    Reduction,
    Replicate,
    ScalarType,
    Shard,
    TensorType,
    Type,
    Varying,
    num_ranks,
    num_shards,
)
from zgraph.ir.verifier import verify

__all__ = [
    "DEVICE", "HOST", "OPS", "Arg", "Axis", "Builder", "DType", "ExternalOp", "Graph", "Input", "InputKind",
    "Instruction", "Mesh", "Node", "NoneType", "Op", "Origin", "Output", "OutputKind", "Partial", "Phase", "Placement",
    "Plan", "Program", "Reduction", "Replicate", "ScalarType", "Shard", "TensorType", "Token", "Type", "Value",
    "Varying", "allow_namespace", "fingerprint", "num_ranks", "num_shards", "parse_graph", "print_graph", "print_node",
    "verify",
]  # fmt: skip
