"""Pages from outside of docs/: readers of the repository follow the same links as readers of the built pages."""

from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
OUTSIDE = {
    "benchmarks/README.md": "benchmarks.md",
    "benchmarks/results/curves-cpu.png": "curves-cpu.png",
    "passes/README.md": "passes.md",
    "examples/README.md": "examples.md",
    "CONTRIBUTING.md": "contributing.md",
    "AGENTS.md": "agents.md",
    "CHANGELOG.md": "changelog.md",
}
"""Files of the repository that are pages, and what each is called there."""


def on_files(files: Files, config: Any) -> Files:
    """Add the files from outside."""
    for path, page in OUTSIDE.items():
        found = ROOT / path
        if found.suffix == ".md":
            text = found.read_text().replace("](../docs/", "](").replace("](docs/", "](")
            for other, its_page in OUTSIDE.items():
                text = text.replace(f"]({other})", f"]({its_page})")
            files.append(File.generated(config, page, content=text))
        else:
            files.append(File.generated(config, page, abs_src_path=str(found)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Point links that leave docs/ to the pages that these files have become."""
    for path, page in OUTSIDE.items():
        markdown = markdown.replace(f"](../{path}", f"]({page}")
    return markdown
