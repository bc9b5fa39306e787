"""Offloading to the host on one rank: the losses stay, the device holds less, bad targets are refused."""

import pytest
import torch

import zgraph
from tests.deep import deep
from tests.single.trained import Trained, batch, llama, plain
from zgraph.errors import OffloadError, UsageError
from zgraph.options.offload import Resting, of_parameters
from zgraph.runtime import host

PAGE = host.PAGE_BYTES


@pytest.mark.parametrize("name", [deep("llama"), deep("t5"), "vit"])
def test_what_is_offloaded_trains_the_same(name):
    whole = plain(name)
    moved = Trained(name, offload="activations", hardware=quick())
    rested = Trained(name, offload="optimizer")
    everything = Trained(name, offload=("activations", "parameters"), recompute=True, hardware=quick())
    for trained in (moved, rested, everything):
        assert trained.losses == whole.losses
        assert trained.predicted == pytest.approx(trained.peak, rel=0.03)
        assert trained.num_moved > 0
    assert moved.report.step_peak_bytes < whole.report.step_peak_bytes
    assert moved.host_alive == 0, "what waited has come back"
    rest_bytes = whole.report.rest_bytes
    assert (rested.report.rest_bytes, rested.report.state_bytes) == (rest_bytes, 0)
    assert (everything.report.rest_bytes, everything.report.state_bytes) == (0, 0)
    assert everything.report.host_bytes == 3 * rest_bytes
    assert everything.peak < rested.peak < whole.peak
    assert everything.num_again > 0


def quick():
    """Hardware whose copies have no latency: all that waits may be moved, small as it is."""
    cpu = zgraph.cost.hardware("cpu")
    return cpu.model_copy(update={"host_link": cpu.host_link.model_copy(update={"latency_us": 0.001})})


@pytest.mark.parametrize("offload", ["optimizer", "parameters"])
def test_masters_of_another_dtype_train_the_same(offload):
    whole = Trained("llama", param_dtype=torch.bfloat16)
    moved = Trained("llama", param_dtype=torch.bfloat16, offload=offload)
    assert moved.losses == whole.losses
    assert moved.report.rest_bytes == (whole.report.rest_bytes // 2 if offload == "optimizer" else 0)


@pytest.mark.parametrize("options", [{"fused": True}, {"foreach": True}])
def test_updates_that_torch_does_not_count_are_noticed(options):
    """torch's fused step raises the version of no tensor."""
    losses = []
    for given in ({}, options):
        torch.compiler.reset()
        torch.manual_seed(0)
        model = zgraph.compile(llama(), param_dtype=torch.bfloat16, offload="optimizer")
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, **given)
        losses.append([])
        for _ in range(3):
            loss = model(**batch("llama", 0)).loss
            loss.backward()
            losses[-1].append(loss.item())
            optimizer.step()
            optimizer.zero_grad()
    assert losses[1] == pytest.approx(losses[0], rel=1e-2)
    assert losses[1][1] < losses[1][0] - 0.1, "the update is computed with"


def test_gradients_of_several_micro_steps_are_summed_on_the_host():
    grads = []
    for offload in (None, "parameters"):
        torch.compiler.reset()
        torch.manual_seed(0)
        model = zgraph.compile(llama(), offload=offload)
        for seed in range(3):
            model(**batch("llama", seed)).loss.backward()
        grads.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_a_loaded_state_is_computed_with():
    other = llama()
    model = zgraph.compile(llama(), offload="optimizer")
    model.eval()
    with torch.no_grad():
        before = model(**batch("llama", 0)).loss
        model.load_state_dict(other.state_dict())
        after = model(**batch("llama", 0)).loss
        assert after != before
        assert torch.equal(after, other.eval()(**batch("llama", 0)).loss)


def test_bad_targets_are_refused_and_the_model_left_as_it_was(monkeypatch):
    model = llama()
    before = [p.clone() for p in model.parameters()]
    for bad in ("gpu", ("optimizer", "everything")):
        with pytest.raises(UsageError, match="activations, optimizer, parameters"):
            zgraph.compile(model, offload=bad)
    with pytest.raises(UsageError, match="masters, gradients and the optimizer's state"):
        zgraph.compile(model, offload="gradients")
    with pytest.raises(UsageError, match="recompute must be"):
        zgraph.compile(model, recompute="sometimes")
    with pytest.raises(UsageError, match='fullgraph="eager"'):
        zgraph.compile(model, fullgraph="eager", offload="parameters")
    monkeypatch.setattr(host, "available_bytes", lambda: 1_000_000)
    with pytest.raises(OffloadError, match=r"need .* bytes of the host's memory for each rank, but only 1,000,000"):
        zgraph.compile(model, offload="optimizer")
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    compiled = zgraph.compile(model, offload="activations", hardware=quick())
    monkeypatch.setattr(host, "available_bytes", lambda: 1_000)
    with pytest.raises(OffloadError, match="wait for the backward"):
        compiled(**batch("llama", 0))


def test_the_compiler_offloads_as_little_as_makes_room():
    """Of a budget of 4 x bytes, 3 x are for what lies at rest."""
    resting = {name: Resting(30, 15) for name in "abcd"}
    assert chosen(resting, None) == {}
    assert chosen(resting, 4 * 160) == {}
    assert chosen(resting, 4 * 159) == {"d": "optimizer"}
    assert chosen(resting, 4 * 20) == dict.fromkeys("abcd", "optimizer")
    assert chosen(resting, 4 * 10) == {"a": "optimizer", "b": "optimizer", "c": "parameters", "d": "parameters"}


def chosen(resting, budget):
    return of_parameters("auto", resting, budget, is_gpu=True)


def test_blocks_of_the_host_are_used_again():
    pool = host.HostPool(torch.device("cpu"))
    first = pool.empty((3, 5), torch.float32, (5, 1))
    address = first.data_ptr()
    view = first[1:]
    del first
    assert pool.alive_bytes == PAGE
    del view
    assert pool.alive_bytes == 0
    assert pool.empty((2,), torch.int64).data_ptr() == address
    assert pool.held_bytes == PAGE
    strided = pool.empty_like(torch.empty(6, 4).t())
    assert strided.stride() == (1, 4)
    assert pool.empty((0, 3), torch.float32).shape == (0, 3)


def test_a_block_goes_to_what_nearly_fills_it():
    pool = host.HostPool(torch.device("cpu"))
    sizes = (16, 17, 24)
    blocks = [pool.empty((size * PAGE,), torch.uint8) for size in sizes]
    addresses = dict(zip(sizes, (b.data_ptr() for b in blocks), strict=True))
    del blocks
    fitting = pool.empty((15 * PAGE,), torch.uint8)
    assert fitting.data_ptr() == addresses[16], "the best that fits"
    other = pool.empty((15 * PAGE - 5,), torch.uint8)
    assert other.data_ptr() == addresses[17]
    assert pool.alive_bytes == 30 * PAGE
    held = pool.held_bytes
    smaller = pool.empty((20 * PAGE,), torch.uint8)
    assert smaller.data_ptr() != addresses[24], "it would leave more than an eighth of it idle"
    assert pool.held_bytes == held + 20 * PAGE


class Driver:
    """Pins so many bytes."""

    def __init__(self, limit_bytes):
        self.limit_bytes, self.pinned = limit_bytes, {}

    def cudaHostRegister(self, address, num_bytes, flags):
        if sum(self.pinned.values()) + num_bytes > self.limit_bytes:
            return 2
        self.pinned[address] = num_bytes
        return 0

    def cudaHostUnregister(self, address):
        del self.pinned[address]


def test_blocks_are_unpinned_when_the_host_is_full(monkeypatch):
    driver, waits = Driver(10 * PAGE), []
    monkeypatch.setattr(torch.cuda, "cudart", lambda: driver)
    monkeypatch.setattr(torch.cuda, "synchronize", waits.append)
    pool = host.HostPool(torch.device("cuda", 0))
    kept = pool.empty((2 * PAGE,), torch.uint8)
    for size in (3, 4, 6, 7):  # of one sequence length after the other
        pool.empty((size * PAGE,), torch.uint8)
    assert sorted(driver.pinned.values()) == [2 * PAGE, 7 * PAGE]
    assert pool.held_bytes == 9 * PAGE
    assert waits == [torch.device("cuda", 0)] * 2, "copies may still be reading what is unpinned"
    with pytest.raises(OffloadError, match="cannot pin"):
        pool.empty((9 * PAGE,), torch.uint8)
    assert kept.numel() == 2 * PAGE
    assert driver.pinned == {kept.data_ptr(): 2 * PAGE}


def test_what_the_host_has_no_room_for_is_given_back_first(monkeypatch):
    pool = host.HostPool(torch.device("cpu"))
    for size in (3, 5, 8):
        pool.empty((size * PAGE,), torch.uint8)
    monkeypatch.setattr(host, "available_bytes", lambda: 10 * PAGE)
    pool.empty((14 * PAGE,), torch.uint8)
    assert pool.held_bytes == (8 + 14) * PAGE, "those that were used longest ago"
