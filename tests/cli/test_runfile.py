"""Run files: they come back as they were, and what is damaged or hostile is an error."""

import io
import random
import zipfile
from dataclasses import replace
from math import inf

import pytest

import zgraph
from zgraph.cost import hardware, simulate
from zgraph.errors import RunFileError, ZgraphError, ZirError
from zgraph.ir import Axis, DType, Graph, parse_graph
from zgraph.ir.op_rows import LANES
from zgraph.passes import RECIPES, Context, make_plan, parse_recipe
from zgraph.runfile.format import MANIFEST, Provenance, Recording, RunFile, load_run

SMALL = """graph "small"
op aten.mm.default
op aten.relu.default
param %w: f32[8, 8] "w" stage=3
input %x: f32[4, 8]
tangent %t: f32[4, 8]
fwd %h: f32[4, 8] = aten.mm.default(%x, %w) @ "layers.0" "model.py":3
fwd %y: f32[4, 8] = aten.relu.default(%h)
bwd %g: f32[4, 8] = aten.mm.default(%t, %w)
return fwd output %y
return bwd grad "x" %g
"""

CONTEXT = Context(
    mesh=(Axis("replicate", 2), Axis("shard", 4)),
    reduce_dtype=DType.f32,
    hints={"s0": 7},
    memory_budget=10**9,
    groups_calls=True,
    offloads="auto",
)


@pytest.fixture(scope="module")
def run() -> RunFile:
    graph = parse_graph(SMALL)
    recording = Recording(graph)
    parse_recipe(RECIPES[3]).run(graph, CONTEXT, [recording])
    return recording.run_file(Provenance(model="Small"), CONTEXT)


def data(run: RunFile) -> bytes:
    stream = io.BytesIO()
    run.save(stream)
    return stream.getvalue()


def test_a_run_comes_back(run, tmp_path):
    run.save(tmp_path / "deep" / "run.zg")
    back = load_run(tmp_path / "deep" / "run.zg")
    assert back.manifest == run.manifest
    assert back.context == CONTEXT
    assert back.recipe == RECIPES[3]
    assert [back.graph(n) for n in back.names] == [run.graph(n) for n in run.names]
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["run.zg"]


def test_passes_that_change_nothing_have_no_text_of_their_own(run):
    assert len(run.texts) < len(run.names)
    assert run.graph("final") == run.graph(str(len(run.names) - 1))


def test_the_last_graph_follows_from_the_first(run):
    """A run holds all that its passes knew."""
    back = load_run(io.BytesIO(data(run)))
    assert parse_recipe(back.recipe).run(back.graph("captured"), back.context) == back.graph("final")


def test_graphs_of_a_pass_that_runs_twice():
    graph = parse_graph(SMALL)
    recording = Recording(graph)
    parse_recipe("dce,canonicalize,dce").run(graph, Context(), [recording])
    found = recording.run_file(Provenance(model="Small"), Context())
    assert found.names == ("captured", "dce", "canonicalize", "dce#2")
    assert isinstance(found.graph("dce#2"), Graph)
    with pytest.raises(RunFileError, match="did you mean dce#2"):
        found.graph("dce#3")


def rewritten(run: RunFile, member: str, text: bytes) -> io.BytesIO:
    """The same archive with another text in a member."""
    stream = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data(run))) as old, zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, text if name == member else old.read(name))
    return io.BytesIO(stream.getvalue())


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b"", "no JSON"),
        (b"[" * 100_000, "no JSON"),
        (b"[]", "no run file"),
        (b"{}", "provenance: Field required"),
        (b'{"format": 99}', "has format 99, and this zgraph reads 2: install a newer one"),
        (b'{"format": 1}', "has format 1, and this zgraph reads 2: write it again with zgraph trace"),
        (b'{"format": "cos\\nsystem"}', "no run file"),
    ],
)
def test_manifests_that_are_none(run, text, said):
    with pytest.raises(RunFileError, match=said):
        load_run(rewritten(run, MANIFEST, text))


def test_archives_that_would_fill_the_memory():
    stream = io.BytesIO()
    large = zipfile.ZipInfo(MANIFEST)
    large.compress_type = zipfile.ZIP_DEFLATED
    with zipfile.ZipFile(stream, "w") as archive, archive.open(large, "w", force_zip64=True) as member:
        member.write(bytes(1 << 24))
    with pytest.raises(RunFileError, match="more than any run"):
        load_run(io.BytesIO(stream.getvalue()))


def test_files_that_are_none(tmp_path):
    with pytest.raises(RunFileError, match="cannot read"):
        load_run(tmp_path / "nothing.zg")
    (tmp_path / "text.zg").write_text("hello")
    with pytest.raises(RunFileError, match=r"no run file.*zgraph trace"):
        load_run(tmp_path / "text.zg")


def damaged(original: bytes, dice: random.Random) -> bytes:
    """The same bytes cut, changed, repeated or with others among them."""
    at, length = dice.randrange(len(original)), dice.randrange(1, 40)
    match dice.randrange(5):
        case 0:
            return original[:at]
        case 1:
            return original[:at] + dice.randbytes(length) + original[at + length :]
        case 2:
            return original[:at] + original[at + length :]
        case 3:
            return original[: at + length] + original[at:]
        case _:
            return original[:at] + bytes([original[at] ^ 1 << dice.randrange(8)]) + original[at + 1 :]


def test_damaged_runs_are_errors_and_nothing_else(run):
    """Five thousand of them."""
    original, dice = data(run), random.Random(0)
    refused = 0
    for _ in range(5000):
        try:
            found = load_run(io.BytesIO(damaged(original, dice)))
            found.graph("captured")
            found.graph("final")
            _ = found.timeline
        except ZgraphError:
            refused += 1
    assert refused > 2500


def test_damaged_timelines_are_errors_and_nothing_else(run):
    """Two thousand of them: what is no timeline is refused; what is one has no times and bytes below zero."""
    dice, refused = random.Random(2), 0
    for _ in range(2000):
        found = replace(run, predicted=damaged(run.predicted, dice))
        try:
            timeline = found.timeline
        except RunFileError:
            refused += 1
        else:
            assert timeline is not None
            assert all(0 <= s.start_us <= inf and 0 <= s.end_us < inf and s.lane in LANES for s in timeline.spans)
            assert all(m.total_bytes >= 0 for m in timeline.memory.moments)
    assert refused > 1000


def test_the_timeline_is_in_the_file(run):
    """As it is simulated; and simulated where the file has none, or that of another graph or of other costs."""
    expected = simulate(make_plan(run.graph()), CONTEXT.costs, CONTEXT.hints)
    back = load_run(io.BytesIO(data(run)))
    assert back.timeline == expected
    assert not back._graphs
    assert replace(run, predicted=b"").timeline == expected
    slower = CONTEXT.costs.model_copy(update={"hardware": hardware("h100")})
    other = run.manifest.model_copy(update={"context": replace(CONTEXT, costs=slower)})
    assert replace(back, manifest=other).timeline != expected
    back.texts[back.member("final")] = back.texts[back.member("final")].replace("aten.relu", "aten.gelu")
    edited = load_run(io.BytesIO(data(back)))
    assert edited.timeline is not None
    assert "aten.gelu.default" in {s.op for s in edited.timeline.spans}


def test_what_cannot_be_planned_has_no_timeline():
    graph = parse_graph(SMALL)
    recording = Recording(graph)
    parse_recipe("partition(stage=3)").run(graph, CONTEXT, [recording])
    found = recording.run_file(Provenance(model="Small"), CONTEXT)
    assert found.timeline is None
    assert load_run(io.BytesIO(data(found))).timeline is None


def test_damaged_graphs_are_errors_and_nothing_else(run):
    """Five thousand of them: a text either parses or is a ZirError."""
    original, dice = run.texts[run.manifest.snapshots[-1].member].encode(), random.Random(1)
    refused = 0
    for _ in range(5000):
        text = damaged(original, dice).decode(errors="replace")
        try:
            parse_graph(text)
        except ZirError:
            refused += 1
    assert refused > 2500


def test_a_later_version_can_say_more_of_nothing(run):
    """The file's description of itself is checked: a typo is not silently ignored."""
    text = run.manifest.model_dump_json().replace('"snapshots"', '"snapshot"').encode()
    with pytest.raises(RunFileError, match="snapshots: Field required"):
        load_run(rewritten(run, MANIFEST, text))


def test_versions_are_there(run):
    assert run.manifest.provenance.zgraph == zgraph.__version__
