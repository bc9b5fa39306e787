"""The reference interpreter's own rules, on graphs small enough to know the answer."""

import pytest
import torch

from tests.interp.ranks import same_bits
from zgraph.errors import InterpretError
from zgraph.interpreter import Interpreter, mean, shards, whole
from zgraph.ir import parse_graph, verify

HEAD = """graph "g" mesh(shard=3)
op aten.add.Tensor
op aten.bernoulli.p random
op aten.split.Tensor views(0) multi
param %w: f32[4, 2]<S0> "w"
param %b: f32[5]<S0> "b"
input %x: f32[4, 2]<V>
input %y: f32[5]<V>
"""
W, B = torch.arange(8.0).view(4, 2), torch.arange(5.0) + 10
INPUTS = {
    "w": W,
    "b": B,
    "x": [torch.full((4, 2), float(r)) for r in range(3)],
    "y": [torch.arange(5.0) * r for r in range(3)],
}


def run(lines: str, **changed: object) -> list:
    return Interpreter().run(parse_graph(HEAD + lines), INPUTS | changed)


def test_a_shard_is_a_padded_chunk():
    (found,) = run("return fwd output %w\n")
    assert [t.tolist() for t in found] == [[0, 1, 2, 3], [4, 5, 6, 7], [0, 0, 0, 0]]
    output = parse_graph(HEAD + "return fwd output %w\n").outputs[0]
    assert all(torch.equal(t, W) for t in whole(output, found))


def test_a_gather_gives_every_rank_the_whole():
    (found,) = run(
        "fwd %s: future f32[5]<R> = all_gather_start(%b)\nfwd %f: f32[5]<R> = wait(%s)\nreturn fwd output %f\n"
    )
    assert all(torch.equal(t, B) for t in found)
    assert len({t.data_ptr() for t in found}) == 3


@pytest.mark.parametrize(
    ("op", "placement", "reduce", "factor"),
    [
        ("all_reduce_start", "R", "mean", 1),
        ("all_reduce_start", "R", "sum", 3),
        ("reduce_scatter_start", "S0", "mean", 1),
        ("reduce_scatter_start", "S0", "sum", 3),
        ("broadcast_start", "R", "root", 0),
    ],
)
def test_reductions_do_what_the_type_says(op, placement, reduce, factor):
    lines = (
        f'fwd %p: f32[5]<P({reduce})> = pending(%y, reduce="{reduce}")\n'
        f"fwd %s: future f32[5]<{placement}> = {op}(%p)\nfwd %f: f32[5]<{placement}> = wait(%s)\nreturn fwd output %f\n"
    )
    graph = parse_graph(HEAD + lines)
    verify(graph)
    assert all(torch.equal(t, factor * torch.arange(5.0)) for t in whole(graph.outputs[0], run(lines)[0]))


@pytest.mark.parametrize("placement", ["R, R", "R, S0"])
@pytest.mark.parametrize(
    ("varies", "reduce", "wanted"),
    [
        ("V, V", "sum", 6.0),
        ("V, V", "mean", 1.5),
        ("R, V", "sum", 1.0),
        ("R, V", "mean", 0.5),
    ],
)
def test_on_two_axes_a_sum_counts_no_copy_twice(varies, reduce, wanted, placement):
    """Along an axis with the same on all ranks nothing is summed."""
    pending = varies.replace("V", f"P({reduce})")
    text = (
        f'graph "g" mesh(replicate=2, shard=2)\ninput %x: f32[3]<{varies}>\n'
        f'fwd %p: f32[3]<{pending}> = pending(%x, reduce="{reduce}")\n'
        f"fwd %f: f32[3]<{placement}> = reshard(%p)\nreturn fwd output %f\n"
    )
    graph = parse_graph(text)
    verify(graph)
    given = [float(r if varies == "V, V" else r % 2) for r in range(4)]
    (found,) = Interpreter().run(graph, {"x": [torch.full((3,), v) for v in given]})
    assert found is not None
    if "S0" in placement:
        found = [torch.cat(found[:2])[:3], torch.cat(found[2:])[:3]]
    assert all(torch.equal(t, torch.full((3,), wanted)) for t in found)


def test_what_nothing_is_said_of_is_not_reduced():
    with pytest.raises(InterpretError, match="nothing says how"):
        run("fwd %f: f32[5]<R> = reshard(%y)\nreturn fwd output %f\n")


def test_a_reshard_means_what_its_collective_does():
    lines = (
        'fwd %m: f32[5]<P(mean)> = pending(%y, reduce="mean")\nfwd %r: f32[5]<P(root)> = pending(%y, reduce="root")\n'
    )
    lines += "fwd %f: f32[5]<R> = reshard(%m)\nfwd %g: f32[5]<S0> = reshard(%m)\n"
    lines += "fwd %h: f32[5]<R> = reshard(%r)\nfwd %i: f32[5]<R> = reshard(%b)\n"
    mean_, shard, root, gathered = run(lines + "".join(f"return fwd output %{v}\n" for v in "fghi"))
    assert torch.equal(mean_[2], torch.arange(5.0))
    assert torch.equal(torch.cat(shard)[:5], torch.arange(5.0))
    assert torch.equal(root[2], torch.zeros(5))
    assert torch.equal(gathered[2], B)


@pytest.mark.parametrize("placement", ["S0", "V", "R"])
def test_what_is_packed_comes_apart_again(placement):
    a, b = {"S0": ("w", "b"), "V": ("x", "y"), "R": ("wf", "bf")}[placement]
    lines = "fwd %wf: f32[4, 2]<R> = reshard(%w)\nfwd %bf: f32[5]<R> = reshard(%b)\n" if placement == "R" else ""
    lines += f"fwd %p: f32[18]<{placement}> = pack(%{a}, %{b})\n"
    lines += f"fwd %c: f32[4, 2]<{placement}>, %d: f32[5]<{placement}> = unpack(%p)\n"
    before_a, before_b, after_a, after_b, flat = run(
        lines + "".join(f"return fwd output %{v}\n" for v in (a, b, "c", "d", "p"))
    )
    assert all(map(same_bits, before_a + before_b, after_a + after_b))
    assert {t.numel() for t in flat} == {6 if placement == "S0" else 18}


def test_a_packed_gather_is_the_gather_of_its_members():
    lines = "fwd %p: f32[18]<S0> = pack(%w, %b)\nfwd %s: future f32[18]<R> = all_gather_start(%p)\n"
    lines += "fwd %f: f32[18]<R> = wait(%s)\nfwd %c: f32[4, 2]<R>, %d: f32[5]<R> = unpack(%f)\n"
    c, d = run(lines + "return fwd output %c\nreturn fwd output %d\n")
    assert all(torch.equal(t, W) for t in c)
    assert all(torch.equal(t, B) for t in d)


def test_what_is_released_is_poisoned():
    lines = "fwd %c: f32[5]<V> = copy(%y)\nfwd %i: i64[5]<V> = cast(%y, dtype=i64)\nfwd release(%c)\nfwd release(%i)\n"
    floats, whole_numbers, kept = run(lines + "".join(f"return fwd output %{v}\n" for v in "ciy"))
    assert all(t.isnan().all() for t in floats)
    assert all((t == -1).all() for t in whole_numbers)
    assert torch.equal(kept[1], torch.arange(5.0))


def test_each_rank_draws_numbers_of_its_own_again_and_again():
    lines = "fwd %r: f32[4, 2]<V> = aten.bernoulli.p(%x, 0.5)\nfwd %q: f32[4, 2]<V> = aten.bernoulli.p(%x, 0.5)\n"
    lines += "return fwd output %r\nreturn fwd output %q\n"
    before = torch.get_rng_state()
    first, second = run(lines)
    assert torch.equal(torch.get_rng_state(), before)
    again = run(lines)[0]
    assert all(map(torch.equal, first, again))
    assert not all(map(torch.equal, first, second))
    assert not torch.equal(first[0], first[1])


def test_an_op_with_several_results():
    lines = "fwd %a: f32[2, 2]<V>, %c: f32[2, 2]<V> = aten.split.Tensor(%x, 2)\n"
    found = run(lines + "return fwd output %c\nreturn fwd output none\n")
    assert [t.shape for t in found[0]] == [(2, 2)] * 3
    assert found[1] is None


def test_held_gradients_are_added_once():
    lines = 'bwd %p: f32[5]<P(mean)> = pending(%y, reduce="mean")\n'
    lines += 'bwd %s: f32[5]<P(mean)> = accumulate(%p, target="b")\nreturn bwd output %s\n'
    graph = parse_graph(HEAD + lines)
    interpreter = Interpreter()
    interpreter.held["b"] = [torch.ones(5) * 100] * 3
    (first,) = interpreter.run(graph, INPUTS)
    (second,) = interpreter.run(graph, INPUTS)
    assert torch.equal(first[1], torch.arange(5.0) + 100)
    assert torch.equal(second[1], torch.arange(5.0))


GATHER = "fwd %s: future f32[5]<R> = all_gather_start(%b, keep=true)\nfwd %f: f32[5]<R> = wait(%s)\n"


def test_a_gather_is_kept_until_a_step_ends():
    graph = parse_graph(HEAD + GATHER + "fwd %c: f32[5]<R> = copy(%f)\nfwd release(%f)\nreturn fwd output %c\n")
    interpreter = Interpreter()
    interpreter.syncs = False
    for given in (B, B + 1, B + 2):
        (found,) = interpreter.run(graph, INPUTS | {"b": given})
        assert all(torch.equal(t, B) for t in found)
    interpreter.kept.clear()
    interpreter.syncs = True
    for given in (B + 1, B + 2):
        (found,) = interpreter.run(graph, INPUTS | {"b": given})
        assert all(torch.equal(t, given) for t in found)
    assert not interpreter.kept


def test_what_lives_on_is_not_copied():
    head = HEAD.replace("op aten.add.Tensor", "op aten.add.Tensor\nop aten.mul_.Tensor views(0) writes(0)")
    graph = parse_graph(head + "fwd %m: f32[4, 2]<V> = aten.mul_.Tensor(%x, 2)\nreturn fwd output %m\n")
    own = [torch.full((4, 2), float(r)) for r in range(3)]
    for factor in (2, 4):
        (found,) = Interpreter().run(graph, INPUTS, {"x": own})
        assert torch.equal(own[2], torch.full((4, 2), 2.0 * factor))
        assert torch.equal(found[2], own[2])
    (found,) = Interpreter().run(graph, INPUTS)
    assert torch.equal(INPUTS["x"][2], torch.full((4, 2), 2.0))


def test_who_runs_ops_may_change_how():
    graph = parse_graph(HEAD + "fwd %m: f32[4, 2]<V> = aten.add.Tensor(%x, %x)\nreturn fwd output %m\n")

    def caller(node, row, rank, args, kwargs):
        return args[0] * 0 + rank + 10

    (found,) = Interpreter(caller=caller).run(graph, INPUTS)
    assert [float(t[0, 0]) for t in found] == [10, 11, 12]


def test_copies_of_a_shard_that_differ_are_seen():
    graph = parse_graph('graph "g" mesh(replicate=2, shard=2)\nparam %w: f32[4]<R, S0> "w"\nreturn fwd output %w\n')
    chunks = [torch.full((2,), float(rank)) for rank in range(4)]
    found = whole(graph.outputs[0], chunks, graph.num_shards)
    assert [t.tolist() for t in found] == [[0, 0, 1, 1], [0, 0, 1, 1], [2, 2, 3, 3], [2, 2, 3, 3]]
    again = shards(found, graph.params[0].value.tensor, graph.num_shards)
    assert all(map(torch.equal, again, chunks))


def test_inputs_are_never_changed():
    lines = "fwd release(%y)\nfwd release(%b)\nreturn fwd output %w\n"
    given = {k: v.clone() if isinstance(v, torch.Tensor) else [t.clone() for t in v] for k, v in INPUTS.items()}
    Interpreter().run(parse_graph(HEAD + lines), given)
    assert all(map(torch.equal, given["y"], INPUTS["y"]))
    assert torch.equal(given["b"], B)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"w": torch.zeros(4, 3)}, r"%w was given with shape \(4, 3\), but it is f32\[4, 2\]<S0>"),
        ({"w": torch.zeros(8)}, "%w was given with shape"),
        ({"x": [torch.zeros(4, 2)] * 2}, "%x was given for 2 ranks, not 3"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(changed, words):
    with pytest.raises(InterpretError, match=words):
        run("return fwd output %w\n", **changed)


def test_a_missing_input_and_a_wrong_number_of_ranks_are_refused():
    graph = parse_graph(HEAD)
    with pytest.raises(InterpretError, match="the input %b is missing"):
        Interpreter().run(graph, {"w": W})
    with pytest.raises(InterpretError, match="the graph is for 3 ranks, not 2"):
        Interpreter(2).run(graph, INPUTS)


def test_the_mean_is_taken_in_the_order_of_the_ranks():
    large, one = torch.tensor([1e8]), torch.tensor([1.0])
    assert mean([large, one, -large]).item() == 0
    assert mean([large, -large, one]).item() == pytest.approx(1 / 3)
    assert torch.equal(large, torch.tensor([1e8]))
    tiny = torch.tensor([1e-45])
    assert torch.equal(mean([tiny, tiny, tiny]), tiny)  # divided once, at the end
