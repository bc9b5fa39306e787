"""Limits of a file from elsewhere; it may not open others, fill the memory, or speak to the terminal."""

import io
import json
import re
import resource
import subprocess
import sys
import warnings
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from tests.cli.graphs import long
from zgraph.cli.main import main
from zgraph.cli.terminal import printable
from zgraph.codegen.spec import KernelSpec
from zgraph.cost import CostTable, hardware, load_table, simulate
from zgraph.cost.hardware import load
from zgraph.debugging.bisection import _sources
from zgraph.debugging.hunks import Hunks
from zgraph.errors import HardwareError, KernelError, RunFileError, VerifyError, ZgraphError, ZirError
from zgraph.ir import Graph, Origin, parse_graph, verify
from zgraph.ir.lines import node_lines, read_line
from zgraph.passes import Context, make_plan
from zgraph.runfile.explain import explain
from zgraph.runfile.format import MANIFEST, Provenance, RunFile, load_run, run_file
from zgraph.runfile.sources import MAX_CHARACTERS, context_of, line_of, sources_of
from zgraph.viz.page import page

MEMBER = "graphs/00-captured.zir"


def a_run(graph: Graph | None = None, **more: object) -> RunFile:
    return run_file([("captured", graph or long(), 0.0)], Provenance(model="Small"), Context(), **more)  # type: ignore[arg-type]


def data(run: RunFile) -> bytes:
    stream = io.BytesIO()
    run.save(stream)
    return stream.getvalue()


def from_file(graph: Graph, file: str, line: int, module: str = "m") -> Graph:
    return graph.with_nodes([replace(n, origin=Origin(module, file, line)) for n in graph.nodes])


# --- paths -------------------------------------------------------------------------------------------------------


def test_nothing_opens_what_the_nodes_of_a_file_name(tmp_path):
    """Neither the page, nor an explanation, nor bisect; nor does the run that is written with what was read."""
    (tmp_path / "secret.txt").write_text("first\nthe secret\nthird\n")
    graph = from_file(long(), str(tmp_path / "secret.txt"), 2)
    run = load_run(io.BytesIO(data(a_run(graph))))
    found = explain(run, graph.nodes[0].name)
    assert found.source == f"{tmp_path / 'secret.txt'}:2"
    assert "the secret" not in page(run)
    hunks = Hunks(graph, graph.with_nodes(graph.nodes[:-1]))
    assert _sources([change for hunk in hunks.hunks for change in hunk], run.sources)
    assert "secret" not in str(context_of(run.sources, [(str(tmp_path / "secret.txt"), 2)]))


@pytest.fixture(scope="module")
def opened() -> list[str]:
    """The paths that are opened from now on."""
    found: list[str] = []
    sys.addaudithook(lambda event, args: found.append(str(args[0])) if event == "open" else None)
    return found


OPENING = [("view",), ("explain",), ("opt", "-o", "new.zg"), ("bisect",), ("reduce",)]


@pytest.mark.parametrize("arguments", OPENING, ids=str)
def test_no_command_opens_them(arguments, opened, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    Path("secret.txt").write_text("the secret\n")
    graph = from_file(long(), str(tmp_path / "secret.txt"), 1)
    a_run(graph).save(Path("run.zg"))
    node = [f"%{graph.nodes[0].name}"] if arguments[0] == "explain" else []
    opened.clear()
    monkeypatch.setattr("sys.argv", ["zgraph", arguments[0], "run.zg", *node, *arguments[1:]])
    with pytest.raises(SystemExit):
        main()
    assert not [path for path in opened if "secret" in path]
    said = capfd.readouterr()
    assert "the secret" not in said.out + said.err
    for made in Path().glob("*.zg"):
        assert not load_run(made).sources


def test_lines_are_taken_where_a_graph_is_captured(tmp_path):
    file = tmp_path / "model.py"
    file.write_text("".join(f"line {n}{'!' * 1000 * (n == 9)}\n" for n in range(1, 21)))
    graph = from_file(long(), str(file), 8)
    run = load_run(io.BytesIO(data(a_run(graph, sources=sources_of(graph)))))
    file.unlink()
    assert explain(run, graph.nodes[0].name).source == f"{file}:8  line 8"
    assert line_of(run.sources, Origin(file=str(file), line=8)) == "line 8"
    (around,) = context_of(run.sources, [(str(file), 8)])[str(file)].values()
    assert [line.partition("!")[0] for line in around] == [f"line {n}" for n in range(5, 12)]
    assert max(map(len, around)) == MAX_CHARACTERS
    assert not sources_of(from_file(long(), str(tmp_path / "none.py"), 3))
    assert not sources_of(from_file(long(), str(file), 10**6))


@pytest.mark.parametrize("text", ["[]", '{"a": {"x": "y"}}', '{"a": {"0": "y"}}', '{"a": {"1": 3}}', "{", "[" * 10**5])
def test_source_lines_that_are_none(text):
    with pytest.raises(RunFileError, match="source lines are damaged"):
        load_run(with_members({"sources.json": text.encode()}))


# --- sizes -------------------------------------------------------------------------------------------------------


def with_members(members: dict[str, bytes], twice: str = "") -> io.BytesIO:
    """A run with other members, or with one more."""
    stream = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data(a_run()))) as old, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = {name: old.read(name) for name in old.namelist()} | members
        with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as new:
            for name in [*found, *([twice] if twice else [])]:
                new.writestr(name, found[name])
    return io.BytesIO(stream.getvalue())


BOMBS = {
    "a million lines": (MEMBER, lambda: b"ab\n" * 1_000_000),
    "a long line": (MEMBER, lambda: b'graph "g"\n' + b"a" * (3 << 19)),
    "many members": ("x", lambda: b""),
    "zeros": (MANIFEST, lambda: bytes(50_000_000)),
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_files_that_would_fill_the_memory(bomb):
    """A file of 60 KB takes no more than 64 MB of memory, and less than 5 s of a core, to be refused."""
    member, text = BOMBS[bomb]
    members = {f"x{i}": b"" for i in range(1200)} if bomb == "many members" else {member: text()}
    archive = with_members(members).getvalue()
    assert len(archive) < 200_000
    script = (
        "import io, resource, sys\nfrom zgraph.errors import RunFileError\nfrom zgraph.runfile.format import load_run\n"
        "before, data = resource.getrusage(resource.RUSAGE_SELF), io.BytesIO(sys.stdin.buffer.read())\n"
        "try:\n    load_run(data)\nexcept RunFileError as error:\n    print(error)\n"
        "after = resource.getrusage(resource.RUSAGE_SELF)\n"
        "print(after.ru_maxrss - before.ru_maxrss, after.ru_utime - before.ru_utime)"
    )
    ended = subprocess.run([sys.executable, "-c", script], input=archive, capture_output=True, check=True)
    said, used = ended.stdout.decode().splitlines()
    assert "more than any run" in said
    kib, seconds = map(float, used.split())
    assert kib < 64 << 10
    assert seconds < 5


def test_lines_are_read_one_at_a_time():
    """A text of a million lines that is wrong in its first takes no more memory than the text."""
    text = "no graph\n" + "ab\n" * 3_000_000
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ZirError, match="line 1"):
        parse_graph(text)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10


def test_a_member_that_is_there_twice_is_refused():
    with pytest.raises(RunFileError, match=r"'run\.json' twice"):
        load_run(with_members({}, twice=MANIFEST))


def test_the_largest_runs_are_read():
    """27,000 nodes after 14 passes: 50 MB of text."""
    lines = ['graph "large"', "op aten.neg.default", "input %v: f32[8192, 28672]"]
    for i in range(27_000):
        origin = f'@ "model.layers.{i % 80}.mlp" "/home/user/modeling.py":{i % 900}'
        lines.append(f"fwd %node_{i}: f32[8192, 28672] = aten.neg.default(%v) {origin}")
    whole = "\n".join(lines) + "\n"
    run = a_run()
    members = {f"graphs/{n:02d}-x.zir": whole.replace("f32", "f32" if n % 2 else "f64") for n in range(15)}
    shots = tuple(replace_member(run, member) for member in members)
    large = RunFile(run.manifest.model_copy(update={"snapshots": shots}), members)
    packed = data(large)
    assert sum(map(len, members.values())) / len(packed) < 100
    assert load_run(io.BytesIO(packed)).texts == members


def replace_member(run: RunFile, member: str) -> object:
    return run.manifest.snapshots[0].model_copy(update={"member": member})


# --- the terminal --------------------------------------------------------------------------------------------------

RAW = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
NASTY = "m\x1b[2J\x9b31m\u202e\x07"


@pytest.mark.parametrize(
    "arguments",
    [
        ("explain", "run.zg", "%NODE"),
        ("show", "run.zg"),
        ("show", "run.zg", "--op", "aten"),
        ("explain", "run.zg", "%\x1b[2J"),
        ("diff", "run.zg@0", "@0"),
        ("verify", "bad.zg"),
        ("bisect", "bad.zg"),
        ("show", "\x1b[2J.zg"),
        ("show", "raw.zg"),
        ("export", "run.zg", "--dot", "-"),
        ("diff", "run.zg@0", "raw.zg@0"),
        ("verify", "raw.zg"),
    ],
    ids=repr,
)
def test_texts_of_a_file_never_command_the_terminal(arguments, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    graph = from_file(long(), NASTY, 3, NASTY)
    a_run(graph).save(Path("run.zg"))
    a_run(graph.with_nodes(graph.nodes[1:])).save(Path("bad.zg"))
    raw = a_run(graph)
    raw.texts[MEMBER] = raw.texts[MEMBER].replace('"', f'"{NASTY}').replace("fwd ", f"#{NASTY}\nfwd ")
    raw.save(Path("raw.zg"))
    monkeypatch.setattr("sys.argv", ["zgraph", *(a.replace("NODE", graph.nodes[0].name) for a in arguments)])
    with pytest.raises(SystemExit):
        main()
    said = capfd.readouterr()
    assert said.out + said.err
    assert not RAW.search(said.out + said.err)


def test_what_is_printable_stays_as_it_is():
    assert printable("plain, ünïcode ∂ 漢字\tand\nlines") == "plain, ünïcode ∂ 漢字\tand\nlines"
    assert printable("\x1b\x9b\u202e\r") == "\\x1b\\x9b\\u202e\\r"


# --- errors that say what is wrong ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["f32[²]", "f32[4]<S²>", "f32[4]<S٣>", "f32[٣]<S0>"])
def test_digits_are_those_of_ascii(kind):
    with pytest.raises(ZirError, match="line 2"):
        parse_graph(f'graph "g" mesh(shard=2)\ninput %x: {kind}\n')


GATHER = """graph "g" mesh(shard=2)
param %w: f32[s0, 2]<S0> "w"
fwd %f: future f32[s0, 2]<R> = all_gather_start(%w)
fwd %y: f32[s0, 2]<R> = wait(%f)
return fwd output %y
"""


def test_sizes_of_shards_must_be_known():
    graph = parse_graph(GATHER)
    with pytest.raises(VerifyError, match=r"\[placements\].*%w is sharded, but its size s0 is not known"):
        verify(graph)
    with pytest.raises(ZgraphError, match="known sizes"):
        simulate(make_plan(graph), CostTable(hardware=hardware("h100")), {})


NAMES = [
    "9" * 5000 + "x8-h100",
    "a" * 5000,
    "\0.toml",
    "a" * 5000 + ".toml",
    "²x8-h100",
    "0x8-h100",
    "1x0-h100",
    "x\x1b",
]


@pytest.mark.parametrize("name", NAMES, ids=range(len(NAMES)))
def test_hardware_that_is_none(name):
    with pytest.raises(HardwareError) as caught:
        hardware(name)
    assert len(str(caught.value)) < 1000


def profile(**changed: object) -> str:
    """A profile whose fields are others."""
    text = (Path(sys.modules["zgraph.cost.hardware"].__file__ or "").parent / "profiles" / "h100.toml").read_text()
    for name, value in changed.items():
        text, count = re.subn(rf"(?m)^{name} = .*$", f"{name} = {value}", text)
        assert count
    return text


@pytest.mark.parametrize("value", ["0", "-1", "nan", "inf", "-inf", "0.0"])
@pytest.mark.parametrize("field", ["f32", "bf16", "memory_bytes_per_s", "bytes_per_s", "memory_bytes"])
def test_rates_are_numbers_above_zero(field, value, tmp_path):
    (tmp_path / "x.toml").write_text(profile(**{field: value}))
    with pytest.raises(HardwareError, match=rf"x.toml is no hardware profile: .*{field}"):
        load(tmp_path / "x.toml")


@pytest.mark.parametrize(
    "text", [b"\xff\xfe", b"a = " + b"[" * 100_000, b"x" * (2 << 20), b"\0", b"a = " + b"{b=" * 9999]
)
def test_files_that_are_no_profiles(text, tmp_path):
    (tmp_path / "x.toml").write_bytes(text)
    with pytest.raises(HardwareError, match=r"x\.toml is no TOML"):
        load(tmp_path / "x.toml")
    with pytest.raises(HardwareError, match="is no cost table"):
        load_table(tmp_path / "x.toml")


@pytest.mark.parametrize(
    "changed", [{"ops": {"a": -1}}, {"per_host": -1}, {"groups": {"a": {"aten": -1}}}, {"ops": {"a": "NaN"}}]
)
def test_tables_whose_numbers_mean_nothing(changed, tmp_path):
    (tmp_path / "x.json").write_text(
        json.dumps(CostTable(hardware=hardware("h100")).model_dump() | changed, default=dict)
    )
    with pytest.raises(HardwareError, match=f"x.json is no cost table: {next(iter(changed))}"):
        load_table(tmp_path / "x.json")


@pytest.mark.parametrize("line", ["fwd ", "fwd %", "fwd x", 'fwd %y: int = aten.a.b() @ "\\q"', "fwd =("])
def test_lines_that_are_no_nodes(line):
    with pytest.raises(ZirError):
        _ = [read_line(text, key).origin for key, text in node_lines(line).items()]


@pytest.mark.parametrize("columns", ["9" * 5000, "٣", "²"])
def test_columns_of_a_kernel_are_a_number(columns):
    with pytest.raises(KernelError, match="expected NAME COLUMNS"):
        KernelSpec.parse(f"rms {columns}: x bf16[M,N] -> y bf16[M,N]; y = mul(x, x)")
