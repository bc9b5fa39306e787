"""The gallery of the documentation: known models, traced for hardware that is not here, and their reports as pictures.

    python -m benchmarks.gallery

It writes `docs/gallery.md`, the pictures beside it and the README's. A run file that is in the folder already is taken
as it is; to trace them all takes ten minutes of a core. Needs Debian's chromium.
"""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from playwright.sync_api import Browser, sync_playwright

from benchmarks.page import FLAGS
from zgraph.runfile.format import RunFile, load_run
from zgraph.viz.headline import headline
from zgraph.viz.page import page as page_of

DOCS = Path(__file__).parents[1] / "docs"

WIDTH, HEIGHT = 1280, 860

README_MODEL, README_STATE = "llama3_70b", "#pass=all-gather&node=primals_365_full_start"
"""Model and view of the README's picture, `docs/report.png`."""


@dataclass(frozen=True)
class Entry:
    """A picture: the function of `benchmarks/gallery_models.py`, what it is traced for, and what to say of it."""

    model: str
    title: str
    options: str
    note: str = ""

    @property
    def command(self) -> str:
        return f"zgraph trace benchmarks/gallery_models.py:{self.model} {self.options} -o {self.model}.zg"


ENTRIES = (
    Entry("llama3_8b", "Llama-3 8B", "--hardware 1x8-h100", "A row of 2,048 tokens a rank."),
    Entry("llama3_70b", "Llama-3 70B", "--hardware 8x8-h100", "A row of 2,048 tokens a rank."),
    Entry("gpt2", "GPT-2", "--hardware 1x8-h100 --batch 8 --seq 1024", "Eight rows of 1,024 tokens a rank."),
    Entry("vit", "ViT-B/16", "--hardware 1x8-h100", "32 pictures of 224 x 224 pixels a rank."),
    Entry(
        "mixtral",
        "Mixtral 8x7B",
        "--hardware 1x8-h200",
        "A row of 2,048 tokens a rank. Tokens find their experts in a grouped matmul, whose shapes do not depend on "
        "the data: it is counted as that of as many rows in one matmul, however they spread. A parameter is sharded by "
        "its first dimension, here that of the eight experts, so that on more than eight ranks none holds less: the "
        "80 GB of an H100 do not do.",
    ),
)


def main(
    folder: Annotated[Path, typer.Option(help="Where the run files are, or are written.")] = Path("build/gallery"),
) -> None:
    """Write the gallery."""
    chromium = shutil.which("chromium")
    if chromium is None:
        raise SystemExit("there is no chromium: apt-get install chromium")
    folder.mkdir(parents=True, exist_ok=True)
    sections = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=[*FLAGS])
        for entry in ENTRIES:
            run = _traced(entry, folder)
            _picture(browser, page_of(run), folder / f"{entry.model}.html", DOCS / f"gallery-{entry.model}.png")
            if entry.model == README_MODEL:
                _picture(browser, page_of(run), folder / "report.html", DOCS / "report.png", README_STATE)
            sections.append(_section(entry, run))
            print(f"{entry.title}: {headline(run)[0]}")
    (DOCS / "gallery.md").write_text(HEAD + "\n".join(sections))


def _traced(entry: Entry, folder: Path) -> RunFile:
    file = folder / f"{entry.model}.zg"
    if not file.exists():
        words = shlex.split(entry.command)[1:-1]
        subprocess.run([sys.executable, "-m", "zgraph", *words, str(file)], cwd=DOCS.parent, check=True)
    return load_run(file)


def _picture(browser: Browser, text: str, file: Path, target: Path, state: str = "") -> None:
    """Save what the page shows first, or at the state of an address."""
    file.write_text(text)
    page = browser.new_page(viewport={"width": WIDTH, "height": HEIGHT})
    page.goto(file.resolve().as_uri() + state)
    page.wait_for_selector("body[data-ready]")
    page.screenshot(path=target)
    page.close()


HEAD = (
    "# Gallery\n\n"
    "Reports of known models at ZeRO stage 3, predicted for hardware that is not here; nothing below was measured. The "
    "models are those of `benchmarks/gallery_models.py`, by their published configurations and without weights. "
    "`python -m benchmarks.gallery` makes this page and its pictures; `zgraph view FILE` makes the report itself, to "
    "move in.\n\n"
)


def _section(entry: Entry, run: RunFile) -> str:
    nodes = len(run.graph().nodes)
    return f"""## {entry.title}

{" ".join(headline(run))} {entry.note}

<!-- not run: minutes of a core -->
```console
$ {entry.command}
$ zgraph view {entry.model}.zg -o {entry.model}.html
```

![The report of {entry.title}: {nodes:,} nodes](gallery-{entry.model}.png)
"""


if __name__ == "__main__":
    typer.run(main)
