"""Faults put into a graph of a run are refused without numbers; what the passes make is not."""

from dataclasses import replace
from functools import cache

import pytest
import torch
import transformers as hf

from zgraph.certify.certificate import certify
from zgraph.errors import VerifyError
from zgraph.estimate.trace import traced
from zgraph.ir import OPS, Graph, Node, OutputKind, Phase
from zgraph.passes import RECIPES, parse_recipe
from zgraph.runfile.format import load_run


@cache
def run(stage: int, tied: bool = False, mixed: bool = False):
    """The run of a Llama of two layers on two ranks."""
    config = hf.LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        vocab_size=64,
        use_cache=False,
        tie_word_embeddings=tied,
    )
    with torch.device("meta"):
        model = hf.LlamaForCausalLM(config)
    ids = torch.zeros(2, 8, dtype=torch.int64, device="meta")
    return traced(
        model,
        {"input_ids": ids, "labels": ids},
        parse_recipe(RECIPES[stage]),
        hardware="8x8-h100",
        num_ranks=2,
        param_dtype=torch.bfloat16 if mixed else None,
    )


def certified(stage: int, tied: bool = False, mixed: bool = False, change=None):
    """The certificate of a run whose last graph is changed."""
    found = run(stage, tied, mixed)
    steps = [(name.partition("#")[0], found.graph(name)) for name in found.names]
    if change is not None:
        graph = change(steps[-1][1])
        assert graph != steps[-1][1]
        steps.append(("mine", graph))
    return certify(steps, found.context)


def test_a_run_file_says_what_was_checked(tmp_path):
    run(3).save(tmp_path / "run.zg")
    found = load_run(tmp_path / "run.zg").certificate
    assert found is not None
    assert {"ir", "equality", "order", "ownership"} <= {c.rule for c in found.checked}


@pytest.mark.parametrize("stage", range(4))
@pytest.mark.parametrize(("tied", "mixed"), [(False, False), (True, True)])
def test_what_the_passes_make_is_certified(stage, tied, mixed):
    assert {c.rule for c in certified(stage, tied, mixed).checked} >= {"ir", "types and effects", "equality", "order"}


def at(graph: Graph, *ops: str) -> int:
    """The last node of one of these ops."""
    return max(p for p, n in enumerate(graph.nodes) if n.op in ops)


def put(graph: Graph, position: int, *nodes: Node) -> Graph:
    return graph.with_nodes([*graph.nodes[:position], *nodes, *graph.nodes[position + 1 :]])


def dropped_release(graph: Graph) -> Graph:
    return put(graph, at(graph, "release"))


def late_release(graph: Graph) -> Graph:
    position = min(p for p, n in enumerate(graph.nodes) if n.op == "release")
    node = graph.nodes[position]
    last = max(p for p, n in enumerate(graph.nodes) if n.phase is Phase.forward)
    return graph.with_nodes(
        [*graph.nodes[:position], *graph.nodes[position + 1 : last + 1], node, *graph.nodes[last + 1 :]]
    )


def second_release(graph: Graph) -> Graph:
    position = at(graph, "release")
    return put(graph, position, graph.nodes[position], graph.nodes[position])


def released_parameter(graph: Graph) -> Graph:
    node = Node("release", (graph.params[0].value,), (), phase=graph.nodes[-1].phase)
    return graph.with_nodes([*graph.nodes, node])


def other_parameter(graph: Graph) -> Graph:
    by_type = {}
    for value in (i.value for i in graph.params):
        by_type.setdefault(value.type, []).append(value)
    for position, node in enumerate(graph.nodes):
        for value in node.operands:
            others = [v for v in by_type.get(value.type, ()) if v != value]
            if value in by_type.get(value.type, ()) and others:
                return put(graph, position, node.substitute({value.name: others[0]}))
    raise AssertionError


def swapped_gradients(graph: Graph) -> Graph:
    seen = {}
    for index, output in enumerate(graph.outputs):
        if output.kind is OutputKind.grad and output.value is not None:
            other = seen.setdefault(output.value.type, index)
            if other != index:
                outputs = list(graph.outputs)
                outputs[index] = replace(output, value=graph.outputs[other].value)
                outputs[other] = replace(graph.outputs[other], value=output.value)
                return replace(graph, outputs=tuple(outputs))
    raise AssertionError


def other_constant(graph: Graph) -> Graph:
    for position, node in enumerate(graph.nodes):
        if node.op == "aten.pow.Tensor_Scalar":
            return put(graph, position, replace(node, args=(node.args[0], 3)))
    raise AssertionError


def flipped_keep(graph: Graph) -> Graph:
    position = at(graph, "all_gather_start")
    node = graph.nodes[position]
    options = tuple(o for o in node.kwargs if o[0] != "keep")
    return put(graph, position, replace(node, kwargs=options if node.option("keep") else (*options, ("keep", True))))


def copied_instead_of_reduced(graph: Graph) -> Graph:
    position = at(graph, "all_reduce_start")
    return put(graph, position, replace(graph.nodes[position], op="broadcast_start"))


def held_for_another(graph: Graph) -> Graph:
    position = at(graph, "accumulate")
    return put(graph, position, replace(graph.nodes[position], kwargs=(("target", "another"),)))


def not_accumulated(graph: Graph) -> Graph:
    position = at(graph, "accumulate")
    node = graph.nodes[position]
    after = [n.substitute({node.name: node.operands[0]}) for n in graph.nodes[position + 1 :]]
    return graph.with_nodes([*graph.nodes[:position], *after])


def undeclared_view(graph: Graph) -> Graph:
    name = next(name for name, row in graph.foreign.items() if row.views)
    return replace(graph, foreign={**graph.foreign, name: replace(graph.foreign[name], views=())})


def another_dtype(graph: Graph) -> Graph:
    for position, node in enumerate(graph.nodes):
        if node.op not in OPS and node.op == "aten.t.default":
            return put(graph, position, replace(node, op="aten.detach.default"))
    raise AssertionError


@pytest.mark.parametrize("change", [other_parameter, swapped_gradients, other_constant, undeclared_view, another_dtype])
@pytest.mark.parametrize("stage", range(4))
def test_faults_at_any_stage(stage, change):
    with pytest.raises(VerifyError):
        certified(stage, change=change)


@pytest.mark.parametrize("change", [dropped_release, late_release, second_release, released_parameter, flipped_keep])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_faults_of_sharded_parameters(stage, change):
    with pytest.raises(VerifyError):
        certified(stage, change=change)


@pytest.mark.parametrize("change", [copied_instead_of_reduced, held_for_another, not_accumulated])
def test_faults_of_gradients_that_accumulate(change):
    with pytest.raises(VerifyError):
        certified(0, change=change)


def test_the_message_names_rule_and_node():
    with pytest.raises(VerifyError, match=r"the graph after mine: \[equality\] %\S+ makes that the output"):
        certified(3, change=other_parameter)
