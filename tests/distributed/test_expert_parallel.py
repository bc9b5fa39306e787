"""Expert parallelism on real ranks: the numbers of plain training, with tokens sent to the ranks of their experts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import transformers as hf
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

import zgraph
from tests.deep import DEEP, deep
from zgraph.compiler.compiled_model import compiled_model
from zgraph.errors import BatchMismatchError, PeerError, PlacementError, UsageError

from . import tensor_zoo as zoo
from .nets import built
from .pool import Pool

NUM_STEPS = 20 if DEEP else 2


def mixtral() -> nn.Module:
    return hf.MixtralForCausalLM(hf.MixtralConfig(**zoo.EXPERTS, num_local_experts=4))


def lopsided() -> nn.Module:
    """A model all of whose tokens go to the experts of the first rank: the others have none."""
    model = mixtral()
    for name, parameter in model.named_parameters():
        if name.endswith("gate.weight"):
            parameter.data.zero_()
            parameter.requires_grad_(False)
    return model


MODELS: dict[str, Callable[[], nn.Module]] = {
    "mixtral": mixtral,
    "lopsided": lopsided,
    "qwen3_moe": zoo.MODELS["qwen3_moe"],
}


def full(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def own_rows(model: nn.Module, seed: int) -> dict[str, torch.Tensor]:
    """This rank's part of the batch of two ranks that share experts."""
    number = compiled_model(model).session.store.ranks.rank_along("expert")
    return {key: tensor.chunk(2)[number] for key, tensor in zoo.batch("mixtral", seed).items()}


def train(
    mesh: DeviceMesh, name: str, stage: int, num_micro: int, tensor: int = 1, context: int = 1
) -> tuple[float, float, float]:
    """The largest relative errors of a loss and of a gradient's norm, and the largest of a parameter in the end."""
    plain, ours = (built(MODELS[name])() for _ in range(2))
    ours = zgraph.compile(ours, stage=stage, expert_parallel=2, tensor_parallel=tensor, context_parallel=context)
    together = 2 * tensor * context
    num_data, mine = mesh.size() // together, mesh.get_local_rank() // together
    optimizers = [torch.optim.AdamW(model.parameters(), lr=1e-3) for model in (plain, ours)]
    worst_loss = worst_norm = 0.0
    for step in range(NUM_STEPS):
        for micro in range(num_micro):
            seeds = [100 * step + 10 * micro + rank for rank in range(num_data)]
            losses = [plain(**zoo.batch("mixtral", seed)).loss for seed in seeds]
            (sum(losses) / num_data).backward()
            torch.manual_seed(seeds[mine])
            if micro < num_micro - 1:
                with zgraph.no_sync(ours):
                    loss = ours(**own_rows(ours, seeds[mine])).loss
                    loss.backward()
            else:
                loss = ours(**own_rows(ours, seeds[mine])).loss
                loss.backward()
            worst_loss = max(worst_loss, abs(loss.item() / losses[mine].item() - 1))
        norms = [full(nn.utils.clip_grad_norm_(model.parameters(), 0.5)).item() for model in (plain, ours)]
        worst_norm = max(worst_norm, abs(norms[1] / norms[0] - 1))
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    pairs = zip(plain.parameters(), ours.parameters(), strict=True)
    return worst_loss, worst_norm, max(float((full(b) - a).detach().abs().max()) for a, b in pairs)


def assert_close(found: list[tuple[float, float, float]]) -> None:
    for loss, norm, parameter in found:
        assert loss < 2e-6
        assert norm < 2e-6
        assert parameter < 1e-4  # where a gradient is nearly zero, AdamW makes much of its last bits


@pytest.mark.parametrize(
    ("name", "stage", "num_micro"),
    [("qwen3_moe", 3, 1), *(deep(name, stage, 2) for name in MODELS for stage in (0, 1, 2, 3))],
)
def test_two_ranks(pair: Pool, name: str, stage: int, num_micro: int) -> None:
    assert_close(pair.run(train, 2, name, stage, num_micro, limit_s=600 if DEEP else 90))


@pytest.mark.parametrize(
    ("name", "stage", "num_micro", "tensor", "context"),
    [
        deep("mixtral", 3, 1, 2, 1),
        deep("mixtral", 3, 1, 1, 1),
        deep("qwen3_moe", 1, 2, 1, 1),
        deep("mixtral", 0, 2, 1, 1),
        deep("lopsided", 2, 1, 1, 1),
        deep("qwen3_moe", 2, 2, 2, 1),
        deep("lopsided", 3, 1, 2, 1),
        deep("mixtral", 3, 1, 1, 2),
        deep("qwen3_moe", 2, 2, 1, 2),
        deep("lopsided", 1, 2, 1, 2),
        deep("mixtral", 0, 1, 1, 2),
    ],
)
def test_two_by_two_ranks(pool: Pool, name: str, stage: int, num_micro: int, tensor: int, context: int) -> None:
    assert_close(pool.run(train, 4, name, stage, num_micro, tensor, context, limit_s=600 if DEEP else 90))


def own_losses(mesh: DeviceMesh) -> tuple[list[int], float, float]:
    """Where the loss is made of what a rank is returned: the shape of that, and errors of losses and of gradients."""
    plain, ours = built(mixtral)(), zgraph.compile(built(mixtral)(), expert_parallel=2)
    rank, number = mesh.get_local_rank(), mesh.size()
    ids = [zoo.batch("mixtral", seed)["input_ids"] for seed in range(number)]
    losses = [nn.functional.cross_entropy(plain(one).logits.flatten(0, 1), one.flatten()) for one in ids]
    (sum(losses) / number).backward()
    logits = ours(ids[rank]).logits
    loss = nn.functional.cross_entropy(logits.flatten(0, 1), ids[rank].flatten())
    loss.backward()
    pairs = zip(plain.parameters(), ours.parameters(), strict=True)
    off = max(float((full(b.grad) - a.grad).abs().max() / a.grad.abs().max().clamp_min(1e-3)) for a, b in pairs)
    return list(logits.shape), abs(loss.item() / losses[rank].item() - 1), off


def test_a_rank_is_returned_its_own_rows_and_may_make_its_own_loss(pair: Pool) -> None:
    for shape, loss, gradient in pair.run(own_losses, 2):
        assert shape == [2, 12, zoo.WORDS]
        assert loss < 2e-6
        assert gradient < 1e-5


def reshard(mesh: DeviceMesh, path: str) -> list[float]:
    """How far parameters are off that were saved at one layout and loaded at another, and back."""
    layouts: list[dict[str, Any]] = [
        {"expert_parallel": 2},
        {},
        {"tensor_parallel": 2},
        {"expert_parallel": 4, "stage": 1},
    ]
    ours = zgraph.compile(built(mixtral)(), **layouts[0])
    dcp.save(ours.state_dict(), checkpoint_id=f"{path}/0")
    found = []
    for number, layout in enumerate([*layouts[1:], layouts[0]]):
        other = zgraph.compile(built(mixtral)(), **layout)
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.zero_()
        held = other.state_dict()
        dcp.load(held, checkpoint_id=f"{path}/{number}")
        other.load_state_dict(held)
        dcp.save(other.state_dict(), checkpoint_id=f"{path}/{number + 1}")
        pairs = zip(ours.parameters(), other.parameters(), strict=True)
        found.append(max(float((full(a) - full(b)).detach().abs().max()) for a, b in pairs))
    return found


@pytest.mark.parametrize("num_ranks", [deep(4)])
def test_a_checkpoint_is_loaded_at_another_layout_and_back(pool: Pool, num_ranks: int, tmp_path: Any) -> None:
    assert pool.run(reshard, num_ranks, str(tmp_path), limit_s=300) == [[0.0] * 4] * num_ranks


def engine(mesh: DeviceMesh) -> tuple[float, list[int]]:
    """How far an engine's losses are from plain training on the batches that its loader gives, and their rows."""
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": 2},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "weight_decay": 0.01}},
        "gradient_clipping": 0.5,
        "expert_parallel": {"enabled": True, "autoep_size": 2},
    }
    rows = (zoo.batch("mixtral", 0)["input_ids"].repeat(4, 1) + torch.arange(8).unsqueeze(1)) % zoo.WORDS
    ours, _, loader, _ = zgraph.initialize_engine(
        model=built(mixtral)(), config=config, training_data=list(rows), collate_fn=torch.stack
    )
    assert (ours.dp_world_size, ours.get_data_parallel_rank()) == (mesh.size(), mesh.get_rank())
    plain = built(mixtral)()
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-3, weight_decay=0.01)
    worst = 0.0
    for batch in loader:
        both = [torch.empty_like(batch) for _ in range(mesh.size())]
        dist.all_gather(both, batch)
        wanted = plain(input_ids=torch.cat(both), labels=torch.cat(both)).loss
        wanted.backward()
        nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
        loss = ours(input_ids=batch, labels=batch).loss
        ours.backward(loss)
        ours.step()
        worst = max(worst, abs(loss.item() / wanted.item() - 1))
    return worst, [len(loader), len(batch), ours.world_size, ours.train_batch_size()]


@pytest.mark.parametrize("num_ranks", [deep(2)])
def test_an_engine(pair: Pool, num_ranks: int) -> None:
    for off, numbers in pair.run(engine, num_ranks, limit_s=300):
        assert off < 2e-6
        assert numbers == [4, 1, 2, 2]


def refused(mesh: DeviceMesh) -> dict[str, str]:
    """What is said of options and models that cannot be."""
    found = {}
    wrong: dict[str, tuple[str, dict[str, Any]]] = {
        "experts": ("three", {"expert_parallel": 2}),
        "none": ("llama", {"expert_parallel": 2}),
        "ranks": ("mixtral", {"expert_parallel": 3}),
        "pieces": ("mixtral", {"expert_parallel": 2, "fullgraph": False}),
    }
    models = {**MODELS, "three": zoo.MODELS["mixtral"], "llama": zoo.MODELS["llama"]}
    for name, (model, options) in wrong.items():
        try:
            zgraph.compile(built(models[model])(), **options)
        except (UsageError, PlacementError) as error:
            found[name] = str(error)
    model = zgraph.compile(built(mixtral)(), expert_parallel=2)
    ids = zoo.batch("mixtral", 0)["input_ids"]
    try:
        model(input_ids=ids[:, : 12 - dist.get_rank()])
    except (BatchMismatchError, PeerError) as error:
        found["batch"] = str(error)
    try:
        with zgraph.join(model):
            pass
    except UsageError as error:
        found["join"] = str(error)
    return found


def test_what_is_wrong_is_said(pair: Pool) -> None:
    words = {
        "experts": "has 3 experts, which do not divide over 2 ranks; take an expert_parallel= that divides 3",
        "none": "LlamaForCausalLM has no experts that can be divided over ranks",
        "ranks": "expert_parallel=3, but there are 2 ranks; start a multiple of 3",
        "pieces": "fullgraph must be True",
        "batch": "share experts, but were given batches of other shapes",
        "join": "give them loaders of one length",
    }
    for found in pair.run(refused, 2):
        assert found.keys() == words.keys()
        assert all(words[name] in found[name] for name in words), found
