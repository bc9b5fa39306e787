"""The codec that `compress(gradients=auto)` takes: the mildest that hides what is sent, and none where it is hidden."""

from __future__ import annotations

import pytest

from tests.passes.programs import graph_of
from zgraph.cost import CostTable, Link, hardware
from zgraph.ir import Axis, Graph
from zgraph.passes import RECIPES, Context, Pipeline, compressing, parse_recipe
from zgraph.passes.compress import AUTO, Compress


def context(bytes_per_s: float) -> Context:
    known = hardware("cpu")
    link = Link(bytes_per_s=bytes_per_s, latency_us=1.0)
    profile = known.model_copy(update={"within": link, "across": link, "devices_per_host": 8})
    return Context(mesh=(Axis("shard", 2),), costs=CostTable(hardware=profile, per_host=2))


def codecs(graph: Graph) -> set[object]:
    return {node.option("codec") for node in graph.nodes if node.op in ("encode", "decode")}


def run(codec: str, bytes_per_s: float, stage: int = 2) -> Graph:
    return parse_recipe(compressing(RECIPES[stage], codec)).run(graph_of("gpt2"), context(bytes_per_s))


@pytest.mark.parametrize(("bytes_per_s", "wanted"), [(1e12, set()), (3e6, {AUTO[1]})])
def test_bytes_that_are_hidden_are_left_alone(bytes_per_s: float, wanted: set[object]) -> None:
    assert codecs(run("auto", bytes_per_s)) == wanted


def test_what_auto_makes_is_what_its_codec_makes() -> None:
    assert run("auto", 3e6).nodes == run(AUTO[1], 3e6).nodes


def test_the_mildest_that_is_about_as_good_is_taken() -> None:
    assert Compress.chosen({"": 100.0, AUTO[0]: 51.0, AUTO[1]: 50.0}) == AUTO[0]
    assert Compress.chosen({"": 100.0, AUTO[0]: 51.1, AUTO[1]: 50.0}) == AUTO[1]
    assert Compress.chosen({"": 100.0, AUTO[0]: 95.0, AUTO[1]: 96.0}) == ""
    assert Compress.chosen({"": 100.0, AUTO[0]: 94.9, AUTO[1]: 96.0}) == AUTO[0]


def test_times_are_those_of_a_step_with_each_codec() -> None:
    given = context(3e6)
    steps = parse_recipe(RECIPES[2]).passes
    before = Pipeline(steps[: next(i for i, s in enumerate(steps) if s.name == "broadcast")])
    times = Compress(gradients="auto").times_us(before.run(graph_of("gpt2"), given), given)
    assert list(times) == ["", *AUTO]
    assert times[AUTO[1]] < times[AUTO[0]] < times[""]
