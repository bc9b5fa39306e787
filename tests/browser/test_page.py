"""The HTML report, as someone uses it: in a browser, with the network off."""

from dataclasses import replace
from html import escape

import pytest
from playwright.sync_api import Page, expect

from zgraph.cost import simulate
from zgraph.cost.memory import alive_at_peak
from zgraph.ir import Graph, Origin, parse_graph
from zgraph.passes import Context, make_plan
from zgraph.runfile.diff import compare, node_lines
from zgraph.runfile.format import Provenance, run_file
from zgraph.viz.page import page as page_of

MAX_BYTES = 6 << 20

QUERY = "model.layers.3.self_attn.q_proj"


@pytest.fixture
def shown(opened, drawn) -> Page:
    page = opened(drawn)
    page.wait_for_selector("body[data-ready]")
    return page


def test_the_slider_shows_what_each_pass_did(shown, run):
    slider = shown.locator("#slider")
    slider.focus()
    slider.press("End")
    for at in reversed(range(1, len(run.names))):
        expect(slider).to_have_js_property("value", str(at))
        before, after = (run.texts[run.member(str(i))] for i in (at - 1, at))
        found = compare(before, after)
        counts = {"added": found.added, "removed": found.removed, "changed": found.changed, "moved": found.moved}
        words = ", ".join(f"{len(lines):,} {kind}" for kind, lines in counts.items() if lines)
        expect(shown.locator("#what-changed")).to_have_text(f"{run.names[at]}: {words or 'as it was'}")
        slider.press("ArrowLeft")
    expect(shown.locator("#what-changed")).to_have_text("as captured")


def test_what_a_pass_added_and_removed_is_marked_in_the_graph_and_in_the_text(shown, run):
    at = run.names.index("all-gather")
    shown.locator("#stops button").nth(at).click()
    shown.locator("#only-changed").check()
    chips = shown.locator('[data-group="forward"] .chips')
    before, after = (run.texts[run.member(str(i))] for i in (at - 1, at))
    added = compare(before, after).added
    forward = sum(line.text.startswith("fwd") for line in added)
    expect(chips).to_contain_text(f"+{forward}")
    shown.locator("#show-text").click()
    first = shown.locator(".line.added").first
    expect(first).to_contain_text("all_gather_start")
    assert first.inner_text().removeprefix("+") in {line.text for line in added}


def test_a_node_selected_in_the_graph_is_in_timeline_memory_and_details(shown, run):
    timeline = simulate(make_plan(run.graph()), run.context.costs, run.context.hints)
    span = next(s for s in timeline.spans if s.op == "all_gather_start" and s.phase == "fwd")
    node = next(n for n in run.graph().nodes if n.name == span.node)
    number = _number(shown, span.node)
    shown.locator("#stops button").last.click()
    shown.evaluate("node => zgraph.graph.reveal(node)", number)
    shown.locator(f'[data-node="{number}"]').click()

    expect(shown.locator("#details h2")).to_have_text(f"%{span.node}")
    expect(shown.locator("#details .module")).to_have_text(node.origin.module)
    expect(shown.locator("#details .source .here")).to_contain_text(str(node.origin.line))
    expect(shown.locator("#details")).to_contain_text("made by all-gather")
    view = shown.evaluate("({from: zgraph.charts.from, to: zgraph.charts.to})")
    assert view["from"] <= span.start_us < span.end_us <= view["to"]
    select = shown.evaluate("getComputedStyle(document.documentElement).getPropertyValue('--select').trim()")
    shown.wait_for_timeout(100)
    middle = (span.start_us + span.end_us) / 2
    assert _colours(shown, "timeline", middle) & {_rgb(select)}
    assert _colours(shown, "memory", middle) & {_rgb(select)}


def test_a_span_clicked_in_the_timeline_is_selected_in_the_graph(shown, run):
    timeline = simulate(make_plan(run.graph()), run.context.costs, run.context.hints)
    span = max((s for s in timeline.spans if s.lane == "compute"), key=lambda s: s.end_us - s.start_us)
    box = shown.locator("#timeline").bounding_box()
    x = shown.evaluate(
        "us => zgraph.charts.x(us, zgraph.charts.timeline.clientWidth)", (span.start_us + span.end_us) / 2
    )
    shown.mouse.click(box["x"] + x, box["y"] + 20 + 12)
    expect(shown.locator("#details h2")).to_have_text(f"%{span.node}")
    expect(shown.locator("#graph .selected .value")).to_contain_text(f"%{span.node}"[:20])
    expect(shown.locator("#graph .selected")).to_be_in_viewport()


def test_the_peak_shows_what_is_alive_at_it(shown, run):
    plan = make_plan(run.graph())
    timeline = simulate(plan, run.context.costs, run.context.hints)
    alive = alive_at_peak(plan, run.context.hints, timeline.memory)
    shown.locator("#to-peak").click()
    expect(shown.locator("#details")).to_contain_text("the peak")
    expect(shown.locator("#details")).to_contain_text(f"Alive now ({len(alive)})")
    names = shown.locator("#details .links li").all_inner_texts()
    assert [name.split()[0] for name in names[:5]] == [f"%{life.name}".rstrip("#") for life in alive[:5]]
    makers = {r.name: n.name for n in run.graph().nodes for r in n.results[1:]}
    member = next(life.name for life in alive if life.name in makers)  # of a bucket, which has several results
    shown.get_by_role("button", name=f"%{member}", exact=True).click()
    expect(shown.locator("#details h2")).to_have_text(f"%{makers[member]}")


def test_the_graph_is_as_it_was_when_it_shows_again(shown):
    """Controls that move the graph are not there beside the text, and keys that do wait for the graph."""
    before = shown.evaluate("zgraph.graph.view")
    shown.locator("#show-text").click()
    expect(shown.locator("#fit")).to_be_hidden()
    shown.keyboard.press("0")
    shown.locator("#show-graph").click()
    assert shown.evaluate("zgraph.graph.view") == before


def test_search_finds_a_node_and_shows_it(shown, run):
    shown.keyboard.press("/")
    shown.keyboard.type("aten.mm layers.3 q_proj")
    hits = shown.locator("#hits li")
    wanted = [n for n in run.graph().nodes if n.op == "aten.mm.default" and n.origin.module == QUERY]
    assert wanted
    expect(hits).to_have_count(len(wanted))
    hits.first.click()
    expect(shown.locator("#details .module")).to_have_text(QUERY)
    shown.keyboard.press("/")
    shown.locator("#query").fill("no such node at all")
    expect(hits).to_have_text("nothing found")
    shown.keyboard.press("Escape")
    expect(shown.locator("#hits")).to_be_hidden()


def test_a_node_that_a_pass_removed_is_found_where_it_was(shown, run):
    at = run.names.index("canonicalize")
    captured, after = (node_lines(run.texts[run.member(str(i))]) for i in (at - 1, at))
    gone = next(key for key in captured if key not in after and "(" not in key)
    shown.locator("#query").fill(gone)
    shown.locator("#query").press("Enter")
    expect(shown.locator("#details h2")).to_have_text(f"%{gone}")
    expect(shown.locator("#details")).to_contain_text("removed by canonicalize")
    expect(shown.locator("#what-changed")).to_have_text("as captured")


def test_zooming_and_dragging_move_in_time(shown):
    box = shown.locator("#timeline").bounding_box()
    shown.mouse.move(box["x"] + 600, box["y"] + 40)
    at = "us => zgraph.charts.usAt(600, zgraph.charts.timeline.clientWidth)"
    before = shown.evaluate(at)
    shown.mouse.wheel(0, -900)
    shown.wait_for_function("zgraph.charts.to - zgraph.charts.from < zgraph.charts.end / 4")
    assert shown.evaluate(at) == pytest.approx(before, rel=0.02)
    shown.mouse.down()
    shown.mouse.move(box["x"] + 500, box["y"] + 40, steps=5)
    shown.mouse.up()
    assert shown.evaluate(at) > before
    shown.locator("#time-fit").click()
    assert shown.evaluate("zgraph.charts.to - zgraph.charts.from == zgraph.charts.end")


@pytest.mark.parametrize("width", [1280, 1920])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_the_window_in_light_and_dark(opened, drawn, width, scheme):
    page = opened(drawn, width=width, scheme=scheme)
    page.wait_for_selector("body[data-ready]")
    assert page.evaluate(
        "document.documentElement.scrollWidth <= innerWidth && document.body.scrollHeight <= innerHeight"
    )
    light = "[...getComputedStyle(document.body).backgroundColor.match(/[0-9]+/g)].every(part => part > 128)"
    assert page.evaluate(light) == (scheme == "light")
    page.locator("#theme").click()
    assert page.evaluate(light) != (scheme == "light")


def test_names_of_a_hostile_run_are_only_ever_text(opened):
    graph = _chain(8)
    evil = Origin("</script><script>alert(1)</script>.<img src=x onerror=alert(2)>", '"><svg onload=alert(3)>', 1)
    graph = graph.with_nodes([replace(n, origin=evil) for n in graph.nodes])
    run = run_file([("captured", graph, 0.0)], Provenance(model="<script>alert(4)</script>"), Context())
    page = opened(run)
    page.wait_for_selector("body[data-ready]")
    page.locator("#query").fill("alert")
    page.locator("#query").press("Enter")
    expect(page.locator("#model")).to_have_text("<script>alert(4)</script>")
    expect(page.locator("#details .module")).to_contain_text("</script><script>alert(1)")


def test_twenty_thousand_nodes(opened):
    graph = _chain(20_000)
    moved = graph.with_nodes([*graph.nodes[:10], graph.nodes[11], graph.nodes[10], *graph.nodes[12:]])
    run = run_file([("captured", graph, 0.0), ("schedule", moved, 0.0)], Provenance(model="Deep"), Context())
    text = page_of(run)
    assert len(text) < MAX_BYTES
    page = opened(text)
    page.wait_for_selector("body[data-ready]")
    expect(page.locator("#what-changed")).to_have_text("schedule: 1 moved")
    page.locator("#query").fill("%v19000")
    page.locator("#query").press("Enter")
    expect(page.locator("#graph .selected .value")).to_have_text("%v19000")
    assert page.locator("#graph .node").count() < 1500


def test_a_run_that_cannot_be_planned_yet_shows_its_graphs(opened, run):
    early = run_file([("captured", run.graph("all-gather"), 0.0)], run.manifest.provenance, run.context)
    page = opened(early)
    page.wait_for_selector("body[data-ready]")
    expect(page.locator("#graph .group").first).to_be_visible()


def test_a_notebook_shows_a_report_in_a_frame(opened, drawn):
    frame = f'<iframe sandbox="allow-scripts" style="width: 100%; height: 600px" srcdoc="{escape(drawn)}"></iframe>'
    page = opened(f"<!doctype html><body>{frame}</body>")
    expect(page.frame_locator("iframe").locator("#graph .group").first).to_be_visible()


def _chain(num_nodes: int) -> Graph:
    """A forward of so many ops one after the other, in layers of a hundred."""
    lines = ['graph "deep"', "op aten.relu.default", "input %v0: f32[64, 64]"]
    lines += [
        f'fwd %v{i}: f32[64, 64] = aten.relu.default(%v{i - 1}) @ "layers.{i // 100}.act"' for i in range(1, num_nodes)
    ]
    lines.append(f"return fwd output %v{num_nodes - 1}")
    return parse_graph("\n".join(lines) + "\n")


def _number(page: Page, name: str) -> int:
    return page.evaluate("name => zgraph.run.nodes.key.indexOf(name)", name)


def _colours(page: Page, canvas: str, us: float) -> set[tuple[int, int, int]]:
    """The colours in the column of pixels of a time."""
    found = page.evaluate(
        """([id, us]) => {
            const canvas = document.getElementById(id), at = zgraph.charts.x(us, canvas.clientWidth) * devicePixelRatio;
            return [...canvas.getContext("2d").getImageData(Math.round(at), 0, 1, canvas.height).data];
        }""",
        [canvas, us],
    )
    return {tuple(found[i : i + 3]) for i in range(0, len(found), 4)}


def _rgb(colour: str) -> tuple[int, int, int]:
    number = int(colour.removeprefix("#"), 16)
    return number >> 16, number >> 8 & 255, number & 255
