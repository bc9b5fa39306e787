"""Collectives on lanes: on one host, and on hosts of two ranks each, what arrives is what was sent."""

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from tests.deep import deep
from zgraph.bridge import private_runtime
from zgraph.bridge.sized_codes import encode_sized, sized_bytes
from zgraph.ir.codecs import HEAD_BYTES, Exponent
from zgraph.runtime.gloo_transport import Lane
from zgraph.runtime.hosts import Hosts

from .pool import Pool

LAYOUTS = {
    "flat": (4, ["a", "a", "a", "a"]),
    "apart": (3, ["a", "b", "c"]),
    "two by two": (4, ["a", "a", "b", "b"]),
    "in turns": (4, ["a", "b", "a", "b"]),
}


def open_lane(mesh: DeviceMesh, name: str, hosts: list[str]) -> Lane:
    return Lane(private_runtime.store(), f"test/{name}", mesh.get_local_rank(), Hosts.of(hosts))


def run_all(mesh: DeviceMesh, name: str, hosts: list[str], numel: int) -> list[bool]:
    """Several collectives of each kind, all under way at once."""
    lane, rank, num_ranks = open_lane(mesh, f"{name}/{numel}", hosts), mesh.get_local_rank(), len(hosts)
    whole = [torch.arange(float(num_ranks * numel)).view(num_ranks, numel) * (r + 1) for r in range(num_ranks)]
    mean = torch.stack(whole).mean(0)
    jobs = []
    for _ in range(3):
        gathered = torch.zeros(num_ranks, numel)
        jobs.append(
            (lane.all_gather((gathered.unbind(), whole[0][rank])), lambda t, g=gathered: torch.equal(g, whole[0]))
        )
        scattered = lane.reduce_scatter(whole[rank].clone().unbind())
        jobs.append((scattered, lambda t: torch.allclose(t.result[0], mean[rank])))
        reduced = whole[rank].clone()
        jobs.append((lane.all_reduce(reduced.unbind()), lambda t, r=reduced: torch.allclose(r, mean)))
    for transfer, _ in jobs:
        transfer.wait()
    lane.close()
    return [check(transfer) for transfer, check in jobs]


@pytest.mark.parametrize("numel", [1, 1000, 70_000])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_arrives_is_what_was_sent(pool: Pool, layout: str, numel: int) -> None:
    num_ranks, hosts = LAYOUTS[layout]
    assert pool.run(run_all, num_ranks, layout, hosts, numel) == [[True] * 9] * num_ranks


def run_rows(mesh: DeviceMesh, numel: int) -> list[bool]:
    """Two rows of two ranks, each row with all shards; two tensors in one call."""
    rank, place = mesh.get_local_rank(), mesh.get_local_rank() % 2
    lane = Lane(private_runtime.store(), f"test/rows/{numel}", rank, Hosts.rows_of(4, 2), each_has_all=True)
    whole = [torch.arange(2.0 * numel).view(2, numel) * (r + 1) for r in range(4)]
    mean = torch.stack(whole).mean(0)
    slots = [torch.zeros(2, numel), torch.zeros(2, numel)]
    gather = lane.all_gather((slots[0].unbind(), whole[0][place]), (slots[1].unbind(), whole[1][place]))
    scatter = lane.reduce_scatter(whole[rank].clone().unbind(), (whole[rank] * 2).unbind())
    reduced = torch.full((4, numel), float(rank))
    share = lane.all_reduce(reduced.unbind())
    for transfer in (gather, scatter, share):
        transfer.wait()
    lane.close()
    return [
        torch.equal(slots[0], whole[0]) and torch.equal(slots[1], whole[1]),
        all(torch.allclose(r, k * mean[place]) for k, r in zip((1, 2), scatter.result, strict=True)),
        bool((reduced == 1.5).all()),
    ]


@pytest.mark.parametrize("numel", [1, 3, 50_001])
def test_rows_that_each_have_all_shards(pool: Pool, numel: int) -> None:
    assert pool.run(run_rows, 4, numel) == [[True] * 3] * 4


def gather_codes(mesh: DeviceMesh, layout: str) -> bool:
    """Whether codes of several lengths arrive, three gathers at once, and no more of them than there is."""
    rank, (num_ranks, hosts) = mesh.get_local_rank(), LAYOUTS.get(layout, (4, ["rows"]))
    is_rows = layout == "rows"
    made = Hosts.rows_of(4, 2) if is_rows else Hosts.of(hosts)
    lane = Lane(private_runtime.store(), f"test/codes/{layout}", rank, made, each_has_all=is_rows)
    num_shards, numel, jobs = 2 if is_rows else num_ranks, 3000, []
    for number in range(3):
        codes = []
        for shard in range(num_shards):
            drawn = torch.randn(numel, generator=torch.Generator().manual_seed(10 * number + shard))
            codes.append(torch.full((HEAD_BYTES + 2 * numel,), 255, dtype=torch.uint8))
            drawn = drawn if shard else drawn.sign()  # whose code is far shorter
            encode_sized(Exponent(), drawn.bfloat16(), codes[-1])
        slots = torch.full((num_shards, len(codes[0])), 7, dtype=torch.uint8)
        jobs.append((lane.all_gather((slots.unbind(), codes[lane.shard]), sized=True), slots, codes))
    found = []
    for transfer, slots, codes in jobs:
        transfer.wait()
        for slot, code in zip(slots, codes, strict=True):
            size = sized_bytes(code)
            found.append(torch.equal(slot[:size], code[:size]) and bool((slot[size:] == 7).all()))
    lane.close()
    return all(found)


@pytest.mark.parametrize("layout", ["two by two", "rows", deep("flat"), deep("in turns"), deep("apart")])
def test_of_codes_as_much_arrives_as_there_is(pool: Pool, layout: str) -> None:
    num_ranks = LAYOUTS[layout][0] if layout in LAYOUTS else 4
    assert pool.run(gather_codes, num_ranks, layout) == [True] * num_ranks


def at_its_own_pace(mesh: DeviceMesh, layout: str) -> list[bool]:
    """Whether transfers of unlike sizes arrive, of which each rank hands over some at once, and the others later."""
    is_rows = layout == "rows"
    num_ranks, hosts = (4, []) if is_rows else LAYOUTS[layout]
    made, rank = Hosts.rows_of(4, 2) if is_rows else Hosts.of(hosts), mesh.get_local_rank()
    lane = Lane(private_runtime.store(), f"test/pace/{layout}", rank, made, each_has_all=is_rows)
    makers = [0, 2] if is_rows and rank % 2 == 0 else [1, 3] if is_rows else list(range(num_ranks))
    jobs, at = [], makers.index(rank)
    for number in range(24):
        numel = [4000, 1, 300][number % 3] + number
        mine = [torch.full((numel,), 100.0 * rank + number) for _ in makers]
        expected = [torch.full((numel,), 100.0 * r + number) for r in makers]
        got = [torch.zeros(numel) for _ in makers]
        swap, share = (lane.swap_outside, lane.share_outside) if is_rows else (lane.all_to_all, None)
        jobs.append((swap(got, mine), got, expected))
        gathered = [torch.zeros(numel) for _ in makers]
        shared = share(gathered, mine[at]) if share else lane.all_gather((gathered, mine[at]))
        jobs.append((shared, gathered, expected))
        if number % (rank + 2) == 0:
            jobs[-1][0].wait()
    for transfer, *_ in jobs:
        transfer.wait()
    lane.close()
    return [all(map(torch.equal, got, expected)) for _, got, expected in jobs]


@pytest.mark.parametrize("layout", ["flat", "two by two", "rows"])
def test_ranks_hand_over_at_their_own_pace(pool: Pool, layout: str) -> None:
    assert pool.run(at_its_own_pace, 4, layout) == [[True] * 48] * 4


def sums(mesh: DeviceMesh) -> list[float]:
    """Large and small numbers, whose sum depends on the order."""
    lane = open_lane(mesh, "order", ["a"] * 3)
    mine = [1e8, 1.0, -1e8][mesh.get_local_rank()]
    chunks = torch.full((3, 1), mine)
    lane.all_reduce(chunks.unbind()).wait()
    lane.close()
    return chunks.view(-1).tolist()


def test_sums_are_taken_in_the_order_of_the_ranks(pool: Pool) -> None:
    assert pool.run(sums, 3) == [[0.0] * 3] * 3


def large(mesh: DeviceMesh, layout: str) -> bool:
    """Whether the mean of fp16 numbers is right whose sum is out of range."""
    num_ranks, hosts = LAYOUTS[layout]
    lane = open_lane(mesh, f"large/{layout}", hosts)
    found = torch.full((num_ranks, 3), 40_000.0, dtype=torch.float16)
    scattered = lane.reduce_scatter(found.clone().unbind())
    for transfer in (scattered, lane.all_reduce(found.unbind())):
        transfer.wait()
    lane.close()
    return bool((found == 40_000).all() and (scattered.result[0] == 40_000).all())


@pytest.mark.parametrize("layout", ["flat", "two by two"])
def test_means_of_large_numbers_in_half_precision(pool: Pool, layout: str) -> None:
    assert pool.run(large, 4, layout) == [True] * 4


def left_alone(mesh: DeviceMesh) -> str:
    """The second rank closes its lane; the first waits for it."""
    lane = open_lane(mesh, "alone", ["a", "b"])
    group = mesh.get_group()
    dist.barrier(group)
    outcome = "closed"
    if mesh.get_local_rank() == 0:
        transfer = lane.all_gather((torch.zeros(2, 4).unbind(), torch.zeros(4)))
        try:
            transfer.wait()
        except RuntimeError as error:
            outcome = type(error).__name__
    lane.close()
    return outcome


def test_a_closed_lane_is_an_error_for_those_who_wait(pool: Pool) -> None:
    assert pool.run(left_alone, 2) == ["RuntimeError", "closed"]


def closed_in_flight(mesh: DeviceMesh) -> bool:
    """Closing does not wait for a peer that never sends."""
    lane = open_lane(mesh, "in flight", ["a", "b"])
    dist.barrier(mesh.get_group())
    if mesh.get_local_rank() == 0:
        transfer = lane.all_gather((torch.zeros(2, 4).unbind(), torch.zeros(4)))
        lane.close()
        return transfer.error is not None
    return True


def test_closing_ends_what_is_under_way(pool: Pool) -> None:
    assert pool.run(closed_in_flight, 2) == [True, True]
