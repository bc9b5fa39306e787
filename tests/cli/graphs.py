"""Long graphs, without a model."""

from functools import cache

from zgraph.ir import Graph, parse_graph

HEAD = """graph "long"
op aten.add.Tensor
op aten.mm.default
op aten.mul.Tensor
op aten.neg.default
op aten.tanh.default
param %w: f32[4, 4] "w"
input %x: f32[2, 4]
tangent %d: f32[2, 4]
"""
LAYER = """{phase} %{v}m{i}: f32[2, 4] = aten.mm.default(%{x}, %w)
{phase} %{v}t{i}: f32[2, 4] = aten.tanh.default(%{v}m{i})
{phase} %{v}s{i}: f32[2, 4] = {op}
{phase} %{v}y{i}: f32[2, 4] = aten.add.Tensor(%{v}s{i}, %{x})
"""


@cache
def long(num_layers: int = 250) -> Graph:
    """A forward and a backward of four nodes a layer; only one of all is a negation."""
    lines = [HEAD]
    for v, phase, x in (("", "fwd", "x"), ("b", "bwd", "d")):
        for i in range(num_layers):
            op = f"aten.mul.Tensor(%{v}t{i}, 0.5)" if (v, i) != ("b", 99) else f"aten.neg.default(%{v}t{i})"
            lines.append(LAYER.format(phase=phase, v=v, x=x, i=i, op=op))
            x = f"{v}y{i}"
        lines.append("")
    ends = f'return fwd output %y{num_layers - 1}\nreturn bwd grad "x" %by{num_layers - 1}\n'
    return parse_graph("".join(lines) + ends)
