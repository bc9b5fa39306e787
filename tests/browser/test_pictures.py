"""Pictures of what is shown: SVG that needs nothing else, PNG drawn from it, saved or copied."""

import struct
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest
from playwright.sync_api import Page, expect

from zgraph.ir import Origin
from zgraph.runfile.format import run_file

WHAT = ("graph", "timeline", "memory")

SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture
def shown(opened, drawn) -> Page:
    page = opened(drawn, scheme="dark", permissions=["clipboard-read", "clipboard-write"])
    page.wait_for_selector("body[data-ready]")
    page.locator("#pictures").click()
    return page


def _saved(page: Page, label: str) -> Path:
    with page.expect_download() as found:
        page.get_by_role("button", name=label).click()
    target = Path(found.value.path()).with_name(found.value.suggested_filename)
    found.value.save_as(target)
    return target


@pytest.mark.parametrize("what", WHAT)
def test_a_saved_svg_stands_alone_in_the_theme_at_hand(opened, shown, what):
    file = _saved(shown, f"save SVG of the {what}")
    root = ElementTree.fromstring(file.read_text())
    assert root.tag == f"{SVG}svg"
    drawn = [e for e in root.iter() if e.tag in (f"{SVG}rect", f"{SVG}path", f"{SVG}text")]
    assert len(drawn) > 15
    assert not any(e.get("class") or e.get("style") for e in root.iter())
    assert "var(" not in file.read_text()
    assert "color-mix" not in file.read_text()
    assert "color(" not in file.read_text()
    card = shown.evaluate("getComputedStyle(document.documentElement).getPropertyValue('--card').trim()")
    assert root.find(f"{SVG}rect").get("fill") == card
    texts = {"".join(e.itertext()) for e in root.iter(f"{SVG}text")}
    wanted = {"graph": "▾ forward", "timeline": "network", "memory": "activations"}
    assert wanted[what] in texts
    alone = opened(f'<!doctype html><img src="{file.as_uri()}">')
    alone.wait_for_function("() => document.images[0].complete")
    assert alone.evaluate("document.images[0].naturalWidth") == int(root.get("width"))


@pytest.mark.parametrize("what", WHAT)
def test_a_saved_png_is_drawn_from_it(shown, what):
    data = _saved(shown, f"save PNG of the {what}").read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = struct.unpack(">II", data[16:24])
    assert width > 800
    assert height > 150
    assert len(data) > 5000  # it is not empty


@pytest.mark.parametrize("what", WHAT)
def test_both_are_copied(shown, what):
    shown.get_by_role("button", name=f"copy PNG of the {what}").click()
    expect(shown.locator("#picture-list p")).to_have_text("copied")
    assert shown.evaluate("navigator.clipboard.read().then(items => items[0].types)") == ["image/png"]
    shown.get_by_role("button", name=f"copy SVG of the {what}").click()
    shown.wait_for_function("() => navigator.clipboard.readText().then(text => text.startsWith('<svg'))")
    ElementTree.fromstring(shown.evaluate("navigator.clipboard.readText()"))


def test_a_browser_that_forbids_it_is_told(opened, drawn):
    page = opened(drawn)
    page.evaluate("() => { navigator.clipboard.write = () => Promise.reject(new Error('no')); }")
    page.locator("#pictures").click()
    page.get_by_role("button", name="copy PNG of the timeline").click()
    expect(page.locator("#picture-list p")).to_contain_text("save it instead")


def test_names_of_a_hostile_run_make_no_markup(opened, run):
    graph = run.graph()
    evil = Origin("</svg><script>alert(1)</script>&\x01", "f", 1)
    graph = graph.with_nodes([replace(node, origin=evil) for node in graph.nodes[:5]] + [*graph.nodes[5:]])
    page = opened(run_file([("captured", graph, 0.0)], run.manifest.provenance, run.context))
    page.locator("#pictures").click()
    root = ElementTree.fromstring(_saved(page, "save SVG of the graph").read_text())
    assert not list(root.iter("script"))
    assert not list(root.iter(f"{SVG}script"))
