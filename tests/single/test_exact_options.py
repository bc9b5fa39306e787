"""Words of `compress` that stand for exact codes: what they become, what they do not go with, and their plan."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import zgraph
from zgraph.compiler.codec_choice import CodecChoice
from zgraph.cost import CostTable, Link, hardware
from zgraph.errors import UsageError
from zgraph.ir import Axis, parse_graph
from zgraph.options.compression import check_exact, codec_for, planned_codec
from zgraph.passes import RECIPES, Context, compressing
from zgraph.passes.code_gathers import CodeGathers

CPU = torch.device("cpu")


def mesh(*names: str) -> Any:
    return SimpleNamespace(ndim=len(names), mesh_dim_names=names, size=lambda dim=None: 2 if dim is not None else 4)


def test_the_words_become_the_pass() -> None:
    for word, codec in (("exact", "auto"), ("delta", "delta"), ("exponent", "exponent")):
        assert codec_for(word, mesh("shard"), has_recipe=False, fullgraph=True, device=CPU) == word
        assert codec_for(word, mesh("replicate", "shard"), has_recipe=False, fullgraph=True, device=CPU) == word
        assert f",code-gathers(codec={codec}),broadcast," in compressing(RECIPES[2], word)
        assert planned_codec(word, 2, 1) == word
    assert codec_for("exact", None, has_recipe=False, fullgraph=True, device=CPU) == ""


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"device": torch.device("cuda")}, "codes parameters on processors"),
        ({"mesh": mesh("tensor", "shard")}, "cuts them along tensor"),
        ({"fullgraph": "eager"}, "captures none"),
        ({"has_recipe": True}, "put code-gathers\\(codec=auto\\) behind bucket"),
    ],
)
def test_what_exact_codes_do_not_go_with(options: dict[str, Any], says: str) -> None:
    given: dict[str, Any] = {"mesh": mesh("shard"), "has_recipe": False, "fullgraph": True, "device": CPU} | options
    with pytest.raises(UsageError, match=says):
        codec_for("exact", **given)
    with pytest.raises(UsageError, match="leave compress="):
        planned_codec("exact", 1, 2)


@pytest.mark.parametrize(
    ("codec", "stage", "dtype", "is_taken"),
    [
        ("delta", 2, torch.bfloat16, True),
        ("delta", 1, torch.float16, True),
        ("delta", 2, None, False),
        ("delta", 3, torch.bfloat16, False),
        ("exponent", 3, torch.bfloat16, True),
        ("exponent", 3, torch.float16, False),
        ("exponent", 2, torch.bfloat16, False),
        ("exact", 0, None, True),
        ("q8(block=256)", 0, None, True),
    ],
)
def test_a_codec_that_codes_nothing_is_refused(
    codec: str, stage: int, dtype: torch.dtype | None, is_taken: bool
) -> None:
    model = nn.Linear(4, 4)
    stages = {"weight": stage, "bias": 0}
    if is_taken:
        check_exact(codec, model.named_parameters(), stages, dtype)
        return
    with pytest.raises(UsageError, match="and there is none"):
        check_exact(codec, model.named_parameters(), stages, dtype)


def test_a_plan_counts_copies_at_stages_that_keep_them() -> None:
    model, x = nn.Sequential(nn.Linear(512, 512), nn.Linear(512, 64)), torch.randn(4, 512)
    kept = 2 * sum(p.numel() for p in model.parameters())
    for stage, more in ((2, kept), (3, 0)):
        rest = []
        for compress in (None, "exact"):
            (found,) = zgraph.plan(
                model, x, num_ranks=2, stage=stage, hardware="cpu", param_dtype=torch.bfloat16, compress=compress
            ).stages
            rest.append(found.rest_bytes["optimizer"])
        assert rest[1] - rest[0] == pytest.approx(more, abs=64)


@pytest.mark.parametrize(("bytes_per_s", "says"), [(1e3, "parameters delta"), (1e12, "none: no codec saves 2%")])
def test_the_choice_is_told(bytes_per_s: float, says: str) -> None:
    text = """graph "g" mesh(shard=2)
op aten.tanh.default
param %a: bf16[64, 64]<S0> "a" stage=2
tangent %t: bf16[64, 64]<R>
fwd %f: bf16[64, 64]<R> = reshard(%a, keep=true)
fwd %y: bf16[64, 64]<R> = aten.tanh.default(%f)
bwd %z: bf16[64, 64]<R> = aten.tanh.default(%f)
return fwd output %y
return bwd output %z
"""
    graph = parse_graph(text)
    link = Link(bytes_per_s=bytes_per_s, latency_us=1.0)
    profile = hardware("cpu").model_copy(update={"within": link, "across": link})
    context = Context(mesh=(Axis("shard", 2),), costs=CostTable(hardware=profile, per_host=2))
    choice, step = CodecChoice(context), CodeGathers("auto")
    choice.after(step, graph, step.run(graph, context), 0.0)
    assert says in choice.said
