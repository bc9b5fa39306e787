"""Higher-order ops that AOTAutograd makes of ops which write to their arguments, as plain ops again."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch._higher_order_ops import auto_functionalize
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

_WRITTEN_OUT: dict[Any, Any] = {
    torch.ops.higher_order.auto_functionalized: auto_functionalize.auto_functionalized_dense,
    torch.ops.higher_order.auto_functionalized_v2: auto_functionalize.auto_functionalized_v2_dense,
}


def write_out_mutations(gm: fx.GraphModule, fake_mode: Any) -> None:
    """Replace each functionalised custom op by clones of what it writes to and the op itself, which writes to these."""
    for node in list(gm.graph.nodes):
        if node.target in _WRITTEN_OUT and isinstance(node.args[0], torch._ops.OpOverload):
            _write_out(gm.graph, node, fake_mode)


def _write_out(graph: fx.Graph, node: fx.Node, fake_mode: Any) -> None:
    leaves, spec = pytree.tree_flatten((node.args, dict(node.kwargs)))
    read = [leaf for leaf in leaves if isinstance(leaf, fx.Node)]

    def plain(*given: Any) -> Any:
        values = iter(given)
        filled = [next(values) if isinstance(leaf, fx.Node) else leaf for leaf in leaves]
        args, kwargs = pytree.tree_unflatten(filled, spec)
        return _WRITTEN_OUT[node.target](*args, **kwargs)

    with fake_mode:
        traced = make_fx(plain)(*(leaf.meta["val"] for leaf in read)).graph
    nodes: dict[fx.Node, fx.Node] = dict(zip(traced.find_nodes(op="placeholder"), read, strict=True))
    with graph.inserting_before(node):
        for plain_node in traced.nodes:
            if plain_node.op == "call_function":
                nodes[plain_node] = graph.node_copy(plain_node, nodes.__getitem__)
                nodes[plain_node].meta = {**node.meta, "val": plain_node.meta.get("val")}
    results: Any = traced.output_node().args[0]
    for item in list(node.users):
        item.replace_all_uses_with(nodes[results[item.args[1]]])
        graph.erase_node(item)
    graph.erase_node(node)
