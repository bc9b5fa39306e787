"""Really captured training steps give, after each pass of each stage, the numbers they gave before, to the last bit."""

from dataclasses import replace
from functools import cache

import pytest
import torch

from tests.interp.models import NAMES, ConvNet, captured
from tests.interp.ranks import Reference, context
from zgraph.interpreter import Interpreter
from zgraph.ir import DType, Graph, InputKind, OutputKind, TensorType, parse_graph, print_graph, verify
from zgraph.passes import RECIPES, parse_recipe

each_model = pytest.mark.parametrize("name", NAMES)
each_stage = pytest.mark.parametrize("stage", RECIPES)
ranks = pytest.mark.parametrize("num_ranks", [1, 2, 3, 4])


@cache
def reference(name: str, num_ranks: int) -> Reference:
    return Reference(captured(name), num_ranks)


@each_model
@each_stage
@ranks
def test_every_pass_keeps_the_numbers(name, stage, num_ranks):
    reference(name, num_ranks).check(parse_recipe(RECIPES[stage]))


@each_model
@each_stage
@pytest.mark.parametrize("keep_bytes", [1, 700, 5000])
def test_what_is_computed_again_has_the_same_numbers(name, stage, keep_bytes):
    recipe = RECIPES[stage].replace("fit", f"recompute(keep_bytes={keep_bytes})")
    reference(name, 2).check(parse_recipe(recipe))


@each_model
@each_stage
@pytest.mark.parametrize("keep_bytes", [0, 700])
def test_what_is_offloaded_has_the_same_numbers(name, stage, keep_bytes):
    moved = f"recompute(keep_bytes={keep_bytes}),offload(num_bytes=1000000,min_bytes=1)"
    pipeline = parse_recipe(RECIPES[stage].replace("fit", moved))
    reference(name, 2).check(pipeline)
    after = pipeline.run(captured(name), context(2))
    assert any(n.op == "offload_start" for n in after.nodes)
    assert any(n.op == "reload_start" for n in after.nodes)


@each_model
@each_stage
@pytest.mark.parametrize("offload", ["optimizer", "parameters"])
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_offloaded_parameters_give_the_same_numbers(name, stage, offload, num_ranks):
    graph = captured(name)
    inputs = tuple(replace(i, offload=offload) if i.kind is InputKind.param else i for i in graph.inputs)
    Reference(replace(graph, inputs=inputs), num_ranks).check(parse_recipe(RECIPES[stage]))


@each_stage
def test_shards_that_several_ranks_hold_keep_the_numbers(stage):
    reference("tied", 4).check(parse_recipe(RECIPES[stage]), num_copies=2)


@each_stage
@pytest.mark.parametrize("reduce_dtype", [DType.f32, DType.f64])
def test_gradients_are_averaged_in_the_dtype_asked_for(stage, reduce_dtype):
    reference("bf16", 3).check(parse_recipe(RECIPES[stage]), reduce_dtype)


@each_stage
def test_small_buckets_and_gathers_far_ahead_keep_the_numbers(stage):
    text = RECIPES[stage].replace("bucket", "bucket(max_bytes=200, pack_below_bytes=100)")
    reference("tied", 3).check(parse_recipe(text.replace("schedule", "schedule(num_ahead=3)")))


@each_model
def test_what_is_captured_is_valid_and_comes_back_from_its_text(name):
    verify(captured(name))
    assert parse_graph(print_graph(captured(name))) == captured(name)


def has_symbols(graph: Graph) -> bool:
    return any(
        not isinstance(d, int)
        for n in graph.nodes
        for r in n.results
        if isinstance(r.type, TensorType)
        for d in r.type.shape
    )


def test_the_models_are_what_they_are_here_for():
    assert any(row.random for row in captured("tied").foreign.values())
    assert len(captured("tied").params) == 7
    assert sum(o.kind is OutputKind.mutation for o in captured("convnet").outputs) == 6
    assert has_symbols(captured("dynamic"))
    assert {i.master for i in captured("bf16").params} == {DType.f32}
    assert {i.value.tensor.dtype for i in captured("bf16").params} == {DType.bf16}
    assert {i.stage for i in captured("mixed stages").params} == {0, 1, 2, 3}
    assert any("scaled_dot_product" in op for op in captured("llama").foreign)


def test_the_interpreter_agrees_with_autograd():
    graph, model = captured("convnet"), ConvNet()
    torch.manual_seed(0)
    batch = [torch.rand(2, 2, 7, 7), torch.tensor([1, 3])]
    tensors = {name: t.detach().clone() for name, t in (*model.named_parameters(), *model.named_buffers())}
    given = iter([*batch, torch.ones(()), torch.zeros(2, 4)])
    inputs = {i.value.name: tensors[i.target] if i.target else next(given) for i in graph.inputs}
    outputs = [None if ranks is None else ranks[0] for ranks in Interpreter(1).run(graph, inputs)]

    loss, logits = model(*batch)
    loss.backward()
    names = {i.value.name: i.target for i in graph.inputs if i.kind in (InputKind.param, InputKind.buffer)}
    buffers = dict(model.named_buffers())
    results = iter((loss, logits))
    for output, found in zip(graph.outputs, outputs, strict=True):
        if output.kind is OutputKind.grad:
            torch.testing.assert_close(found, model.get_parameter(names[output.target]).grad)
        elif output.kind is OutputKind.mutation:
            torch.testing.assert_close(found, buffers[names[output.target]])
        elif found is not None:
            torch.testing.assert_close(found, next(results).detach())
