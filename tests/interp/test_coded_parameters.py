"""Codes of parameters that leave something out, on simulated ranks: copies stay alike, and what is left out comes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.deep import deep
from zgraph.certify.certificate import certify
from zgraph.debugging.runs import Options, check_graphs
from zgraph.errors import ContractError
from zgraph.interpreter import Interpreter
from zgraph.ir import Graph
from zgraph.passes import Context, parse_recipe
from zgraph.passes.compress import Compress

from .test_exact_codes import LOWER, step


def lowered(graph: Graph, codec: str) -> list[tuple[str, Graph]]:
    context, steps = Context(mesh=graph.mesh), [("placed", graph)]
    given = f"compress(gradients=none,parameters={codec},at_least_bytes=1)," if codec else ""
    for one in parse_recipe(f"partition(stage=3),{given}{LOWER}").passes[1:]:
        steps.append((one.name, one.run(steps[-1][1], context)))
    return steps


def parameters(codec: str, moves: int, stage: int = 2) -> tuple[torch.Tensor, list[torch.Tensor], list[int]]:
    """A parameter in bf16, what ranks compute with in each of `moves` steps after which it stays, and bytes sent."""
    graph = lowered(step(stage, "shard=2"), codec)[-1][1]
    interpreter, rng = Interpreter(), torch.Generator().manual_seed(0)
    a, b = torch.randn(40, 8, generator=rng), torch.randn(7, generator=rng)
    seen, taken = list[torch.Tensor](), list[int]()
    for number in range(moves + 8):
        before = interpreter.sized.sent_bytes
        (y, _) = interpreter.run(graph, {"a": a, "b": b, "x": torch.eye(5, 40).bfloat16()})
        assert y is not None
        assert torch.equal(y[0], y[1]), "all ranks have the same copy"
        seen.append(y[0].float())
        taken.append(interpreter.sized.sent_bytes - before)
        if number < moves:
            a = a + 0.01 * torch.randn(40, 8, generator=rng)
    return a.bfloat16().float()[:5], seen, taken


@pytest.mark.parametrize(("codec", "off"), [("q8", 0.002), ("q4(block=32)", 0.02), ("topk(10%)", 0.2)])
def test_what_a_difference_leaves_out_is_in_the_next(codec: str, off: float) -> None:
    due, seen, taken = parameters(codec, 6)
    assert (seen[6] - due).abs().max() < off
    assert taken[1] < 0.6 * taken[0], "the first is of the numbers themselves"
    assert taken[-1] == 2 * 24, "nothing changed"


def test_at_stage_3_the_numbers_are_coded_each_time() -> None:
    due, seen, taken = parameters("q8(block=8)", 2, stage=3)
    assert 0 < (seen[-1] - due).abs().max() < 0.02
    assert taken[-1] == 0, "codes have a fixed length"


@pytest.mark.parametrize(("stage", "codec"), [(2, "q4"), (3, "q8"), deep(1, "topk(5%)"), deep(3, "q4")])
def test_they_are_certified_and_checked_by_numbers(stage: int, codec: str) -> None:
    graph = step(stage, "shard=2")
    steps = lowered(graph, codec)
    assert [n.op for n in steps[-1][1].nodes].count("encode") == 1
    certify(steps, Context(mesh=graph.mesh))
    assert check_graphs([n for n, _ in steps], steps, Context(mesh=graph.mesh), Options(micro_steps=1)).wrong is None


@pytest.mark.parametrize("codec", ["q2", "sign", "topk(1%)"])
def test_what_needs_the_copy_before_is_refused_at_stage_3(codec: str) -> None:
    with pytest.raises(ContractError, match="gathered again for the backward; take q8 or q4"):
        lowered(step(3, "shard=2"), codec)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"parameters": "delta"}, "parameters must be coded by q8, q4, q2, sign, topk, not by delta"),
        ({"parameters": "difference(q8)"}, "not by difference"),
        ({"parameters": "auto"}, "there is no codec called auto"),
        ({"gradients": "exponent"}, "gradients must be coded by"),
    ],
)
def test_other_codecs_are_refused(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Compress(**options)
