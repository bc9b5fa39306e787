"""The README and docs/: their code runs, their commands print what they show, their links lead somewhere.

A block of `python` is run by itself; below `<!-- continues -->`, with the names of the page's blocks before it. A block
of `console` is run command by command, and each line shown must be printed in that order, where `...` stands for
anything. `<!-- exit code: N -->` above says how its last command ends, `<!-- not run: reason -->` leaves a block out.
"""

import io
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.distributed as dist

from tests.house.rooms import ROOT
from zgraph.cli.main import main
from zgraph.passes.core import registry

README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]
LINKED = [
    *PAGES,
    *(
        ROOT / name
        for name in (
            "AGENTS.md",
            "CONTRIBUTING.md",
            "CHANGELOG.md",
            "benchmarks/README.md",
            "examples/README.md",
            "passes/README.md",
        )
    ),
]

MOST_LINES, MOST_NUMBERS, MOST_LINKS = 120, 20, 20

_FENCE = re.compile(r"(?:^<!-- (?P<note>[^\n]*?) -->\n)?^```(?P<kind>\w+)\n(?P<text>.*?)^```$", re.M | re.S)
_LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")


@dataclass(frozen=True)
class Block:
    """A block of a page, the line that it begins in, and what is said above it."""

    page: Path
    line: int
    kind: str
    text: str
    note: str

    def __str__(self) -> str:
        return f"{self.page.stem}:{self.line}"

    @property
    def is_run(self) -> bool:
        return not self.note.startswith("not run: ")


def blocks(page: Path, kind: str) -> list[Block]:
    text = page.read_text()
    found = []
    for match in _FENCE.finditer(text):
        if match["kind"] == kind:
            line = text.count("\n", 0, match.start("text"))
            found.append(Block(page, line, kind, match["text"], match["note"] or ""))
    return found


def pages_with(kind: str) -> list[Path]:
    return [page for page in PAGES if any(block.is_run for block in blocks(page, kind))]


@pytest.fixture(autouse=True)
def _alone(monkeypatch):
    """Passes that a page registers are forgotten after it, and the group that a Trainer made."""
    monkeypatch.setattr(registry, "_registered", {})
    torch.compiler.reset()
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


def test_every_note_is_understood():
    for page in PAGES:
        for match in _FENCE.finditer(page.read_text()):
            if match["note"] and match["kind"] in ("python", "console"):
                assert re.fullmatch(r"not run: \S.+|continues|exit code: [123]", match["note"]), (
                    f"{page.name}: {match['note']}"
                )


@pytest.mark.parametrize("page", [page for page in pages_with("python") if page != README], ids=lambda page: page.stem)
def test_python(page, tmp_path, monkeypatch):
    """The README's block is a file of the examples, which its console block runs on two ranks."""
    monkeypatch.chdir(tmp_path)
    known: dict[str, object] = {}
    for block in blocks(page, "python"):
        if block.is_run:
            module = ModuleType("page")  # torch.compile looks up the module of what it meets
            monkeypatch.setitem(sys.modules, "page", module)
            names = module.__dict__
            names |= known if block.note == "continues" else {}
            exec(compile("\n" * block.line + block.text, page, "exec"), names)
            known |= names


def run(command: str, folder: Path, monkeypatch, capfd) -> tuple[str, int]:
    """Output of a command, on both streams, and its exit code."""
    words = shlex.split(command)
    if words[0] == "zgraph":
        torch.compiler.reset()
        monkeypatch.setattr(registry, "_registered", {})
        monkeypatch.setattr(sys, "argv", words)
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO()))
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        said, code = capfd.readouterr(), ended.value.code or 0
        printed = said.out + said.err
    else:
        bins = {"torchrun": [sys.executable, "-m", "torch.distributed.run", "--standalone"], "python": [sys.executable]}
        assert words[0] in bins, f"nothing is known of the command {words[0]}"
        env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        done = subprocess.run([*bins[words[0]], *words[1:]], cwd=folder, env=env, capture_output=True, text=True)
        printed, code = done.stdout + (done.stderr if done.returncode else ""), done.returncode
    return printed, int(code)


def differs(shown: str, printed: str) -> str:
    """The first line shown that was not printed in its place; nothing if all were.

    Without `...` before it, a line must be the next one; `...` within a line stands for any part of it, and alone for
    any lines. Blanks count as one.
    """
    lines = [" ".join(line.split()) for line in printed.splitlines()]
    lines = [line for line in lines if line]
    at, may_skip = 0, False
    for line in shown.splitlines():
        wanted = " ".join(line.split())
        if wanted == "...":
            may_skip = True
            continue
        pattern = re.compile(".*".join(map(re.escape, wanted.split("..."))))
        candidates = range(at, len(lines)) if may_skip else range(at, min(at + 1, len(lines)))
        here = next((i for i in candidates if pattern.fullmatch(lines[i])), None)
        if here is None:
            return line
        at, may_skip = here + 1, False
    return "" if may_skip or at == len(lines) or not shown else f"(the end, before {lines[at]!r})"


@pytest.mark.parametrize("page", pages_with("console"), ids=lambda page: page.stem)
def test_console(page, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "300")  # no line is folded
    shutil.copytree(ROOT / "examples", tmp_path / "examples", ignore=shutil.ignore_patterns("__pycache__"))
    for block in blocks(page, "console"):
        if not block.is_run:
            continue
        codes = []
        for part in re.split(r"^\$ ", block.text, flags=re.M)[1:]:
            command, _, shown = part.partition("\n")
            printed, code = run(command, tmp_path, monkeypatch, capfd)
            wrong = differs(shown, printed)
            assert not wrong, f"{block}: `{command}` did not print {wrong}\nbut\n{printed}"
            codes.append(code)
        assert codes == [0] * (len(codes) - 1) + [int(block.note.removeprefix("exit code: ") or 0)], str(block)


def test_a_line_that_was_not_printed_is_noticed():
    printed = "one 1 ms\n\ntwo\nthree\n"
    assert not differs("one ... ms\ntwo\nthree\n", printed)
    assert not differs("...\ntwo\n...\n", printed)
    assert not differs("", printed)
    assert differs("one 2 ms\n...\n", printed) == "one 2 ms"
    assert differs("...\nthree\ntwo\n", printed) == "two"
    assert differs("one ... ms\nthree\n", printed) == "three"
    assert differs("one ... ms\ntwo\n", printed) == "(the end, before 'three')"
    assert differs("two\n...\n", "") == "two"


def test_the_readme_has_the_example_as_it_is():
    assert "examples/train.py" in "".join(block.text for block in blocks(README, "console") if block.is_run)
    (block,) = blocks(README, "python")
    assert block.text == (ROOT / "examples" / "train.py").read_text()


def test_the_page_on_passes_has_the_example_as_it_is():
    example = (ROOT / "examples" / "own_pass.py").read_text()
    shown = blocks(ROOT / "docs" / "write-a-pass.md", "python")[0].text
    assert shown[shown.index("@zgraph.register_pass") :].rstrip() in example


def prose(text: str) -> str:
    """A page without its code."""
    return re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S)


def test_the_readme_is_short():
    text = README.read_text()
    assert len(text.splitlines()) <= MOST_LINES
    without_code = re.sub(r"`[^`]*`|\]\([^)]*\)", "", prose(text))
    numbers = re.findall(r"\d+(?:[.,]\d+)*", without_code)
    assert len(numbers) <= MOST_NUMBERS, numbers
    assert len(_LINK.findall(prose(text))) <= MOST_LINKS + 1  # and the picture


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and mkdocs make them of plain words."""
    titles = re.findall(r"^#+ +(.*)$", prose(page.read_text()), re.M)
    return {re.sub(r"[^\w -]", "", title.lower()).strip().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", LINKED, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for link in _LINK.findall(prose(page.read_text())):
        if re.match(r"https?://|mailto:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{page.name}: {link}"
        assert target.is_relative_to(ROOT), f"{page.name}: {link}"
        assert not anchor or anchor in anchors(target), f"{page.name}: {link}"


@pytest.mark.parametrize("page", LINKED, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_that_are_named_are_there(page):
    """Paths of the repository in backticks, and the modules of commands."""
    text = page.read_text()
    folders = "zgraph|passes|codegen|runtime|tests|docs|examples|benchmarks"
    for path in re.findall(rf"`((?:{folders})/[\w./-]+)`", text):
        assert (ROOT / path).exists(), f"{page.name}: {path}"
    for module in re.findall(r"python -m (benchmarks(?:\.\w+)+|zgraph(?:\.\w+)+)", text):
        path = ROOT / module.replace(".", "/")
        assert path.with_suffix(".py").exists() or path.is_dir(), f"{page.name}: {module}"


def test_no_page_installs_a_strangers_package():
    for page in LINKED:
        assert not re.search(r"pip install [^\n`]*[\"' ]zgraph\b(?!-compiler)", page.read_text()), page.name


def test_every_page_is_in_the_index_of_the_built_pages():
    nav = (ROOT / "mkdocs.yml").read_text()
    index = (ROOT / "docs" / "index.md").read_text()
    for page in (ROOT / "docs").glob("*.md"):
        assert re.search(rf"\b{page.name}\b", nav), page.name
        assert page.name == "index.md" or f"]({page.name})" in index, page.name
