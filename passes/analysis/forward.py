"""The values that the backward needs of the forward, as one problem a block: keep a value, or compute it again.

A block is a layer of the model, or a region that the user put under `torch.utils.checkpoint`; identical blocks are
solved once (`blocks.py`). Values that one block makes and another reads are kept. Random ops are never run again, nor
is what reads a buffer that the forward changes, nor a collective: gathered parameters come from the backward's own
gathers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cache, cached_property
from itertools import pairwise

from zgraph.cost.memory import local_bytes
from zgraph.ir import Builder, Graph, Node, OutputKind, Phase, Type, Value
from zgraph.ir.aliases import Memory
from zgraph.ir.graph import map_values
from zgraph.ir.ops import OPS, is_pure, padded_bytes, views
from zgraph.passes.analysis.blocks import Block, Choice, Maker, frontier, within
from zgraph.passes.analysis.gathers import gathered, is_gather
from zgraph.passes.core.base import Context

MIN_NODES = 24
"""Parts of the model with fewer nodes are taken together with others as small beside them."""


class Forward:
    """The part of a graph's forward that the backward needs, as one problem a block.

    Args:
        graph: a placed graph, not lowered yet.
        context: costs, and sizes for symbols.
        made_by: the pass that asks.
    """

    def __init__(self, graph: Graph, context: Context, made_by: str = "recompute") -> None:
        self.graph, self.context, self.made_by = graph, context, made_by
        self.memory = Memory(graph)
        self.nodes = graph.phase_nodes(Phase.forward)
        self.position = {r.name: p for p, n in enumerate(self.nodes) for r in n.results}
        self.needed = self._needed()
        self.there = self._there_anyhow()
        self.again = _gathers_again(graph)
        self.changed = {o.target for o in graph.outputs if o.kind is OutputKind.mutation}
        self.parts = self._parts()
        self.part_of = {p: number for number, part in enumerate(self.parts) for p in part}
        self.crossing = self._crossing()

    @cached_property
    def blocks(self) -> list[tuple[Block, tuple[str, ...]]]:
        """The problems, each with the names of its values."""
        return [self._block(number) for number in range(len(self.parts))]

    @cached_property
    def us(self) -> float:
        """Duration of the whole step in microseconds, with nothing computed again."""
        return self._us(self.graph.nodes)

    @cached_property
    def hidden_bytes(self) -> int:
        """Bytes that the link to the host carries while the forward computes."""
        return int(self._us(self.nodes) / 1e6 * self.context.costs.hardware.host_link.bytes_per_s)

    def _us(self, nodes: Iterable[Node]) -> float:
        costs, hints = self.context.costs, self.context.hints
        return sum(costs.node_us(self.graph, node, hints) for node in nodes)

    # --- the problem ---------------------------------------------------------------------------------------------

    def _needed(self) -> frozenset[str]:
        """Values of the forward that the backward reads."""
        later = (v.name for n in self.graph.nodes if n.phase is not Phase.forward for v in n.operands)
        return frozenset(name for name in later if name in self.position)

    def _there_anyhow(self) -> frozenset[str]:
        """Values that live until the backward whatever is chosen, or that come from a gather of the backward."""
        late = {o.value.name for o in self.graph.outputs if o.phase is not Phase.forward and o.value is not None}
        return frozenset(late | {r.name for n in self.nodes if is_gather(self.graph, n) for r in n.results})

    def _parts(self) -> list[list[int]]:
        """Positions of the forward's nodes, one list a block: a layer, a marked region, or small parts together."""
        runs: list[list[int]] = []
        for position, node in enumerate(self.nodes):
            before = self.nodes[position - 1] if position else None
            is_same_region = before is not None and 0 < node.checkpoint == before.checkpoint
            if before is None or (node.origin.layer != before.origin.layer and not is_same_region):
                runs.append([])
            runs[-1].append(position)
        parts: list[list[int]] = []
        for run in runs:
            if parts and len(parts[-1]) < MIN_NODES > len(run):
                parts[-1].extend(run)
            else:
                parts.append(run)
        return parts

    def _crossing(self) -> frozenset[str]:
        """Values that a block makes, another reads, and the backward needs: they are kept."""
        found = set()
        for position, node in enumerate(self.nodes):
            for value in node.operands:
                if value.name in self.position and self.part_of[self.position[value.name]] != self.part_of[position]:
                    found.add(value.name)
        roots = {root for name in self.needed & found for root in self.memory.roots(name)}
        return frozenset(name for name in self.position if self.memory.roots(name) <= roots)

    def _block(self, number: int) -> tuple[Block, tuple[str, ...]]:
        """A block, and the names of its values."""
        names: dict[str, int] = {}
        makers: list[Maker] = []
        may_keep: list[bool] = []

        def numbered(name: str, keepable: bool) -> int:
            if name not in names:
                names[name] = len(names)
                may_keep.append(keepable)
            return names[name]

        for position in self.parts[number]:
            node = self.nodes[position]
            reads = tuple(
                numbered(v.name, True) for v in node.operands if v.name in self.position and not self._is_there(v.name)
            )
            is_view = bool(views(self.graph, node))
            runs_again = self._runs_again(node)
            keepable = not self._is_inside_region(node) or not runs_again
            made = tuple(
                numbered(r.name, keepable and not (is_view and runs_again))
                for r in node.results
                if not self._is_there(r.name)
            )
            if made:
                makers.append(Maker(self._again_us(node), tuple(dict.fromkeys(reads)), made, runs_again))
        num_bytes = tuple(self._bytes(name) for name in names)
        needed = frozenset(
            n for name, n in names.items() if name in self.needed and self.part_of[self.position[name]] == number
        )
        return Block(num_bytes, tuple(may_keep), tuple(makers), needed), tuple(names)

    def _is_there(self, name: str) -> bool:
        return name in self.there or name in self.crossing

    def _runs_again(self, node: Node) -> bool:
        if not is_pure(self.graph, node) or (node.op in OPS and not OPS[node.op].recomputable):
            return False
        return not any(root in self.changed for v in node.operands for root in self.memory.roots(v.name))

    def _is_inside_region(self, node: Node) -> bool:
        """Whether all that reads a node's results is in the same region that the user marked."""
        if not node.checkpoint:
            return False
        readers = self.graph.readers(*node.results)
        returned = any(r.name in self.graph.output_names for r in node.results)
        return not returned and all(n.checkpoint == node.checkpoint for n in readers if n.phase is Phase.forward)

    def _again_us(self, node: Node) -> float:
        """Duration of running a node again, in microseconds, with the parameter gathers that only this needs."""
        us = self.context.costs.node_us(self.graph, node, self.context.hints)
        for value in node.operands:
            maker = self.graph.producers.get(value.name)
            if maker is None or not self.is_gathered_anew(maker):
                continue
            if gathered(self.graph, maker) not in self.again:
                us += self._gather_us(maker)
        return us

    def _gather_us(self, gather: Node) -> float:
        """Duration of gathering a parameter, in microseconds, with its copy to the device if it is on the host."""
        costs, shard = self.context.costs, gather.operands[0]
        us = costs.copy_us(self._local_bytes(shard.type)) if shard.tensor.is_on_host else 0.0
        if self.graph.num_shards > 1:
            line = costs.gather_alpha_beta(self.graph.mesh)
            us += line.latency_us + 1e6 * padded_bytes(shard.tensor, self.graph.num_shards) / line.bytes_per_s
        return us

    def _local_bytes(self, kind: Type) -> int:
        return local_bytes(kind, self.graph.mesh, self.context.hints)

    def is_gathered_anew(self, node: Node) -> bool:
        """Whether a node gathers a parameter that does not stay until the backward."""
        return is_gather(self.graph, node) and not node.option("keep")

    def _bytes(self, name: str) -> int:
        roots = sorted(self.memory.roots(name))
        kinds = [
            r.type
            for n in (self.nodes[self.position[root]] for root in roots if root in self.position)
            for r in n.results
            if r.name in roots
        ]
        return sum(map(self._local_bytes, kinds))

    # --- choosing ------------------------------------------------------------------------------------------------

    def choices(self, keep_bytes: int | None, *, exactly: bool = False) -> list[Choice]:
        """A choice for each block, which together keep at most `keep_bytes` if they can, at the least time.

        Blocks take corners of their hulls, the cheapest bytes first, early layers before late ones. `exactly` solves
        the last block to give way for the bytes that this leaves over.
        """
        corners = [_frontier(block) for block, _ in self.blocks]
        at = [0] * len(corners)
        kept = sum(c[0].num_bytes for c in corners if c)
        if keep_bytes is None:
            return [c[0] if c else _nothing(b) for c, (b, _) in zip(corners, self.blocks, strict=True)]
        moves = sorted(
            ((low.us - high.us) / (high.num_bytes - low.num_bytes), number, step)
            for number, found in enumerate(corners)
            for step, (high, low) in enumerate(pairwise(found))
        )
        last = None
        for _, number, step in moves:
            if kept <= keep_bytes:
                break
            kept -= corners[number][step].num_bytes - corners[number][step + 1].num_bytes
            at[number], last = step + 1, number
        found = [c[a] if c else _nothing(b) for a, c, (b, _) in zip(at, corners, self.blocks, strict=True)]
        if exactly and last is not None and kept < keep_bytes:
            block, _ = self.blocks[last]
            found[last] = _within(block, found[last].num_bytes + keep_bytes - kept) or found[last]
        return found

    def choices_at(self, us_per_byte: float) -> list[Choice]:
        """A choice for each block: bytes are kept that save more time than this price."""
        found = []
        for block, _ in self.blocks:
            corners = _frontier(block)
            best = min(corners, key=lambda c: c.us + us_per_byte * c.num_bytes, default=None)
            found.append(best or _nothing(block))
        return found

    def prices(self) -> list[float]:
        """Prices in ascending order, one between any two at which a block's choice changes, and one above all."""
        slopes = sorted(
            {
                (low.us - high.us) / (high.num_bytes - low.num_bytes)
                for block, _ in self.blocks
                for high, low in pairwise(_frontier(block))
            }
        )
        between = [(a + b) / 2 for a, b in pairwise(slopes)]
        return [*between, 2 * slopes[-1] + 1.0] if slopes else [1.0]

    # --- the graph -----------------------------------------------------------------------------------------------

    def keeping(self, choices: Sequence[Choice]) -> Graph:
        """The graph that keeps what was chosen and computes the rest again."""
        again: set[str] = set()
        for choice, (block, names) in zip(choices, self.blocks, strict=True):
            values = {v for number in choice.again for v in block.makers[number].makes}
            again.update(names[v] for v in values if v not in choice.kept)
        return self.computing_again(frozenset(again))

    def computing_again(self, names: frozenset[str]) -> Graph:
        """The graph whose backward makes its own copies of these values of the forward."""
        return _Writer(self, names).run()


class _Writer:
    """Puts the nodes that run again before the first node of the backward that reads what they make."""

    def __init__(self, forward: Forward, again: frozenset[str]) -> None:
        self.forward, self.graph, self.wanted = forward, forward.graph, again
        self.builder = Builder(self.graph, self.forward.made_by)
        self.made: dict[str, Value] = {}
        self.placed: set[str] = set()
        self.nodes: list[Node] = []

    def run(self) -> Graph:
        for node in self.graph.nodes:
            if node.phase is Phase.forward:
                self.nodes.append(node)
            elif not (node.results and node.name in self.placed):
                self.append(node)
        return self.graph.with_nodes(self.nodes)

    def append(self, node: Node) -> None:
        """A node of the backward, behind what it needs."""
        env = {v.name: self.now(v) for v in node.operands if v.name in self.wanted}
        self.nodes.append(node.substitute(env))
        self.placed.update(r.name for r in node.results)

    def now(self, value: Value) -> Value:
        """The value that the backward reads in place of a forward's value; its makers run again first if needed."""
        todo = [value.name]
        while todo:
            name = todo[-1]
            if name in self.made or name not in self.wanted:
                todo.pop()
                continue
            node = self.forward.nodes[self.forward.position[name]]
            missing = [v.name for v in node.operands if v.name in self.wanted and v.name not in self.made]
            if missing:
                todo.extend(missing)
                continue
            self.copy(node)
        return self.made[value.name]

    def copy(self, node: Node) -> None:
        env = {v.name: self.made.get(v.name) or self.from_gather(v) for v in node.operands}
        results = tuple(Value(self.builder.fresh(f"{r.name}_again"), r.type) for r in node.results)
        args = tuple(map_values(a, env) for a in node.args)
        kwargs = tuple((k, map_values(a, env)) for k, a in node.kwargs)
        origin = self.builder.origin(node.origin)
        copied = replace(node, args=args, kwargs=kwargs, results=results, phase=Phase.backward, origin=origin)
        self.nodes.append(replace(copied, checkpoint=0))
        self.made.update((old.name, new) for old, new in zip(node.results, results, strict=True))

    def from_gather(self, value: Value) -> Value:
        """The backward's own gather of a parameter, moved here if it is further down, or a new one."""
        maker = self.graph.producers.get(value.name)
        if maker is None or not self.forward.is_gathered_anew(maker):
            return value
        source = gathered(self.graph, maker)
        found = self.forward.again.get(source)
        if found is not None:
            if found.name not in self.placed:
                self.placed.update(self.hoist(found))
            result = found.results[0]
        else:
            result = Value(self.builder.fresh(f"{value.name}_again"), value.type)
            self.nodes.append(
                replace(maker, results=(result,), phase=Phase.backward, origin=self.builder.origin(maker.origin))
            )
        self.made[value.name] = result
        return result

    def hoist(self, node: Node) -> Iterable[str]:
        """Put a gather of the backward, and the cast before it, here."""
        before = [self.graph.producers[v.name] for v in node.operands if v.name in self.graph.producers]
        for other in (*before, node):
            if other.phase is not Phase.forward and other.name not in self.placed:
                self.nodes.append(other)
                yield other.name


def _gathers_again(graph: Graph) -> Mapping[str, Node]:
    """The backward's gathers of parameters, by the parameter's name."""
    return {gathered(graph, n): n for n in graph.phase_nodes(Phase.backward) if is_gather(graph, n)}


def _nothing(block: Block) -> Choice:
    """The choice for a block that has none to make: all the values that the backward needs are kept."""
    return Choice(block.needed, frozenset(), sum(block.num_bytes[v] for v in block.needed), 0.0)


@cache
def _frontier(block: Block) -> tuple[Choice, ...]:
    return frontier(block)


@cache
def _within(block: Block, max_bytes: int) -> Choice | None:
    return within(block, max_bytes)
