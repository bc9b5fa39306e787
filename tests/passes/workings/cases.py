"""The digests of all that is worked out, by name."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from tests.passes.programs import FOLDER
from tests.passes.workings.common import TWO, TWO_HOSTS, outcome, plain
from tests.passes.workings.ops import eights, grown, layered, matched, odd
from tests.passes.workings.places import alike, choices, cut, repeated, spaces
from tests.passes.workings.steps import ahead, coded, fitted, forwards, leaving, moved, plans, problems, random_problems
from zgraph.ir import Axis

RESULTS = FOLDER / "workings.json"


GRAPHS = ("tied", "convnet", "dynamic", "bf16", "mixed", "llama", "vit", "wide")


SYMBOLIC = ("dynamic",)
"""Sizes that are symbols cannot be cut."""


def _of_graph(name: str) -> Iterator[tuple[str, Callable[[], Iterator[Any]]]]:
    for stage in (0, 1, 2, 3):
        if stage in (0, 3):
            yield f"what is kept, stage {stage}", partial(forwards, name, stage)
            yield f"what may leave, stage {stage}", partial(leaving, name, stage)
        if stage in (1, 3):
            yield f"predictions, stage {stage}", partial(ahead, name, stage)
        yield f"problem, stage {stage}", partial(problems, name, stage, TWO_HOSTS if stage % 2 else (Axis("shard", 3),))
        yield f"plans, stage {stage}", partial(plans, name, stage)
    yield "problem with groups", partial(problems, name, 3, TWO, grouped=True, most=3000)
    yield "problem with copies", partial(moved, name)
    yield "kernels", partial(grown, name)
    yield "eight bits", partial(eights, name)
    yield "choices on 2", partial(choices, name, 2)
    for stage, codec in ((0, "q8(block=8)"), (2, "sign(block=8)"), (3, "q4(block=16)"), (3, "topk(10%, chunk=16)")):
        yield f"{codec}, stage {stage}", partial(coded, name, stage, codec)
    if name not in SYMBOLIC:
        yield "cut", partial(cut, name, 2, "", "0001")
        yield "cut along the sequence", partial(cut, name, 2, "(sequence=true)", "10")
        if name != "llama":
            yield "choices on 3", partial(choices, name, 3)
            yield "cut as found around it", partial(cut, name, 2, "(search=values)", "01")
        yield "cut as found", partial(cut, name, 2, "(search=all)", "01")
        yield "space of 2", partial(spaces, name, 2, 1)
        yield "space of 3 by 2", partial(spaces, name, 3, 2)


def _workings() -> Iterator[tuple[str, Callable[[], Iterator[Any]]]]:
    for name in GRAPHS:
        yield from ((f"{name}, {what}", work) for what, work in _of_graph(name))
    for name in ("mixed", "llama", "convnet"):
        yield f"{name}, what is tried to fit", partial(fitted, name, 3)
    for seed in range(3):
        yield f"timetables {seed}", partial(random_problems, seed)
        yield f"repetitions {seed}", partial(repeated, seed)
    for name in ("gpt2", "bf16-llama"):
        yield f"{name}, eight bits", partial(eights, name)
        yield f"{name}, kernels", partial(grown, name)
        yield f"{name}, repeated", partial(alike, name)
    for name in ("wide", "llama", "bf16"):
        yield f"{name}, matched if varied", partial(matched, name)
        yield f"{name}, layers if varied", partial(layered, name)
    for name, stage in (("tied", 3), ("bf16", 1), ("convnet", 2), ("mixed", 0)):
        yield f"{name}, odd ops", partial(odd, name, stage)


WORKINGS = dict(_workings())


def digest(name: str) -> str:
    """A digest of what is worked out."""
    found = hashlib.sha256()

    def all_of() -> None:
        for item in WORKINGS[name]():
            found.update(repr(plain(item)).encode())

    found.update(repr(outcome(all_of)).encode())
    return found.hexdigest()[:16]


def write() -> None:
    """Write all digests."""
    RESULTS.write_text(json.dumps({name: digest(name) for name in WORKINGS}, indent=1) + "\n")
