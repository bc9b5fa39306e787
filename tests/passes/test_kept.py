"""Kept plans: text that reads back as what the passes made, and is refused where it is anything else."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import pytest

from tests.deep import DEEP
from tests.passes.programs import CASES, context_of, graph_of, made
from zgraph.certify.certificate import Certifier, landmarks
from zgraph.cost import simulate
from zgraph.errors import RunFileError, VerifyError
from zgraph.ir import Graph, print_graph
from zgraph.passes import Context, make_plan, parse_recipe
from zgraph.passes.core.instruments import Log
from zgraph.runfile.kept import Kept, Said, kept, read_kept, read_word

KEY = 64 * "a"
SOME = (
    "tied, stage 3",
    "convnet, stage 2",
    "dynamic, stage 0",
    "llama, kernels",
    "bf16, stage 1",
    "convnet, budget 0.3",
)
SAID = Said(codecs="of gradients none", float8=("first", "last"), left_out={"middle": "it is narrow"})


@cache
def fresh(name: str) -> tuple[Kept, Certifier, Graph, Context]:
    """A plan that the passes have just made, and who saw each graph."""
    case = CASES[name]
    graph = graph_of(case.graph)
    context = made(case)[1] if case.share is not None else context_of(case, graph)
    log, certifier = Log(), Certifier(graph, context, thorough=False)
    final = parse_recipe(case.recipe).run(graph, context, [log, certifier])
    timeline = simulate(make_plan(final), context.costs, context.hints)
    return kept(KEY, certifier, log.steps, timeline, SAID), certifier, graph, context


def outcome(certifier: Certifier) -> Any:
    """What a certificate says, but for seconds; or why there is none, as these budgets leave out what is at rest."""
    try:
        found = certifier.finish()
    except VerifyError as error:
        return str(error)
    return [(c.graph, c.rule, c.num_nodes) for c in found.checked], found.footprint


@pytest.mark.parametrize("name", [n for n in CASES if CASES[n].cuts == () and (DEEP or n in SOME)])
def test_a_plan_reads_back_text_for_text_with_the_same_certificate(name: str) -> None:
    plan, certifier, graph, context = fresh(name)
    for read in (read_kept(plan.to_bytes(), KEY), read_word(plan.to_word(), KEY)):
        assert print_graph(read.final) == print_graph(certifier.steps[-1][1])
        assert read.final == certifier.steps[-1][1]
        assert read == plan
        assert read.said == SAID
        again = Certifier(graph, context, thorough=False)
        read.tell(again)
        assert outcome(certifier) == outcome(again)


def test_graphs_on_both_sides_of_kernels_are_kept_and_no_others() -> None:
    plan, certifier, _, _ = fresh("llama, kernels")
    assert landmarks(certifier.steps)
    assert len(plan.texts) == 3
    assert len(fresh("tied, stage 3")[0].texts) == 1


def changed(change: Callable[[dict[str, Any]], None]) -> bytes:
    """The bytes of a plan, with a change in what it says."""
    record = json.loads(zlib.decompress(fresh("tied, stage 3")[0].to_bytes()))
    change(record)
    return zlib.compress(json.dumps(record).encode())


def halved(record: dict[str, Any]) -> None:
    record["graphs"] = [text[: len(text) // 2] for text in record["graphs"]]


DAMAGED: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "another key": (lambda r: r.update(key=64 * "b"), "something else"),
    "a later format": (lambda r: r.update(format=2), "format 2"),
    "no last graph": (lambda r: r["steps"][-1].update(graph=None), "lacks a graph"),
    "a graph that is not there": (lambda r: r["steps"][-1].update(graph=7), "lacks a graph"),
    "more than a plan has": (lambda r: r.update(code="import os"), "no kept plan"),
    "no steps": (lambda r: r.update(steps=[]), "no kept plan"),
    "times below zero": (lambda r: r["timeline"].update(step_us=-1.0), "no kept plan"),
    "half a graph": (halved, "does not parse"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_what_is_no_plan_of_this_key_is_refused(name: str) -> None:
    change, words = DAMAGED[name]
    with pytest.raises(RunFileError, match=words):
        read_kept(changed(change), KEY)
    assert read_kept(changed(lambda record: None), KEY) == fresh("tied, stage 3")[0]


def test_bytes_that_are_cut_or_longer_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = fresh("tied, stage 3")[0]
    held = plan.to_bytes()
    for wrong in (b"", held[:-3], held + b"x", b"no plan", zlib.compress(b"{}")):
        with pytest.raises(RunFileError):
            read_kept(wrong, KEY)
    for word in ("", "\u20ac", "a", plan.to_word()[:-5]):
        with pytest.raises(RunFileError):
            read_word(word, KEY)
    monkeypatch.setattr("zgraph.runfile.kept.MAX_BYTES", 1000)
    with pytest.raises(RunFileError, match="more than"):
        read_kept(held, KEY)


def test_a_plan_that_computes_something_else_gets_no_certificate() -> None:
    plan, _, graph, context = fresh("tied, stage 3")
    text = plan.texts[0].replace("aten.tanh.default", "aten.sigmoid.default")
    assert text != plan.texts[0]
    certifier = Certifier(graph, context, thorough=False)
    read_kept(replace(plan, texts=(text,)).to_bytes(), KEY).tell(certifier)
    with pytest.raises(VerifyError, match="equality"):
        certifier.finish()
