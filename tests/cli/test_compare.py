"""Texts of graphs compared line by line, on graphs of every kind."""

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.passes.test_goldens import GOLDENS, Golden
from zgraph.ir import Instruction, parse_graph, print_graph, print_node
from zgraph.ir.lines import node_lines, read_line
from zgraph.runfile.diff import compare, moved


def test_lines_are_nodes():
    """Each node of every golden, in order, with all that is read off its line."""
    for path in GOLDENS:
        for text in (Golden.read(path).before, Golden.read(path).after):
            graph = parse_graph(text)
            lines = [read_line(line) for line in node_lines(print_graph(graph)).values()]
            assert [line.text for line in lines] == [print_node(n, origins=False) for n in graph.nodes]
            for line, node in zip(lines, graph.nodes, strict=True):
                assert (line.op, line.phase, line.lane) == (node.op, node.phase.value, Instruction(node).lane)
                assert line.makes == [v.name for v in node.results]
                assert line.reads == [v.name for v in node.operands]
                assert line.origin == node.origin


def test_a_difference_leads_from_one_graph_to_the_other():
    for path in GOLDENS:
        golden = Golden.read(path)
        before, after = (print_graph(parse_graph(text)) for text in (golden.before, golden.after))
        found = compare(before, after)
        old, new = node_lines(before), node_lines(after)
        kept = [key for key in old if key not in {line.key for line in found.removed}]
        assert sorted([*kept, *(line.key for line in found.added)]) == sorted(new)
        changed = {was.key: now.text for was, now in found.changed}
        assert all(changed.get(key, read_line(old[key]).text) == read_line(new[key]).text for key in kept)
        assert compare(after, after).stat == {"added": {}, "removed": {}, "changed": {}, "moved": {}}


@given(st.permutations(range(12)), st.integers(0, 12))
@settings(max_examples=200, deadline=None)
def test_what_has_moved_is_least(order, size):
    """The rest is in order; and no more could have stayed than a longest increasing run has."""
    keys = [str(n) for n in order[:size]]
    before = sorted(keys, key=int)
    gone = set(moved(before, keys))
    stayed = [int(k) for k in keys if k not in gone]
    assert stayed == sorted(stayed)
    longest = 0
    lengths: list[int] = []
    for at, key in enumerate(map(int, keys)):
        lengths.append(1 + max((lengths[b] for b in range(at) if int(keys[b]) < key), default=0))
        longest = max(longest, lengths[-1])
    assert len(stayed) == longest
