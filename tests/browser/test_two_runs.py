"""Two runs on one page: passes by name, figures with differences, and one scale."""

from dataclasses import replace

import pytest
from playwright.sync_api import Page, expect

from zgraph.runfile.format import RunFile
from zgraph.viz.headline import duration, figures, size
from zgraph.viz.page import page as page_of


@pytest.fixture(scope="session")
def both(run: RunFile, other: RunFile) -> str:
    return page_of(run, other, ("a.zg", "b.zg"))


@pytest.fixture
def shown(opened, both) -> Page:
    page = opened(both, width=1440)
    page.wait_for_selector("body[data-ready]")
    return page


def test_the_slider_goes_by_the_names_of_both(shown, run, other):
    names = shown.locator("#stops b").all_inner_texts()
    assert set(names) == {*run.names, *other.names}
    assert [n for n in names if n in run.names] == [*run.names]
    for name in ("bucket", "release"):
        shown.locator("#stops button", has_text=name).click()
        for part in ("#what-changed", "#what-changed-2"):
            expect(shown.locator(part)).to_contain_text(f"{name}: ")
    assert "keep" in run.names
    assert "keep" not in other.names
    shown.locator("#stops button", has_text="keep").click()
    expect(shown.locator("#what-changed")).to_contain_text("keep: ")
    expect(shown.locator("#what-changed-2")).to_have_text("no such pass here; as after fit")


def test_figures_that_differ_have_their_difference(shown, run, other):
    a, b = figures(run), figures(other)
    rows = {row[0]: row[1:] for row in (r.split("\t") for r in shown.locator(".figures tr").all_inner_texts())}
    share = f"{100 * abs(b.peak_bytes / a.peak_bytes - 1):.1f}"
    told = [text.replace("\N{NO-BREAK SPACE}", " ") for text in rows["peak"]]
    assert told == [size(a.peak_bytes), size(b.peak_bytes), f"+{size(b.peak_bytes - a.peak_bytes)} (+{share} %)"]
    assert rows["step"][:2] == [duration(a.step_us), duration(b.step_us)]
    assert {"exposed", "sent by a rank"} <= rows.keys()
    assert "at rest" not in rows  # it is the same


def test_runs_alike_have_no_figures(opened, run):
    page = opened(page_of(run, run, ("a.zg", "b.zg")))
    expect(page.locator("#headline")).to_contain_text("No figure of the two runs differs")


def test_times_and_bytes_are_on_one_scale(opened, run, other):
    slow = replace(other.timeline, step_us=2 * run.timeline.step_us)
    longer = replace(other, predicted=b"")
    longer.__dict__["timeline"] = slow
    page = opened(page_of(run, longer, ("a.zg", "b.zg")), width=1440)
    page.wait_for_selector("body[data-ready]")
    scale = "() => report.apps.map(app => [app.charts.from, app.charts.to, app.charts.top])"
    first, second = page.evaluate(scale)
    assert first == second
    assert first[1] == pytest.approx(slow.step_us)
    page.locator("#timeline-2").scroll_into_view_if_needed()
    box = page.locator("#timeline-2").bounding_box()
    page.mouse.move(box["x"] + 600, box["y"] + 40)
    page.mouse.wheel(0, -600)
    page.wait_for_function("() => report.apps[0].charts.to < report.apps[0].charts.end / 2")
    first, second = page.evaluate(scale)
    assert first == second


def test_a_node_selected_in_one_is_selected_in_the_other(shown, run, other):
    names = {n.name for n in run.graph().nodes} & {n.name for n in other.graph().nodes}
    node = next(n.name for n in run.graph().nodes if n.name in names and n.op == "aten.mm.default")
    shown.locator("#query").fill(f"%{node}")
    shown.locator("#query").press("Enter")
    for part in ("#graph", "#graph-2"):
        expect(shown.locator(f"{part} .selected .value")).to_contain_text(f"%{node}"[:20])
    expect(shown.locator("#details h2")).to_have_text(f"%{node}")


def test_an_address_names_a_node_of_the_second(opened, both, run, other):
    only = next(n.name for n in other.graph().nodes if n.name not in {m.name for m in run.graph().nodes} and n.results)
    page = opened(both, address=f"#node={only}&run=2")
    expect(page.locator("#details h2")).to_have_text(f"%{only}")
    expect(page.locator("#graph-2 .selected")).to_be_visible()


@pytest.mark.parametrize("width", [390, 768, 1440])
def test_nothing_reaches_over_the_side(opened, both, width):
    page = opened(both, width=width)
    page.wait_for_selector("body[data-ready]")
    assert page.evaluate("document.scrollingElement.scrollWidth <= innerWidth")
