"""Recipes as text: exact both ways, checked before anything runs, errors with a caret and a remedy."""

import dataclasses
import re

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from benchmarks.prefetch import Prefetch
from zgraph.errors import ContractError, RecipeError
from zgraph.ir import Graph
from zgraph.passes import ALL, BY_NAME, MIXED, RECIPES, Context, Pass, Pipeline, parse_recipe
from zgraph.passes.bucket import Bucket
from zgraph.passes.core.pipeline import parse_size, print_size
from zgraph.passes.core.recipes import along_model_axes, compressing, fusing, recipe_for
from zgraph.passes.partition import Partition

OPTIONS = {
    "stage": st.integers(0, 3),
    "depth": st.integers(0, 9),
    "max_bytes": st.integers(0, 2**50),
    "pack_below_bytes": st.integers(0, 2**50),
    "num_ahead": st.integers(0, 9),
    "grouped": st.booleans(),
    "keep_bytes": st.integers(0, 2**50),
    "num_bytes": st.integers(0, 2**50),
    "min_bytes": st.integers(0, 2**50),
    "effort": st.integers(0, 1000),
    "always": st.booleans(),
    "only_measured": st.booleans(),
    "repeat_views": st.booleans(),
    "gradients": st.sampled_from(["q8(block=256)", "sign(block=64)"]),
    "parameters": st.sampled_from(["none", "q4(block=64)"]),
    "at_least_bytes": st.integers(0, 2**50),
    "sequence": st.booleans(),
    "search": st.sampled_from(["", "values", "all"]),
    "ring": st.booleans(),
    "matmuls": st.sampled_from(["never", "auto", "always"]),
    "recipe": st.sampled_from(["tensorwise", "rowwise"]),
    "exclude": st.sampled_from(["", "lm_head", "head+router"]),
    "axis": st.sampled_from(["tensor", "context", "expert"]),
    "weights": st.sampled_from(["int8", "int4"]),
    "activations": st.just("wide"),
    "group": st.sampled_from([32, 64, 128]),
    "wider": st.sampled_from(["", "lm_head", "head+router"]),
    "precise": st.sampled_from(["", "down_proj", "fc2+w2"]),
    "slack": st.sampled_from([0.0, 0.5, 1.25, 8.0]),
    "outliers": st.integers(0, 64),
    "calibrated": st.booleans(),
    "apart": st.booleans(),
    "codec": st.sampled_from(["auto", "delta", "exponent"]),
}


@st.composite
def passes(draw, kind: type[Pass]) -> Pass:
    """The pass with some of its options given."""
    fields = [f.name for f in dataclasses.fields(kind)]
    given = {name: draw(OPTIONS[name]) for name in fields if draw(st.booleans())}
    assume(not (given.get("sequence") and given.get("search")))
    assume(given.get("axis") == "context" or not given.get("ring"))
    assume(given.get("axis") not in ("context", "expert") or not (given.get("sequence") or given.get("search")))
    assume(not given.get("calibrated") or given.get("weights") == "int4")
    assume(not given.get("outliers") or given.get("activations") == "int8")
    return kind(**given)


@st.composite
def pipelines(draw) -> Pipeline:
    """Passes of any kind in any order that holds together."""
    chosen = draw(st.lists(st.sampled_from(ALL), max_size=8))
    pipeline = Pipeline(tuple(draw(passes(kind)) for kind in [Partition, *chosen]))
    try:
        pipeline.check()
    except ContractError:
        assume(False)
    return pipeline


@given(pipelines())
def test_a_recipe_comes_back_from_its_text(pipeline):
    text = str(pipeline)
    assert parse_recipe(text) == pipeline
    assert str(parse_recipe(text)) == text
    apart = text.replace(",", " , ").replace("(", " ( ").replace("=", " = ")
    apart = re.sub(r" \( block = (\d+)\)", r"(block=\1)", apart)
    assert parse_recipe(f"  {apart} ") == pipeline


@pytest.mark.parametrize("text", [*RECIPES.values(), MIXED, ""])
def test_the_recipes_are_written_as_they_print(text):
    parsed = parse_recipe(text)
    assert parse_recipe(str(parsed)) == parsed
    assert str(parsed) == text


def test_every_pass_is_found_by_its_name():
    assert set(BY_NAME.values()) == set(ALL)
    assert [kind.name for kind in ALL] == list(BY_NAME)
    for kind in ALL:
        assert kind.__doc__
        assert dataclasses.is_dataclass(kind)
        assert kind() == kind()
        with pytest.raises(dataclasses.FrozenInstanceError):
            kind().name = "other"


BAD = [
    ("^partitoin", "did you mean partition?"),
    ("canonicalize,^partitions(stage=2)", "did you mean partition?"),
    ("^zzz", "the passes are canonicalize, float8, place, fuse, partition"),
    ("partition(^stages=2)", "did you mean stage?"),
    ("partition(^zzz=2)", "its options are stage"),
    ("partition,dce(^level=2)", "it has none"),
    ("partition(stage=^two)", "stage must be int"),
    ("partition(stage=^2.5)", "stage must be int"),
    ("^partition(stage=4)", "0, 1, 2 or 3"),
    ("^partition(stage=-1)", "0, 1, 2 or 3"),
    ("partition(stage ^2)", "expected = and a value"),
    ("partition(stage=^)", "a value for stage"),
    ("partition(stage=2^", "closing parenthesis"),
    ("partition(stage=2 ^stage=2)", "closing parenthesis"),
    ("partition(stage=2, ^stage=3)", "twice"),
    ("partition ^dce", "comma between passes"),
    ("partition,^", "name of a pass"),
    ("^,dce", "name of a pass"),
    ("^7", "name of a pass"),
    ("partition,bucket(max_bytes=^16MB)", "a size such as 16MiB"),
    ("partition,bucket(max_bytes=^-1)", "a size such as 16MiB"),
    ("partition,bucket(max_bytes=^lots)", "a size such as 16MiB"),
    ("partition,bucket(max_bytes=^" + "9" * 400 + ".0GiB)", "a size such as 16MiB"),
]


@pytest.mark.parametrize(("marked", "words"), BAD, ids=[text[:40] for text, _ in BAD])
def test_a_bad_recipe_is_refused_where_it_is_bad(marked, words):
    text, column = marked.replace("^", ""), marked.index("^")
    with pytest.raises(RecipeError) as caught:
        parse_recipe(text)
    lines = str(caught.value).splitlines()
    assert words in lines[0]
    assert caught.value.column == column
    if len(text) < 160:
        assert lines[1:] == [f"  {text}", "  " + " " * column + "^"]


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        ("bucket", "bucket needs a graph that is placed: no pass of it provides placed"),
        ("bucket,partition", "bucket needs a graph that is placed: move partition before it"),
        ("partition,prefetch,all-gather", "prefetch needs a graph that is lowered: move all-gather before it"),
        ("partition,release", "release needs a graph that is gathered"),
        ("partition,partition", "partition cannot follow a pass that makes a graph placed"),
        ("partition,all-gather,bucket", "bucket cannot follow a pass that makes a graph lowered"),
        ("partition,all-gather,release,release", "release cannot follow a pass that makes a graph released"),
    ],
)
def test_passes_that_do_not_fit_together_are_refused(recipe, words):
    with pytest.raises(ContractError) as caught:
        parse_recipe(recipe)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [("0", 0), ("1000", 1000), ("1KiB", 1024), ("512KiB", 2**19), ("16MiB", 2**24), ("1.5 GiB", 3 * 2**29)],
)
def test_sizes_have_units(text, num_bytes):
    assert parse_size(text) == num_bytes


@given(st.integers(0, 2**50))
def test_sizes_come_back_from_their_text(num_bytes):
    assert parse_size(print_size(num_bytes)) == num_bytes


NOT_SIZES = ["", "MiB", "-1", "-1KiB", "1.5", "1e3", "16MB", "16 mib", "1MiB1", "0x10", "9" * 400 + ".0GiB"]


@pytest.mark.parametrize("text", NOT_SIZES, ids=[text[:8] for text in NOT_SIZES])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(ValueError, match=r"^"):
        parse_size(text)


def test_options_are_checked_when_a_pass_is_made():
    with pytest.raises(ValueError, match="0, 1, 2 or 3"):
        Partition(stage=5)
    with pytest.raises(ValueError, match="depth must be 0 or more"):
        Prefetch(depth=-1)
    assert str(Pipeline((Partition(), Bucket(max_bytes=1 << 20), Prefetch(depth=2)))) == (
        "partition(stage=3),bucket(max_bytes=1MiB),prefetch(depth=2)"
    )


def test_an_empty_pipeline_changes_nothing():
    graph = Graph("g")
    assert parse_recipe("").run(graph, Context()) is graph


def test_a_pipeline_is_a_value():
    parsed = parse_recipe(MIXED)
    assert hash(parsed) == hash(parse_recipe(MIXED))
    with pytest.raises(dataclasses.FrozenInstanceError):
        parsed.passes = ()


STAGE_3 = (
    "canonicalize,partition(stage=3),fit,keep,bucket,"
    "broadcast,all-gather,reduce-scatter,all-reduce,host-copies,release,schedule,dce,arena"
)


@pytest.mark.parametrize(
    ("made", "has"),
    [
        (lambda r: recipe_for("aten", r), {}),
        (lambda r: recipe_for("inductor", r), {}),
        (lambda r: recipe_for("triton", r), {"canonicalize": "canonicalize,fuse"}),
        (lambda r: recipe_for("auto", r), {"canonicalize": "canonicalize,fuse(only_measured=true)"}),
        (
            lambda r: recipe_for("aten", r, "float8"),
            {"canonicalize": "canonicalize,float8", "broadcast": "float8-gathers,broadcast"},
        ),
        (
            lambda r: recipe_for("triton", r, "float8-rowwise"),
            {"canonicalize": "canonicalize,float8(recipe=rowwise),fuse"},
        ),
        (lambda r: compressing(r, "q8(block=8)"), {"broadcast": "compress(gradients=q8(block=8)),broadcast"}),
        (along_model_axes, {"canonicalize": "canonicalize,place", "broadcast": "exchange,broadcast"}),
        (
            lambda r: along_model_axes(fusing(r), ("context", "tensor"), sequence=True),
            {
                "canonicalize": "canonicalize,place(axis=context),place(sequence=true)",
                "broadcast": "exchange,broadcast",
            },
        ),
        (
            lambda r: along_model_axes(fusing(r, only_measured=True), searches="all"),
            {"canonicalize": "canonicalize,place(search=all)", "broadcast": "exchange,broadcast"},
        ),
    ],
)
def test_what_is_asked_for_has_its_passes(made, has):
    assert RECIPES[3] == STAGE_3
    assert made(STAGE_3) == ",".join(has.get(step, step) for step in STAGE_3.split(","))
    assert str(parse_recipe(made(STAGE_3)))
