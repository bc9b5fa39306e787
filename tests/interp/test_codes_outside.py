"""Codes along the outer of two data axes on simulated ranks: sums inside, codes outside, and nothing is lost."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.deep import deep
from zgraph.certify.certificate import certify
from zgraph.errors import VerifyError
from zgraph.interpreter import Interpreter
from zgraph.ir import Graph, Value, parse_graph
from zgraph.passes import Context
from zgraph.passes.compress import Compress

from .test_codes import CODECS
from .test_codes import step as plain_step

TEXT = """graph "step" mesh(replicate={copies}, shard={shards})
op aten.tanh.default
param %a: f32[5, 8]<R, {at}> "a" stage={stage}
param %b: f32[7]<R, {at}> "b" stage={stage}
tangent %t: f32[5, 8]<V, V>
tangent %u: f32[7]<V, V>
bwd %g: f32[5, 8]<P({how}), P({how})> = pending(%t, reduce="{how}")
bwd %h: f32[7]<P({how}), P({how})> = pending(%u, reduce="{how}")
bwd %gm: f32[5, 8]<R, {at}>, %hm: f32[7]<R, {at}> = reshard(%g, %h)
return bwd grad "a" %gm
return bwd grad "b" %hm
"""


def step(stage: int, copies: int, shards: int, how: str) -> Graph:
    at = "S0" if stage else "R"
    return parse_graph(TEXT.format(stage=stage, copies=copies, shards=shards, how=how, at=at))


@pytest.mark.parametrize(
    ("stage", "copies", "shards", "how", "codec"),
    [
        (2, 2, 2, "mean", CODECS[0]),
        (0, 2, 2, "mean", CODECS[1]),
        (3, 3, 2, "sum", CODECS[3]),
        *(deep(s, c, n, "mean", codec) for s in (0, 1) for c, n in ((2, 3), (4, 2)) for codec in CODECS),
    ],
)
def test_what_is_sent_and_what_is_left_out_add_up(stage: int, copies: int, shards: int, how: str, codec: str) -> None:
    graph = step(stage, copies, shards, how)
    coded = Compress(codec, at_least_bytes=1).run(graph, Context(mesh=graph.mesh))
    assert [n.op for n in coded.nodes].count("encode") == 2
    interpreter, rng, num_ranks = Interpreter(), torch.Generator().manual_seed(0), copies * shards
    chunk = -(-5 // shards) * 8
    wanted, sent = torch.zeros(shards, chunk).double(), torch.zeros(shards, chunk).double()
    for _ in range(5):
        tangents = [[torch.randn(s, generator=rng) for _ in range(num_ranks)] for s in ((5, 8), (7,))]
        made = interpreter.run(coded, {"a": torch.zeros(5, 8), "b": torch.zeros(7), "t": tangents[0], "u": tangents[1]})
        ranks = made[0]
        assert ranks is not None
        for shard in range(shards):
            same = [ranks[shard + shards * copy] for copy in range(copies)]
            assert all(torch.equal(same[0], other) for other in same), "those that hold a shard have the same"
        total = torch.stack(tangents[0]).double().sum(0) / (num_ranks if how == "mean" else 1)
        wanted.view(-1)[:40] += total.view(-1)
        if stage:
            sent += torch.stack([part.view(-1) for part in ranks[:shards]]).double()
        else:
            sent.view(-1)[:40] += ranks[0].view(-1).double()
    left = torch.zeros(shards, chunk).double()
    own, parts = (interpreter.rests[("a", "b"), is_part] for is_part in (False, True))
    for shard in range(shards):
        for copy in range(copies):
            rank = shard + shards * copy
            left[shard] += own[rank].view(-1)[:chunk].double() / (copies if how == "mean" else 1)
            part = torch.zeros_like(own[rank]).double()
            part[copy] = parts[rank].double()
            left[shard] += part.view(-1)[:chunk]
    torch.testing.assert_close((sent + left).view(-1)[:40], wanted.view(-1)[:40], rtol=1e-5, atol=1e-5)
    assert (sent - wanted).view(-1)[:40].abs().max() > 1e-4, "the code leaves something out"


@pytest.mark.parametrize(("stage", "mesh"), [(2, "rows"), deep(0, "rows"), (0, "one")])
def test_a_part_of_another_size_is_refused(stage: int, mesh: str) -> None:
    """Eight signs are a byte: bytes alone do not tell how many numbers there are."""
    graph = parse_graph(plain_step(stage, 2, "")) if mesh == "one" else step(stage, 2, 2, "mean")
    context = Context(mesh=graph.mesh)
    coded = Compress("sign(block=8)", at_least_bytes=1).run(graph, context)
    certify([("placed", graph), ("compress", coded)], context)
    (part,) = [n for n in coded.nodes if n.op == "decode" and n.option("reduce") is not None]
    kind = part.results[0].tensor
    smaller = replace(kind, shape=(int(kind.shape[0]) - 2, *kind.shape[1:]))
    name = part.results[0].name

    def changed_part(value: Value) -> Value:
        return replace(value, type=smaller) if value.name == name else value

    nodes = [
        replace(
            n,
            args=tuple(changed_part(a) if isinstance(a, Value) else a for a in n.args),
            results=tuple(map(changed_part, n.results)),
        )
        for n in coded.nodes
    ]
    with pytest.raises(VerifyError):
        certify([("placed", graph), ("compress", coded.with_nodes(nodes))], context)
