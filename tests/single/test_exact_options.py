"""Words of `compress` that stand for exact codes: what they become, what they do not go with, and their plan."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import zgraph
from zgraph.compiler.codec_choice import CodecChoice
from zgraph.cost import CostTable, Link, hardware
from zgraph.errors import CodecError, UsageError
from zgraph.ir import Axis, parse_graph
from zgraph.ir.codecs import Q8
from zgraph.options.compression import Codes, check_parameters, codes_for, codes_of, planned_codes
from zgraph.passes import RECIPES, Context, compressing, pipeline_of
from zgraph.passes.code_gathers import CodeGathers

CPU = torch.device("cpu")


def mesh(*names: str) -> Any:
    return SimpleNamespace(ndim=len(names), mesh_dim_names=names, size=lambda dim=None: 2 if dim is not None else 4)


def test_the_words_become_the_pass() -> None:
    for word, codec in (("exact", "auto"), ("delta", "delta"), ("exponent", "exponent")):
        codes = Codes(parameters=word)
        for axes in (("shard",), ("replicate", "shard")):
            assert codes_for(word, mesh(*axes), has_recipe=False, fullgraph=True) == codes
        assert f",code-gathers(codec={codec}),broadcast," in compressing(RECIPES[2], "", word)
        assert planned_codes(word, (1, 2), 1) == codes
    assert not codes_for("exact", None, has_recipe=False, fullgraph=True)


@pytest.mark.parametrize(
    ("compress", "recipe"),
    [
        ("q4", "compress(gradients=q4(block=128))"),
        ({"gradients": "q4", "parameters": "q8"}, "compress(gradients=q4(block=128),parameters=q8(block=256))"),
        ({"parameters": Q8()}, "compress(gradients=none,parameters=q8(block=256))"),
        ({"gradients": "auto", "parameters": "exact"}, "code-gathers(codec=auto),compress(gradients=auto)"),
    ],
)
def test_codecs_of_gradients_and_parameters_become_passes(compress: Any, recipe: str) -> None:
    codes = codes_for(compress, mesh("shard"), has_recipe=False, fullgraph=True)
    made = compressing(RECIPES[2], codes.gradients, codes.parameters)
    assert f",{recipe},broadcast," in made
    assert recipe.replace(",p", ", p") in str(pipeline_of(made))
    with pytest.raises(UsageError, match=re.escape(f"put {recipe} behind bucket")):
        codes_for(compress, mesh("shard"), has_recipe=True, fullgraph=True)


@pytest.mark.parametrize(
    ("compress", "says"),
    [
        ("raw", "takes q8, q4, q2, sign, topk, auto, exact"),
        ("difference(q8)", "not difference"),
        (8, "must be a codec"),
        ({"weights": "q8"}, "must be a codec"),
        ({"gradients": "exact"}, "there is no codec called exact"),
        ({"gradients": "delta"}, "takes q8, q4, q2, sign, topk, auto, not delta"),
        ({"parameters": "auto"}, "there is no codec called auto"),
        ({"parameters": 4}, "must be a codec"),
    ],
)
def test_what_is_no_codec_is_refused(compress: Any, says: str) -> None:
    with pytest.raises((UsageError, CodecError), match=says):
        codes_of(compress)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"mesh": mesh("tensor", "shard")}, "cuts them along tensor"),
        ({"fullgraph": "eager"}, "captures none"),
        ({"has_recipe": True}, "put code-gathers\\(codec=auto\\) behind bucket"),
    ],
)
def test_what_exact_codes_do_not_go_with(options: dict[str, Any], says: str) -> None:
    given: dict[str, Any] = {"mesh": mesh("shard"), "has_recipe": False, "fullgraph": True} | options
    with pytest.raises(UsageError, match=says):
        codes_for("exact", **given)
    with pytest.raises(UsageError, match="leave compress="):
        planned_codes("exact", (1, 2), 2)


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
        ("q8(block=256)", 3, None, True),
        ("sign(block=256)", 2, None, True),
        ("q8(block=256)", 0, None, False),
        ("topk(1%, chunk=4096)", 3, None, False),
        ("q8(block=256)", 3, torch.float64, False),
    ],
)
def test_a_codec_that_codes_nothing_is_refused(
    codec: str, stage: int, dtype: torch.dtype | None, is_taken: bool
) -> None:
    codes = Codes(parameters=codec)
    model = nn.Linear(4, 4)
    stages = {"weight": stage, "bias": 0}
    if is_taken:
        check_parameters(codes, model.named_parameters(), stages, dtype, CPU)
        return
    with pytest.raises(
        UsageError, match=r"there is none|at stage 0 none is|is of stage 3|no parameter is computed with"
    ):
        check_parameters(codes, model.named_parameters(), stages, dtype, CPU)


@pytest.mark.parametrize(
    ("codec", "stage", "is_taken"), [("exponent", 3, False), ("q8(block=256)", 2, False), ("q8(block=256)", 3, True)]
)
def test_on_a_gpu_codes_of_parameters_have_a_fixed_length(codec: str, stage: int, is_taken: bool) -> None:
    model, stages = nn.Linear(4, 4), {"weight": stage, "bias": stage}
    given = Codes(parameters=codec), model.named_parameters(), stages, torch.bfloat16, torch.device("cuda")
    if is_taken:
        check_parameters(*given)
        return
    with pytest.raises(UsageError, match=r"on processors alone.*take q8 or q4 at stage 3"):
        check_parameters(*given)


def test_stages_of_a_plan_that_gather_no_codes_are_named() -> None:
    with pytest.raises(UsageError, match="without 0"):
        planned_codes({"parameters": "q8"}, (0, 1, 2, 3), 1)
    with pytest.raises(UsageError, match="of 1 and 2, or take q8"):
        planned_codes({"parameters": "sign"}, (1, 2, 3), 1)
    assert planned_codes({"parameters": "sign"}, (1, 2), 1) == Codes(parameters="sign(block=256)")


def test_a_plan_counts_copies_at_stages_that_keep_them() -> None:
    model, x = nn.Sequential(nn.Linear(512, 512), nn.Linear(512, 64)), torch.randn(4, 512)
    kept = 2 * sum(p.numel() for p in model.parameters())
    for stage, codec, more in ((2, "exact", kept), (3, "exact", 0), (2, {"parameters": "sign"}, kept + kept // 2)):
        rest = []
        for compress in (None, codec):
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
