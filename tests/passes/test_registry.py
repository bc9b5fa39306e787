"""Passes of one's own: registered, installed by a package, given as a sequence; what is refused says why."""

from dataclasses import dataclass, replace
from importlib.metadata import EntryPoint
from typing import ClassVar

import pytest

from tests.interp.models import captured
from zgraph.errors import RecipeError
from zgraph.ir import Axis, Graph
from zgraph.passes import (
    RECIPES,
    Context,
    Numerics,
    Pass,
    Pipeline,
    known_passes,
    parse_recipe,
    pipeline_of,
    register_pass,
)
from zgraph.passes.core import registry
from zgraph.passes.dce import DeadCode

TWO = Context(mesh=(Axis("shard", 2),))


@pytest.fixture(autouse=True)
def _alone(monkeypatch):
    monkeypatch.setattr(registry, "_registered", {})
    registry._installed.cache_clear()
    yield
    registry._installed.cache_clear()


def make(pass_name: object = "nothing", **fields: object) -> type[Pass]:
    """A pass that does nothing."""

    @dataclass(frozen=True)
    class Nothing(Pass):
        """Do nothing."""

        times: int = 1

        name: ClassVar[str] = pass_name  # type: ignore[assignment]

        def run(self, graph: Graph, context: Context) -> Graph:
            return graph

    for key, value in fields.items():
        setattr(Nothing, key, value)
    return Nothing


def test_a_registered_pass_is_named_in_recipes():
    kind = register_pass(make())
    assert known_passes()["nothing"] is kind
    pipeline = parse_recipe("canonicalize,nothing(times=3),dce")
    assert pipeline.passes[1] == kind(times=3)
    assert str(pipeline) == "canonicalize,nothing(times=3),dce"


def test_a_class_that_is_made_anew_replaces_the_old_one():
    register_pass(make())
    second = register_pass(make())
    assert known_passes()["nothing"] is second


def without_run() -> type:
    @dataclass(frozen=True)
    class Abstract(Pass):
        """Nothing."""

        name: ClassVar[str] = "abstract"

    return Abstract


def loose() -> type:
    class Loose(make()):
        """Not frozen."""

    Loose.__dataclass_params__ = dataclass(type("Other", (), {})).__dataclass_params__
    return Loose


def with_list() -> type:
    @dataclass(frozen=True)
    class Listed(make("listed")):
        """An option that no recipe can write."""

        sizes: tuple[int, ...] = ()

    return Listed


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        (int, "no class derived from"),
        ("dce", "no class derived from"),
        (loose(), "frozen dataclass"),
        (without_run(), "lacks run"),
        (make("Big"), "small letters"),
        (make("a b"), "small letters"),
        (make(None), "small letters"),
        (with_list(), "the option sizes has no default that is a bool, int, float or str"),
        (make("dce"), "there is a pass called dce already (zgraph.passes.dce.DeadCode)"),
    ],
)
def test_what_is_no_pass_is_refused(kind, why):
    before = dict(known_passes())
    with pytest.raises(RecipeError) as caught:
        register_pass(kind)
    assert why in str(caught.value)
    assert known_passes() == before


def installed(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    entry = EntryPoint(name="other", value=value, group=registry.GROUP)
    monkeypatch.setattr(registry, "entry_points", lambda group: [entry] if group == registry.GROUP else [])


def test_a_package_brings_passes(monkeypatch):
    installed(monkeypatch, "tests.cli.wrong:Wrong")
    assert parse_recipe("wrong(mistake=scale)").passes[0].name == "wrong"


@pytest.mark.parametrize(
    ("value", "why"),
    [
        ("tests.nowhere:Wrong", "cannot be loaded: ModuleNotFoundError"),
        ("tests.cli.wrong:nothing", "cannot be loaded: AttributeError"),
        ("tests.cli.wrong:commuted", "no class derived from"),
        ("zgraph.passes.dce:DeadCode", "zgraph's own"),
    ],
)
def test_a_package_that_brings_something_else_is_named(monkeypatch, value, why):
    installed(monkeypatch, value)
    with pytest.raises(RecipeError, match="entry point other of the group") as caught:
        parse_recipe("dce")
    assert why in str(caught.value)


def test_passes_are_given_as_a_sequence_too():
    kind = make()
    steps = [*parse_recipe(RECIPES[3]).passes, kind()]
    pipeline = pipeline_of(steps)
    assert pipeline == Pipeline(tuple(steps)) == pipeline_of(pipeline)
    assert pipeline_of(RECIPES[2]) == parse_recipe(RECIPES[2])
    assert pipeline.run(captured("tied"), TWO) == parse_recipe(RECIPES[3]).run(captured("tied"), TWO)


@pytest.mark.parametrize(("step", "what"), [(DeadCode, "the class DeadCode; call it"), ("dce", "a str"), (3, "a int")])
def test_what_is_no_pass_in_a_sequence(step, what):
    with pytest.raises(RecipeError, match=what):
        pipeline_of([*parse_recipe("canonicalize").passes, step])


def test_what_looks_ahead_takes_the_lowering_of_the_pipeline_at_hand():
    """The pass `bucket` asks what would become of each choice, where there is a budget."""
    seen, roomy = [], replace(TWO, memory_budget=1 << 30)

    @dataclass(frozen=True)
    class Lower(Pass):
        """Lower everything, and count how often."""

        name: ClassVar[str] = "lower"
        numerics: ClassVar[Numerics] = Numerics.reassociates
        provides: ClassVar[frozenset[str]] = frozenset({"lowered", "gathered"})

        def run(self, graph: Graph, context: Context) -> Graph:
            seen.append(graph)
            lowering = "broadcast,all-gather,reduce-scatter,all-reduce,host-copies"
            return Pipeline(tuple(parse_recipe(f"partition,{lowering}").passes[1:])).run(graph, context)

    before, after = parse_recipe("canonicalize,partition(stage=3),bucket"), parse_recipe(f"{RECIPES[3]}").passes[-3:]
    pipeline = Pipeline((*before.passes, Lower(), *after))
    made = pipeline.run(captured("llama"), roomy)
    assert len(seen) > 1
    plain = parse_recipe(RECIPES[3].replace("fit,keep,", "").replace("release,", "")).run(captured("llama"), roomy)
    assert made == plain
