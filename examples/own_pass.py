"""A pass of your own, from its definition to the report: docs/write-a-pass.md explains each step.

torchrun --nproc-per-node 2 examples/own_pass.py
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import nn

import zgraph
from zgraph.ir import Graph, Value
from zgraph.passes import Context, Pass


@zgraph.register_pass
@dataclass(frozen=True)
class Deduplicate(Pass):
    """Compute once what is computed twice from the same operands.

    fwd %a = aten.tanh.default(%x)          fwd %a = aten.tanh.default(%x)
    fwd %b = aten.tanh.default(%x)     ->   fwd %c = aten.add.Tensor(%a, %a)
    fwd %c = aten.add.Tensor(%a, %b)
    """

    name: ClassVar[str] = "deduplicate"

    def run(self, graph: Graph, context: Context) -> Graph:
        if any(row.writes for row in graph.foreign.values()):
            return graph  # an operand may have been written to in between
        first, same, nodes = {}, dict[str, Value](), []
        for node in graph.nodes:
            node = node.substitute(same)
            row, is_returned = graph.foreign.get(node.op), any(r.name in graph.output_names for r in node.results)
            key = (node.op, node.args, node.kwargs, node.phase)
            if row is not None and row.is_pure and not is_returned and key in first:
                same.update(zip((r.name for r in node.results), first[key].results, strict=True))
            else:
                first.setdefault(key, node)
                nodes.append(node)
        return replace(graph, nodes=tuple(nodes))


class Twice(nn.Module):
    """A model that computes the same thing twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.first(x)
        return self.last(torch.tanh(h) + h * torch.tanh(h)).square().mean()


def main() -> None:
    zgraph.init_distributed()
    torch.manual_seed(0)
    recipe = zgraph.recipe(3).replace("canonicalize,", "canonicalize,deduplicate,")
    model = zgraph.compile(Twice(), stage=3, passes=recipe, save="own_pass.zg")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for step in range(20):
        loss = model(torch.randn(8, 32))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 9 and rank() == 0:
            print(f"step {step + 1}: loss {loss.item():.4f}")
    if rank() == 0:
        print(zgraph.report(model))


def rank() -> int:
    """This process's rank; 0 without a launcher."""
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


if __name__ == "__main__":
    main()
