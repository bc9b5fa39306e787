"""The report on a phone and on paper, and colours that can be read."""

import re
from importlib.resources import files
from itertools import product

import pytest
from playwright.sync_api import Page, expect

PHONE = {"width": 390, "has_touch": True, "is_mobile": True}

LEAST_TAP, LEAST_CONTRAST = 40, 4.5


@pytest.fixture
def phone(opened, drawn) -> Page:
    page = opened(drawn, **PHONE)
    page.wait_for_selector("body[data-ready]")
    return page


def _fits(page: Page) -> bool:
    """Whether the page is as wide as the phone: what is wider widens the window, too."""
    return page.evaluate("document.scrollingElement.scrollWidth") <= PHONE["width"]


def test_nothing_reaches_over_the_side_of_a_phone(phone):
    assert _fits(phone)
    phone.locator("#stops button", has_text="bucket").tap()
    _find(phone, "aten.mm")
    expect(phone.locator("#details h2")).not_to_have_text("Nothing selected")
    assert _fits(phone)
    phone.locator("#show-text").tap()
    assert _fits(phone)
    phone.locator("#pictures").tap()
    assert _fits(phone)


def _find(page: Page, query: str) -> None:
    page.locator("#query").fill(query)
    page.locator("#hits li").first.tap()


def test_what_is_tapped_is_large_enough(phone):
    _find(phone, "aten.mm")
    phone.locator("#pictures").tap()
    small = phone.evaluate(
        """least => [...document.querySelectorAll("button, label, input:not([type=checkbox])")].filter(found => {
            const { width, height } = found.getBoundingClientRect();
            return width && height && (width < least || height < least);
        }).map(found => found.outerHTML)""",
        LEAST_TAP,
    )
    assert not small


def test_the_slider_moves_under_a_finger(phone, run):
    box = phone.locator("#slider").bounding_box()
    phone.touchscreen.tap(box["x"] + box["width"] - 3, box["y"] + box["height"] / 2)
    expect(phone.locator("#stops .now b")).to_have_text(run.names[-1])


def test_two_fingers_zoom_the_graph_and_one_moves_it(phone):
    before = phone.evaluate("({...zgraph.graph.view})")
    box = phone.locator("#graph").bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    _touch(phone, [[(x - 30, y), (x + 30, y)], [(x - 45, y), (x + 45, y)], [(x - 60, y), (x + 60, y)]])
    zoomed = phone.evaluate("({...zgraph.graph.view})")
    assert zoomed["scale"] == pytest.approx(2 * before["scale"], rel=0.02)
    at = box["width"] / 2  # what lay between the fingers is still there
    assert (at - zoomed["x"]) / zoomed["scale"] == pytest.approx((at - before["x"]) / before["scale"], rel=0.05)
    _touch(phone, [[(x, y)], [(x + 20, y + 10)], [(x + 40, y + 20)]])
    moved = phone.evaluate("({...zgraph.graph.view})")
    assert moved["scale"] == zoomed["scale"]
    assert moved["x"] > zoomed["x"]
    assert moved["y"] > zoomed["y"]
    expect(phone.locator("#details h2")).to_have_text("Nothing selected")


def test_two_fingers_zoom_the_timeline(phone):
    phone.locator("#timeline").scroll_into_view_if_needed()
    box = phone.locator("#timeline").bounding_box()
    x, y = box["x"] + 240, box["y"] + 40
    _touch(phone, [[(x - 20, y), (x + 20, y)], [(x - 40, y), (x + 40, y)]])
    assert phone.evaluate("(zgraph.charts.to - zgraph.charts.from) / zgraph.charts.end") == pytest.approx(0.5, rel=0.1)


def _touch(page: Page, positions: list[list[tuple[float, float]]]) -> None:
    """Put fingers down, move them from place to place, and take them up."""
    session = page.context.new_cdp_session(page)
    for number, fingers in enumerate(positions):
        points = [{"x": x, "y": y, "id": finger} for finger, (x, y) in enumerate(fingers)]
        kind = "touchMove" if number else "touchStart"
        session.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})
    session.send("Input.dispatchTouchEvent", {"type": "touchEnd", "touchPoints": []})
    session.detach()


def test_paper_has_the_pictures_and_no_controls(opened, drawn):
    page = opened(drawn, scheme="dark")
    page.wait_for_selector("body[data-ready]")
    page.locator("#show-text").click()
    page.emulate_media(media="print")
    for part in ("#headline", "#stops", "#graph", "#timeline", "#memory", "#step-summary"):
        expect(page.locator(part)).to_be_visible()
    for part in ("#search", "#slider", "#pictures", "#theme", "#details", "#fit", "#to-peak", "#show-graph", "#text"):
        expect(page.locator(part)).to_be_hidden()
    expect(page.locator("html")).to_have_attribute("data-theme", "light")
    inside = """() => {
        const outer = document.getElementById("graph").getBoundingClientRect();
        return [...document.querySelectorAll("#graph .group > rect")].every(found => {
            const inner = found.getBoundingClientRect();
            return inner.left >= outer.left - 1 && inner.right <= outer.right + 1 && inner.bottom <= outer.bottom + 1;
        });
    }"""
    assert page.evaluate(inside)
    page.emulate_media(media="screen")
    expect(page.locator("html")).to_have_attribute("data-theme", "dark")
    expect(page.locator("#text")).to_be_visible()


@pytest.mark.parametrize("format", ["A4", "Letter"])
def test_a_run_fits_on_one_page(opened, drawn, format):
    page = opened(drawn)
    page.wait_for_selector("body[data-ready]")
    assert len(re.findall(rb"/Type\s*/Page\b", page.pdf(format=format))) == 1


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_colours_can_be_read(theme):
    style = (files("zgraph.viz") / "html" / "style.css").read_text()
    block = re.findall(r":root[^{]*\{[^}]*color-scheme: " + theme + r"[^}]*\}", style)[0]
    colours = dict(re.findall(r"--(\w+): (#\w{6})", block))
    words = ("text", "muted", "added", "removed", "changed", "moved", "exposed", "select")
    lanes = ("compute", "backward", "gather", "reduce", "copy", "wait", "place", "exposed")
    for on, under in [*product(words, ("card", "page", "hover")), *product(("onColour",), lanes)]:
        assert _contrast(colours[on], colours[under]) >= LEAST_CONTRAST, (on, under)


def _contrast(one: str, other: str) -> float:
    """The contrast of two colours, as WCAG 2 defines it."""
    dark, light = sorted(map(_luminance, (one, other)))
    return (light + 0.05) / (dark + 0.05)


def _luminance(colour: str) -> float:
    parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return sum(share * part for share, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))
