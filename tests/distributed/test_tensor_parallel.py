"""Tensor parallelism on real ranks: the numbers of plain training, whatever the stage beside it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard

import zgraph
from tests.deep import DEEP, deep
from zgraph.certify.certificate import certify
from zgraph.debugging.runs import check_run
from zgraph.errors import BatchMismatchError, CheckError, PeerError, PlacementError, UsageError, ZgraphError
from zgraph.runfile.format import load_run

from . import zoo
from .nets import built
from .pool import Pool

NUM_STEPS = 20 if DEEP else 6


def compiled(name: str, **options: Any) -> nn.Module:
    return zgraph.compile(zoo.builder(name)(), tensor_parallel=2, **options)


def full(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def train(mesh: DeviceMesh, name: str, stage: int, num_micro: int = 1, **options: Any) -> tuple[float, float, float]:
    """The largest relative errors of a loss and of a gradient's norm, and the largest of a parameter in the end."""
    plain, ours = zoo.builder(name)(), compiled(name, stage=stage, **options)
    num_data, mine = mesh.size() // 2, mesh.get_local_rank() // 2
    optimizers = [torch.optim.AdamW(model.parameters(), lr=1e-3) for model in (plain, ours)]
    worst_loss = worst_norm = 0.0
    for model in (plain, ours):
        model.train(num_data == 1)  # else dropout draws for all batches in the plain model
    for step in range(NUM_STEPS):
        for micro in range(num_micro):
            batches = [zoo.batch(name, 100 * step + 10 * micro + rank) for rank in range(num_data)]
            torch.manual_seed(step)
            losses = [plain(**batch).loss for batch in batches]
            (sum(losses) / num_data).backward()
            torch.manual_seed(step)
            if micro < num_micro - 1:
                with zgraph.no_sync(ours):
                    loss = ours(**batches[mine]).loss
                    loss.backward()
            else:
                loss = ours(**batches[mine]).loss
                loss.backward()
            worst_loss = max(worst_loss, abs(loss.item() / losses[mine].item() - 1))
        norms = [full(nn.utils.clip_grad_norm_(model.parameters(), 0.5)).item() for model in (plain, ours)]
        worst_norm = max(worst_norm, abs(norms[1] / norms[0] - 1))
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    pairs = zip(plain.parameters(), ours.parameters(), strict=True)
    return worst_loss, worst_norm, max(float((full(b) - a).abs().max()) for a, b in pairs)


def assert_close(found: list[tuple[float, float, float]]) -> None:
    for loss, norm, parameter in found:
        assert loss < 2e-6
        assert norm < 2e-6
        assert parameter < 1e-4  # where a gradient is nearly zero, AdamW makes much of its last bits


@pytest.mark.parametrize(
    ("name", "stage", "num_micro"),
    [
        ("llama", 3, 1),
        deep("gpt2", 1, 2),
        deep("llama", 0, 2),
        deep("llama", 2, 1),
        deep("gpt2", 3, 1),
        deep("gpt2", 2, 2),
    ],
)
def test_two_by_two_ranks(pool: Pool, name: str, stage: int, num_micro: int) -> None:
    assert_close(pool.run(train, 4, name, stage, num_micro))


@pytest.mark.parametrize(("name", "stage"), [("gpt2", 3), deep("llama", 3), deep("llama", 1)])
def test_two_ranks(pair: Pool, name: str, stage: int) -> None:
    assert_close(pair.run(train, 2, name, stage))


def lie(mesh: DeviceMesh) -> list[str]:
    """The shapes of some parameters, whole and here. What the model holds of them is what it was built with."""
    plain, ours = zoo.builder("gpt2")(), compiled("gpt2")
    found = []
    for name in ("wte.weight", "h.0.attn.c_attn.weight", "h.0.attn.c_proj.weight", "h.0.mlp.c_fc.bias"):
        parameter = ours.get_parameter(f"transformer.{name}")
        assert torch.equal(full(parameter.detach()), plain.get_parameter(f"transformer.{name}"))
        found.append(f"{tuple(parameter.shape)} {tuple(parameter.to_local().shape)}")
    with zgraph.gathered(ours):
        assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), ours.parameters(), strict=True))
    return found


def test_parameters_are_dtensors_with_their_placements(pool: Pool) -> None:
    assert pool.run(lie, 4)[0] == ["(61, 32) (31, 32)", "(32, 96) (16, 48)", "(32, 32) (8, 32)", "(128,) (32,)"]


def reshard(mesh: DeviceMesh, path: str) -> list[float]:
    """How far parameters are off that were saved at one layout and loaded at another, and back."""
    ours = compiled("gpt2")
    state = ours.state_dict()
    dcp.save(state, checkpoint_id=f"{path}/first")
    plain = zoo.builder("gpt2")()
    for parameter in plain.parameters():
        nn.init.zeros_(parameter)
    others = [
        zgraph.compile(plain, stage=3),
        zgraph.compile(zoo.builder("gpt2")(), tensor_parallel=4, placements={"*.c_fc.*": "S0", "*.wpe.weight": "S1"}),
        compiled("gpt2", stage=2),
    ]
    found = []
    for number, other in enumerate(others):
        for parameter in other.parameters():
            with torch.no_grad():
                parameter.zero_()
        held = other.state_dict()
        dcp.load(held, checkpoint_id=f"{path}/first" if number == 0 else f"{path}/{number - 1}")
        other.load_state_dict(held)
        dcp.save(other.state_dict(), checkpoint_id=f"{path}/{number}")
        pairs = zip(ours.parameters(), other.parameters(), strict=True)
        found.append(max(float((full(a) - full(b)).detach().abs().max()) for a, b in pairs))
    return found


def test_a_checkpoint_is_loaded_at_another_layout_and_back(pool: Pool, tmp_path: Any) -> None:
    assert pool.run(reshard, 4, str(tmp_path)) == [[0.0, 0.0, 0.0]] * 4


def other_batch(mesh: DeviceMesh, what: str) -> str:
    rank = mesh.get_local_rank()
    ours = compiled("llama")
    if what == "random numbers":
        torch.manual_seed(rank)
    try:
        ours(**zoo.batch("llama", rank if what == "inputs" else 0))
    except (BatchMismatchError, PeerError) as error:
        return str(error)
    return ""


@pytest.mark.parametrize("what", ["inputs", "random numbers"])
def test_ranks_that_compute_together_are_given_the_same(pair: Pool, what: str) -> None:
    for found in pair.run(other_batch, 2, what):
        assert (
            f"the ranks [0, 1] compute together along tensor, but {'were given' if what == 'inputs' else 'draw'} other"
            in found
        )
        assert ("num_replicas=1" if what == "inputs" else "torch.manual_seed(seed +") in found


def beside(mesh: DeviceMesh, path: str) -> bool:
    """Train a model that is cut with zgraph's optimizers: one steps as torch's, one refuses to. A run file is saved."""
    plain, ours = zoo.builder("llama")(), compiled("llama", stage=2, save=path)
    pairs = [(plain, torch.optim.AdamW(plain.parameters())), (ours, zgraph.optim.AdamW(ours.parameters()))]
    for step in range(3):
        losses = []
        for model, optimizer in pairs:
            losses.append(model(**zoo.batch("llama", step)).loss)
            losses[-1].backward()
            optimizer.step()
            optimizer.zero_grad()
        assert abs(losses[1].item() / losses[0].item() - 1) < 2e-6
    with torch.no_grad():
        losses = [model(**zoo.batch("llama", 7)).loss.item() for model in (plain, ours)]
    assert abs(losses[1] / losses[0] - 1) < 2e-6
    muon = zgraph.optim.Muon(ours.named_parameters())
    ours(**zoo.batch("llama", 9)).loss.backward()
    with pytest.raises(UsageError, match="Muon does not go with tensor parallelism"):
        muon.step()
    return ours.state_dict().keys() == plain.state_dict().keys()


def test_what_goes_beside_it(pair: Pool, tmp_path: Any) -> None:
    path = tmp_path / "run.zg"
    assert all(pair.run(beside, 2, str(path)))
    run = load_run(path)
    assert "place" in run.recipe
    certify([(name, graph) for name, graph, _ in run.steps], run.context)
    with pytest.raises(CheckError, match="along the axis tensor"):
        check_run(run)


WRONG: dict[str, tuple[dict[str, Any], type[ZgraphError], str]] = {
    "three ranks": ({"tensor_parallel": 3}, UsageError, "there are 4 ranks; start a multiple of 3"),
    "no number": ({"tensor_parallel": True}, UsageError, "must be a number of ranks, 1 or more"),
    "no plan": ({"tensor_parallel": 2}, UsageError, "there is no plan for tensor parallelism of Tied"),
    "no name": (
        {"tensor_parallel": 2, "placements": {"*.wieght": Shard(0)}},
        UsageError,
        "no parameter of Tied is called *.wieght",
    ),
    "no placement": ({"tensor_parallel": 2, "placements": {"*": "T0"}}, UsageError, 'a text such as "S1"'),
    "does not divide": (
        {"tensor_parallel": 2, "placements": {"mix.weight": Shard(2)}},
        PlacementError,
        "does not divide into S2 over 2 ranks",
    ),
    "placements alone": ({"placements": {"*": Replicate()}}, UsageError, "give tensor_parallel= too"),
    "pieces": (
        {"tensor_parallel": 2, "placements": {"*": Replicate()}, "fullgraph": False},
        UsageError,
        "fullgraph must be True",
    ),
    "symbols": (
        {"tensor_parallel": 2, "placements": {"*": Replicate()}, "dynamic": True},
        UsageError,
        "leave dynamic= out",
    ),
    "host": (
        {"tensor_parallel": 2, "placements": {"*": Replicate()}, "offload": "optimizer"},
        UsageError,
        'offload must be "auto"',
    ),
}


def refused(mesh: DeviceMesh) -> dict[str, str]:
    from .nets import Tied

    found = {}
    for name, (options, kind, _) in WRONG.items():
        try:
            zgraph.compile(built(Tied)(), **options)
        except kind as error:
            found[name] = str(error)
    grid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("shard", "tensor"))
    try:
        zgraph.compile(zoo.builder("llama")(), mesh=grid, tensor_parallel=4)
    except UsageError as error:
        found["grid"] = str(error)
    model = zgraph.compile(zoo.builder("llama")(), mesh=grid)
    found["mesh"] = str(next(iter(model.parameters())).device_mesh.mesh.tolist())
    return found


def test_what_is_wrong_is_said_before_anything_is_cut(pool: Pool) -> None:
    for found in pool.run(refused, 4):
        for name, (_, _, words) in WRONG.items():
            assert words in found[name]
        assert "the mesh has 2 ranks along tensor" in found["grid"]
        assert found["mesh"] == "[[0, 2], [1, 3]]"
