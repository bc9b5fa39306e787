"""Cost of the HTML report of a run: bytes, until it answers, and frames while its pictures are zoomed.

    python -m benchmarks.page run.zg --json benchmarks/results/page-llama3-70b.json

Needs Debian's chromium. Frames are the times between callbacks before a repaint, while the wheel turns in each.
"""

from __future__ import annotations

import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Annotated

import typer
from playwright.sync_api import Page, sync_playwright

from benchmarks.results import write
from zgraph.runfile.format import load_run
from zgraph.viz.page import page as page_of

FLAGS = ("--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-sync", "--no-first-run")

FRAMES = """
([id, count]) => new Promise(done => {
    const target = document.getElementById(id), box = target.getBoundingClientRect(), times = [];
    let last = performance.now();
    const turn = () => {
        const now = performance.now();
        times.push(now - last);
        last = now;
        if (times.length > count) return done(times.slice(1));
        const deltaY = times.length <= count / 2 ? -60 : 60;
        target.dispatchEvent(new WheelEvent("wheel", {
            deltaY, clientX: box.x + box.width / 2, clientY: box.y + box.height / 2, bubbles: true, cancelable: true,
        }));
        requestAnimationFrame(turn);
    };
    requestAnimationFrame(turn);
})
"""


def main(
    run: Annotated[Path, typer.Argument(help="A run file, such as zgraph trace writes.")],
    rounds: Annotated[int, typer.Option(min=1)] = 3,
    frames: Annotated[int, typer.Option(min=10, help="Frames to measure in each picture.")] = 120,
    json: Annotated[Path | None, typer.Option(help="Where to save the result.")] = None,
) -> None:
    """Measure the report of a run."""
    chromium = shutil.which("chromium")
    if chromium is None:
        raise SystemExit("there is no chromium: apt-get install chromium")
    loaded = load_run(run)
    begin = time.perf_counter()
    text = page_of(loaded)
    drawing_s = time.perf_counter() - begin
    ready_ms: list[float] = []
    zoom_ms: dict[str, list[float]] = {"timeline": [], "graph": []}
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        file = Path(folder) / "report.html"
        file.write_text(text)
        browser = playwright.chromium.launch(executable_path=chromium, args=[*FLAGS])
        for _ in range(rounds):
            page = browser.new_page(viewport={"width": 1920, "height": 1080})
            page.goto(file.as_uri())
            page.wait_for_selector("body[data-ready]")
            ready_ms.append(float(page.evaluate("document.body.dataset.ready")))
            for name, found in zoom_ms.items():
                found += _zoomed(page, name, frames)
            page.close()
    result = {
        "nodes": len(loaded.graph().nodes),
        "graphs": len(loaded.names),
        "bytes": len(text),
        "drawing_s": drawing_s,
        "ready_ms": statistics.median(ready_ms),
        "frame_ms": {n: {"median": statistics.median(t), "worst": max(t)} for n, t in zoom_ms.items()},
    }
    print(f"{result['nodes']:,} nodes, {result['graphs']} graphs: {len(text) / 2**20:.2f} MiB in {drawing_s:.1f} s")
    print(f"answers after {result['ready_ms']:.0f} ms")
    for name, times in zoom_ms.items():
        print(f"zooming the {name}: {statistics.median(times):.1f} ms a frame, at most {max(times):.1f}")
    write(json, **result)


def _zoomed(page: Page, name: str, frames: int) -> list[float]:
    times: list[float] = page.evaluate(FRAMES, [name, frames])
    return times


if __name__ == "__main__":
    typer.run(main)
