"""Where a report opens, what it says in short, and addresses that lead to a state of it."""

from dataclasses import replace
from urllib.parse import quote

import pytest
from playwright.sync_api import Page, expect

from zgraph.cost import bytes_text, memory_interval, time_interval, time_text
from zgraph.ir import InputKind
from zgraph.runfile.format import run_file
from zgraph.viz.headline import duration, figures, headline, size, unsharded_bytes


def test_it_opens_at_the_pass_that_changed_most(opened, run, drawn):
    page = opened(drawn)
    expect(page.locator("#stops .now b")).to_have_text("partition")
    expect(page.locator("#slider")).to_have_value(str(run.names.index("partition")))


def test_what_only_says_more_of_nodes_does_not_count(opened, other):
    """Partition writes a placement to all nodes, but fit, which computes values again, changes more of the graph."""
    changed = other.graph("partition")
    assert sum(n.results != () for n in changed.nodes) > 1000  # all of them have a placement now
    expect(opened(other).locator("#stops .now b")).to_have_text("fit")


def test_a_run_that_no_pass_changed_opens_at_its_last_graph(opened, run):
    graph = run.graph("captured")
    same = run_file([("captured", graph, 0.0), ("dce", graph, 0.0)], run.manifest.provenance, run.context)
    expect(opened(same).locator("#stops .now b")).to_have_text("dce")


def test_the_headline_has_the_figures_of_the_run(opened, run, drawn):
    found = figures(run)
    timeline, context = run.timeline, run.context
    assert found.peak_bytes == timeline.memory.peak.total_bytes + context.rest_bytes
    whole = sum(3 * i.value.tensor.numel * 4 for i in run.graph("captured").inputs if i.kind is InputKind.param)
    assert unsharded_bytes(run) == pytest.approx(whole, rel=0.01)
    step = time_text(time_interval(timeline.step_us, run.graph(), context.costs, context.hints))
    shown = opened(drawn).locator("#headline")
    for said in (
        "ZeRO stage 3 on 2 ranks of h100",
        f"unsharded, each would hold {size(whole)}",
        f"{bytes_text(memory_interval(found.peak_bytes, context.costs))} of a budget",
        f"Of {duration(timeline.busy_us['comm'])} of communication",
        f"{duration(timeline.exposed_us)} is exposed",
        f"take {step}, {100 * (timeline.step_us / found.bound_us - 1):.1f} % above",
    ):
        expect(shown).to_contain_text(said)


def test_the_headline_leaves_out_what_the_run_does_not_know(run):
    made = run.manifest.provenance
    early = run_file([("captured", run.graph("partition"), 0.0)], made, run.context)
    assert [s for s in headline(early) if "peak" in s or "communication" in s or "predicted" in s] == []
    sgd = run_file([("captured", run.graph(), 0.0)], made, replace(run.context, rest_bytes=run.context.rest_bytes // 3))
    assert not any("unsharded" in s for s in headline(sgd))
    captured = run_file([("captured", run.graph("captured"), 0.0)], made, run.context)
    assert "ZeRO" not in headline(captured)[0]


@pytest.fixture
def shown(opened, drawn) -> Page:
    page = opened(drawn)
    page.wait_for_selector("body[data-ready]")
    return page


def test_an_address_leads_back_to_the_state(opened, drawn, shown):
    assert shown.evaluate("location.hash") == ""
    shown.locator("#stops button", has_text="bucket").click()
    shown.locator("#show-text").click()
    line = shown.locator(".line").nth(3)
    line.click()
    node = shown.locator("#details h2").inner_text()
    shown.locator("#only-changed").check()
    shown.wait_for_function("() => location.hash.includes('only=changed')")
    address = shown.evaluate("location.hash")
    assert address.startswith("#pass=bucket&node=")
    assert "view=text" in address

    again = opened(drawn, address=address)
    again.wait_for_selector("body[data-ready]")
    expect(again.locator("#stops .now b")).to_have_text("bucket")
    expect(again.locator("#details h2")).to_have_text(node)
    expect(again.locator("#show-text")).to_have_attribute("aria-selected", "true")
    expect(again.locator("#only-changed")).to_be_checked()
    expect(again.locator("#word")).to_be_hidden()


def test_back_goes_to_the_state_before(shown):
    for name in ("bucket", "release"):
        shown.locator("#stops button", has_text=name).click()
        shown.wait_for_function("name => location.hash === `#pass=${name}`", arg=name)
    shown.evaluate("history.back()")
    expect(shown.locator("#stops .now b")).to_have_text("bucket")
    shown.evaluate("history.back()")
    expect(shown.locator("#stops .now b")).to_have_text("partition")
    shown.wait_for_timeout(300)
    assert shown.evaluate("location.hash") == ""
    shown.evaluate("location.hash = '#pass=release'")
    expect(shown.locator("#stops .now b")).to_have_text("release")


def test_an_address_without_a_pass_shows_the_node_where_it_is(opened, drawn, run):
    (start, *_) = (n.name for n in run.graph().nodes if n.op == "all_gather_start")
    page = opened(drawn, address=f"#node={start}")
    expect(page.locator("#details h2")).to_have_text(f"%{start}")
    expect(page.locator("#stops .now b")).to_have_text(run.names[-1])


EVIL = '<img src=x onerror="alert(1)"><script>alert(2)</script>'


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("#pass=nothing", "a pass that is not in this report: nothing"),
        ("#pass=bucket&node=nobody", "a node that is not in this report: nobody"),
        (f"#pass={quote(EVIL)}&node={quote(EVIL)}", EVIL),
        ("#pass=%E0%A4%A&node=%00&run=2&view=%3Csvg&only=1", "not in this report"),
        ("#node=__proto__", "not in this report: __proto__"),
        ("#pass=" + "x" * 5000, "x" * 60 + "…"),
    ],
)
def test_an_address_that_names_what_is_not_there_is_told_and_the_default_shown(opened, drawn, address, said):
    page = opened(drawn, address=address)
    expect(page.locator("#word")).to_contain_text(said)
    expect(page.locator("#stops .now b")).to_have_text("bucket" if "bucket" in address else "partition")
    expect(page.locator("#details h2")).to_have_text("Nothing selected")
    assert page.locator("#word *").count() == 0
    page.locator("#stops button").first.click()
    expect(page.locator("#word")).to_be_hidden()
