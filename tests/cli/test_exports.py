"""Graphs and predicted steps in other tools' formats: the same nodes, edges and times, and text that they can read."""

import json
import re
from dataclasses import replace
from itertools import pairwise

import pytest

from tests.cost.test_simulator import STEP, table
from tests.passes.test_goldens import GOLDENS, Golden
from zgraph.cost import simulate
from zgraph.ir import Graph, parse_graph
from zgraph.passes import Context, make_plan
from zgraph.viz.dot import dot
from zgraph.viz.model_explorer import model_explorer
from zgraph.viz.perfetto import perfetto

QUOTED = r'"((?:[^"\\]|\\.)*)"'

HOSTILE = 'a"b\\c\nd/é'


def events(graph: Graph, context: Context) -> list[dict]:
    plan = make_plan(graph)
    timeline = simulate(plan, context.costs, context.hints)
    return json.loads("".join(perfetto(plan, timeline, context.rest_bytes, "Model")))["traceEvents"]


def test_a_trace_has_the_times_of_the_clock():
    """The step that is worked out by hand in tests/cost/test_simulator.py."""
    graph = parse_graph(STEP.strip() + "\n")
    found = events(graph, Context(mesh=graph.mesh, costs=table(graph), rest_bytes=1000))
    rows = {e["tid"]: e["args"]["name"] for e in found if e["name"] == "thread_name"}
    assert list(rows.values()) == ["computing", "waiting for", "communication"]
    order = [e["tid"] for e in found if e["name"] == "thread_sort_index"]
    assert order == sorted(order)
    slices = [(rows[e["tid"]], e["args"].get("node", ""), e["ts"], e["dur"]) for e in found if e["ph"] == "X"]
    assert sorted(slices) == sorted(
        [
            ("computing", "%y", 8, 10),
            ("computing", "%z", 18, 10),
            ("computing", "%u", 28, 4),
            ("computing", "%v", 32, 4),
            ("communication", "%as", 0, 8),
            ("communication", "%bs", 8, 8),
            ("communication", "%rs", 32, 8),
            ("waiting for", "", 0, 8),
            ("waiting for", "", 36, 4),
        ]
    )
    assert {e["cname"] for e in found if e["ph"] == "X" and rows[e["tid"]] == "waiting for"} == {"terrible"}
    begins = {e["id"]: (rows[e["tid"]], e["ts"]) for e in found if e["ph"] == "s"}
    ends = {e["id"]: (rows[e["tid"]], e["ts"]) for e in found if e["ph"] == "f"}
    assert sorted((begins[i], ends[i]) for i in begins) == [
        (("communication", 0), ("waiting for", 0)),
        (("communication", 8), ("computing", 18)),
        (("communication", 32), ("waiting for", 36)),
    ]


def test_counters_follow_the_memory():
    graph = parse_graph(STEP.strip() + "\n")
    peak = simulate(make_plan(graph), table(graph), {}).memory.peak.total_bytes
    counters = [e for e in events(graph, Context(costs=table(graph), rest_bytes=1000)) if e["ph"] == "C"]
    assert [e["ts"] for e in counters] == sorted(e["ts"] for e in counters)
    assert max(sum(e["args"].values()) for e in counters) == 1000 + peak
    assert sum(counters[-1]["args"].values()) == 1000
    assert counters[-1]["ts"] == 40


def test_a_trace_of_a_captured_model(zgraph_command):
    """Slices of a row follow each other, arrows begin and end at slices, and each slice says where it comes from."""
    code, out, error = zgraph_command("export", "run.zg", "--perfetto", "-")
    assert code == 0, error
    found = json.loads(out)["traceEvents"]
    rows: dict[int, list[tuple[float, float]]] = {}
    for event in found:
        if event["ph"] == "X":
            rows.setdefault(event["tid"], []).append((event["ts"], event["ts"] + event["dur"]))
    for spans in rows.values():
        assert all(a[1] <= b[0] + 0.002 for a, b in pairwise(spans))
    arrows = [e for e in found if e["ph"] in "sf"]
    assert arrows
    assert all(any(begin <= e["ts"] < end for begin, end in rows[e["tid"]]) for e in arrows)
    left = {e["id"]: e["ts"] for e in arrows if e["ph"] == "s"}
    assert all(left[e["id"]] <= e["ts"] for e in arrows if e["ph"] == "f")
    (mm,) = [e for e in found if e["ph"] == "X" and e["name"] == "aten.addmm.default" and e["args"]["node"] == "%addmm"]
    assert mm["args"]["module"] == "layers.0"
    assert "model.py:" in mm["args"]["source"]


def edges(graph: Graph) -> list[tuple[str, str, str]]:
    """Value, type and the number of operands that are it, read from the graph itself."""
    read = [v for n in graph.nodes for v in n.operands] + [o.value for o in graph.outputs if o.value is not None]
    return sorted((v.name, str(v.type)) for v in read)


def golden_graphs() -> list[Graph]:
    """The graph after the pass, of every golden."""
    return [parse_graph(Golden.read(path).after) for path in GOLDENS]


def hostile() -> Graph:
    """A graph whose modules, files and parameters have names that need escapes."""
    graph = parse_graph(STEP.strip() + "\n")
    nodes = [replace(n, origin=replace(n.origin, module=f"x.{HOSTILE}", file=HOSTILE, line=3)) for n in graph.nodes]
    return replace(graph.with_nodes(nodes), inputs=tuple(replace(i, target=HOSTILE) for i in graph.inputs))


def test_dot_has_every_node_and_every_edge():
    for graph in [*golden_graphs(), hostile()]:
        text = "".join(dot(graph, HOSTILE))
        assert not re.sub(QUOTED, "", text).count('"')
        bare = re.sub(QUOTED, "Q", text)
        assert bare.count("{") == bare.count("}")
        named = re.findall(rf"^{QUOTED} \[label={QUOTED}", text, re.M)
        boxes = {name for name, _ in named}
        assert len(named) == len(boxes)
        assert len(boxes) == len(graph.inputs) + len(graph.nodes) + sum(o.value is not None for o in graph.outputs)
        found = re.findall(rf"^{QUOTED} -> {QUOTED} \[label={QUOTED}\]$", text, re.M)
        makers = {v.name: n.name for n in graph.nodes for v in n.results}
        assert sorted((a, kind) for a, _, kind in found) == sorted((makers.get(v, v), k) for v, k in edges(graph))
        assert {end for a, b, _ in found for end in (a, b)} <= boxes
        clusters = re.findall(rf"^subgraph {QUOTED}", text, re.M)
        assert len(clusters) == len(set(clusters))
    assert r'label="a\"b\\c\nd/é"' in text


def test_model_explorer_reads_every_node_and_every_edge():
    for graph in [*golden_graphs(), hostile()]:
        collection = json.loads("".join(model_explorer(graph, HOSTILE)))
        assert collection["label"] == HOSTILE
        (drawn,) = collection["graphs"]
        boxes = {n["id"]: n for n in drawn["nodes"]}
        assert len(boxes) == len(drawn["nodes"])
        assert all(isinstance(a["value"], str) for n in boxes.values() for a in n["attrs"])
        found = []
        for box in boxes.values():
            assert [e["targetNodeInputId"] for e in box["incomingEdges"]] == [
                str(i) for i in range(len(box["incomingEdges"]))
            ]
            for edge in box["incomingEdges"]:
                made = boxes[edge["sourceNodeId"]]["outputsMetadata"]
                (output,) = [m["attrs"] for m in made if m["id"] == edge["sourceNodeOutputId"]]
                texts = {a["key"]: a["value"] for a in output}
                found.append((texts["name"].removeprefix("%"), texts["tensor_shape"]))
        assert sorted(found) == edges(graph)


def test_modules_are_layers(zgraph_command):
    code, out, _ = zgraph_command("export", "run.zg@captured", "--model-explorer", "-")
    assert code == 0
    nodes = json.loads(out)["graphs"][0]["nodes"]
    spaces = {n["namespace"] for n in nodes}
    assert {"forward/layers/0", "backward/layers/2", "parameters/layers/1", "outputs"} <= spaces


def test_one_call_writes_several_files(zgraph_command, tmp_path):
    step, graph = str(tmp_path / "step.json"), str(tmp_path / "graph.dot")
    code, out, _ = zgraph_command("export", "run.zg", "--perfetto", step, "--dot", graph, "--json")
    assert code == 0
    written = json.loads(out)
    assert {k: v["bytes"] for k, v in written.items()} == {
        "perfetto": len((tmp_path / "step.json").read_bytes()),
        "dot": len((tmp_path / "graph.dot").read_bytes()),
    }


@pytest.mark.parametrize(
    ("args", "code", "said"),
    [
        (("run.zg",), 2, "say what to write"),
        (("run.zg", "--perfetto", "-", "--dot", "-"), 2, "only one"),
        (("run.zg", "--dot", "nowhere/graph.dot"), 2, "cannot write nowhere/graph.dot"),
        (("run.zg@partition", "--perfetto", "-"), 1, "add all-gather"),
    ],
)
def test_mistakes(args, code, said, zgraph_command):
    got, _, error = zgraph_command("export", *args)
    assert got == code
    assert said in error
