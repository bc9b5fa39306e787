"""Checkpoints on one rank: what comes back, what is written meanwhile, and what is not read."""

from __future__ import annotations

import json
import os
import pickle
import random
import shutil
import subprocess
import sys
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import zgraph
from zgraph.engine.checkpoint.export import export_hf
from zgraph.engine.checkpoint.rng_state import start_anew
from zgraph.engine.engine import Engine
from zgraph.errors import CheckpointError, UsageError


def engine_of(**more: Any) -> Engine:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.3), nn.BatchNorm1d(8), nn.Linear(8, 3))
    data = [torch.randn(6) for _ in range(8)]
    config = {"train_batch_size": 4, "optimizer": {"type": "AdamW"}, **more}
    return zgraph.initialize_engine(model=net, config=config, training_data=data)[0]  # type: ignore[arg-type]


def step(engine: Engine, x: torch.Tensor) -> float:
    loss = engine(x).square().mean()
    engine.backward(loss)
    engine.step()
    return loss.item()


@pytest.mark.parametrize(("asynchronous", "optimizer"), [(False, "AdamW"), (True, "AdamW"), (False, "Adagrad")])
def test_everything_goes_on_where_it_was(tmp_path: Path, asynchronous: bool, optimizer: str) -> None:
    more = {"checkpoint": {"asynchronous": asynchronous}, "optimizer": {"type": optimizer}}
    engine = engine_of(**more)
    assert engine.training_dataloader is not None
    batches = iter(engine.training_dataloader)
    step(engine, next(batches))
    assert engine.save_checkpoint(tmp_path, client_state={"epoch": 3})
    drawn = random.random(), np.random.rand(), torch.rand(()).item()
    expected = [step(engine, x) for x in batches]
    engine.wait_for_checkpoint()
    resumed = engine_of(**more)
    assert resumed.load_checkpoint(tmp_path) == (str(tmp_path / "global_step1"), {"epoch": 3})
    assert resumed.training_dataloader is not None
    assert drawn == (random.random(), np.random.rand(), torch.rand(()).item())
    assert [step(resumed, x) for x in resumed.training_dataloader] == expected


def test_a_buffer_without_elements_comes_back(tmp_path: Path) -> None:
    def made() -> Engine:
        net = nn.Linear(3, 2)
        net.register_buffer("cache", torch.empty(0))
        return zgraph.initialize_engine(model=net, config={"train_batch_size": 1})[0]  # type: ignore[arg-type]

    engine, resumed = made(), made()
    engine.save_checkpoint(tmp_path)
    resumed.load_checkpoint(tmp_path)
    assert torch.equal(resumed.module.weight, engine.module.weight)
    assert resumed.module.cache.shape == (0,)


def test_an_error_of_writing_meanwhile_is_raised_by_the_next_call(tmp_path: Path) -> None:
    engine = engine_of()
    engine.save_checkpoint(tmp_path / "run")
    engine.wait_for_checkpoint()
    (tmp_path / "run" / "latest").unlink()
    (tmp_path / "run" / "latest").mkdir()
    engine.save_checkpoint(tmp_path / "run", "other")
    with pytest.raises(CheckpointError, match="not saved"):
        engine.wait_for_checkpoint()
    engine.wait_for_checkpoint()


def test_a_script_ends_when_its_files_are_written(tmp_path: Path) -> None:
    script = """
import sys, zgraph
from torch import nn
from zgraph.engine.checkpoint import background
begun = background.write_parts
def late(*args):
    import time
    time.sleep(1)
    return begun(*args)
background.write_parts = late
engine, *_ = zgraph.initialize_engine(model=nn.Linear(6, 5), config={"train_batch_size": 1})
engine.save_checkpoint(sys.argv[1])
"""
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=True, timeout=100)
    resumed, *_ = zgraph.initialize_engine(model=nn.Linear(6, 5), config={"train_batch_size": 1})  # type: ignore[arg-type]
    assert resumed.load_checkpoint(tmp_path)[0] == str(tmp_path / "global_step0")


def test_what_killed_writes_have_left_is_not_loaded_and_goes_away(tmp_path: Path) -> None:
    engine = engine_of()
    assert engine.load_checkpoint(tmp_path) == (None, None)
    engine.save_checkpoint(tmp_path)
    engine.wait_for_checkpoint()
    (tmp_path / ".global_step8.writing-abcd").mkdir()
    (tmp_path / "global_step0").rename(tmp_path / ".global_step0.replaced")  # killed between two renames
    assert engine.load_checkpoint(tmp_path)[1] == {}
    assert engine.load_checkpoint(tmp_path, tag="no such") == (None, None)
    engine.save_checkpoint(tmp_path, "next")
    engine.save_checkpoint(tmp_path, "next")
    engine.wait_for_checkpoint()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["global_step0", "latest", "next"]


@pytest.mark.parametrize(
    ("client_state", "tag", "said"),
    [
        ({"a": {"b": torch.ones(2)}}, None, r"client_state\.a\.b is a Tensor"),
        ({}, "../x", "a tag is"),
        ({}, "latest", "a tag is"),
    ],
)
def test_what_a_checkpoint_cannot_have(tmp_path: Path, client_state: Any, tag: str | None, said: str) -> None:
    with pytest.raises(CheckpointError, match=said):
        engine_of().save_checkpoint(tmp_path, tag, client_state)
    assert not list(tmp_path.iterdir())


def test_a_state_dict_that_leaves_out_what_is_trained(tmp_path: Path) -> None:
    engine = engine_of()
    whole = engine.module.state_dict
    engine.module.state_dict = lambda **options: {"0.bias": whole(**options)["0.bias"]}  # type: ignore[method-assign]
    with pytest.raises(CheckpointError, match=r"leaves out 0\.weight, 2\.weight"):
        engine.save_checkpoint(tmp_path)


def test_a_step_under_way_goes_on_as_it_was_begun(tmp_path: Path) -> None:
    engine = engine_of(train_batch_size=8, gradient_accumulation_steps=2)
    x = torch.randn(4, 6)
    step(engine, x)
    engine.save_checkpoint(tmp_path)
    expected = [step(engine, x) for _ in range(5)]
    resumed = engine_of(train_batch_size=8, gradient_accumulation_steps=2)
    step(resumed, -x)  # whose gradients are forgotten
    resumed.load_checkpoint(tmp_path)
    assert [step(resumed, x) for _ in range(5)] == expected
    other = engine_of(train_batch_size=16, gradient_accumulation_steps=4)
    with pytest.raises(CheckpointError, match="within a step of 2 micro-batches"):
        other.load_checkpoint(tmp_path)
    other.load_checkpoint(tmp_path, load_optimizer_states=False)
    assert (other.micro_steps, other.pending) == (0, 0)


def test_frozen_parameters_may_be_left_out(tmp_path: Path) -> None:
    engine = engine_of()
    weight = engine.module.get_parameter("3.weight").requires_grad_(False)
    engine.save_checkpoint(tmp_path, exclude_frozen_parameters=True)
    with torch.no_grad():
        for parameter in engine.module.parameters():
            parameter.zero_()
    with pytest.raises(CheckpointError, match=r"3\.weight is missing"):
        engine.load_checkpoint(tmp_path)
    engine.load_checkpoint(tmp_path, load_module_strict=False)
    assert not weight.any()
    assert engine.module.get_parameter("3.bias").any()


def test_what_no_checkpoint_has_of_a_step_under_way(tmp_path: Path) -> None:
    engine = engine_of(gradient_accumulation_steps=2)
    with pytest.raises(UsageError, match="save_dir="):
        engine.save_checkpoint("")
    with zgraph.gathered(engine.module), pytest.raises(UsageError, match=r"within zgraph\.gathered"):
        engine.save_checkpoint(tmp_path)
    with zgraph.gathered(engine.module), pytest.raises(UsageError, match=r"within zgraph\.gathered"):
        engine.load_checkpoint(tmp_path)
    engine.backward(engine(torch.randn(2, 6)).mean())
    with pytest.raises(UsageError, match="between backward and step"):
        engine.save_checkpoint(tmp_path)


@pytest.mark.parametrize("fullgraph", [True, False, "eager"])
def test_a_step_under_way_goes_on(tmp_path: Path, fullgraph: bool | str) -> None:
    batches = [torch.randn(2, 6) for _ in range(2)]

    def micro_step(engine: Any, number: int) -> None:
        engine.backward(engine(batches[number]).mean())
        engine.step()

    engine, other = (engine_of(gradient_accumulation_steps=2, zgraph={"fullgraph": fullgraph}) for _ in range(2))
    micro_step(engine, 0)
    engine.save_checkpoint(tmp_path)
    micro_step(engine, 1)
    other.load_checkpoint(tmp_path)
    micro_step(other, 1)
    for ours, theirs in zip(engine.module.parameters(), other.module.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_rank_that_was_not_there_draws_numbers_of_its_own() -> None:
    def drawn(rank: int) -> tuple[float, float, float]:
        start_anew(seed=1, step=2, rank=rank)
        return random.random(), np.random.rand(), torch.rand(()).item()

    assert drawn(4) == drawn(4)
    assert len({number for rank in range(3) for number in drawn(rank)}) == 9


# --- damage and malice -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Engine, Path]:
    """An engine after a step, and the folder in which it has a checkpoint of it."""
    folder, engine = tmp_path_factory.mktemp("saved"), engine_of()
    step(engine, torch.randn(4, 6))
    engine.save_checkpoint(folder)
    engine.wait_for_checkpoint()
    return engine, folder


class Evil:
    """A pickle that makes a file when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


def replaced(change: Callable[[Any], None]) -> Callable[[Path], None]:
    def replace(path: Path) -> None:
        found = json.loads(path.read_text())
        change(found)
        path.write_text(json.dumps(found))

    return replace


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        ("rank_0_0.safetensors", truncated),
        ("rank_0_0.safetensors", Path.unlink),
        ("rank_0_0.safetensors", lambda path: path.write_bytes(b"\xff" * 64)),
        ("index.json", truncated),
        ("index.json", replaced(lambda found: found["tensors"]["model.0.weight"].update(shape=[6, 6]))),
        ("index.json", replaced(lambda found: found["tensors"]["model.0.weight"].update(layout=9))),
        ("index.json", replaced(lambda found: found["layouts"][0].update(mesh=[2]))),
        ("index.json", replaced(lambda found: found["tensors"].pop("model.0.weight"))),
        ("index.json", replaced(lambda found: found["tensors"].pop("optimizer.exp_avg.0.weight"))),
        ("rank_0_files.json", Path.unlink),
        (
            "rank_0_files.json",
            replaced(lambda found: found["files"].update({"../x.json": found["files"]["state.json"]})),
        ),
        ("rank_0_files.json", replaced(lambda found: found["files"].pop("rank_0_0.safetensors"))),
        ("state.json", replaced(lambda found: found.update(loss_scale="x"))),
        ("state.json", replaced(lambda found: found.update(dataloader={}))),
        ("rank_0.json", replaced(lambda found: found.update(torch="AAAA"))),
        ("../latest", lambda path: path.write_text("../..")),
    ],
)
def test_what_is_damaged_is_a_checkpoint_error(
    saved: tuple[Engine, Path], tmp_path: Path, file: str, damage: Callable[[Path], None]
) -> None:
    engine, folder = saved
    shutil.copytree(folder, tmp_path / "run")
    assert engine.load_checkpoint(tmp_path / "run")[1] == {}
    damage(tmp_path / "run" / "global_step1" / file)
    with pytest.raises(CheckpointError):
        engine.load_checkpoint(tmp_path / "run")


def test_no_code_of_a_hostile_checkpoint_runs(tmp_path: Path) -> None:
    engine = engine_of()
    engine.save_checkpoint(tmp_path / "run")
    engine.wait_for_checkpoint()
    folder, made = tmp_path / "run" / "global_step0", tmp_path / "made"
    (folder / ".metadata").write_bytes(pickle.dumps(Evil(made)))  # torch's own reader would unpickle it
    engine.load_checkpoint(tmp_path / "run")
    for path in (*folder.iterdir(), tmp_path / "run" / "latest"):
        kept = path.read_bytes()
        path.write_bytes(pickle.dumps(Evil(made)))
        if path.name != ".metadata":
            with pytest.raises(CheckpointError):
                engine.load_checkpoint(tmp_path / "run")
        path.write_bytes(kept)
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    torch.save({"module": {}, "evil": Evil(made)}, theirs / "mp_rank_00_model_states.pt")
    with pytest.raises(CheckpointError, match="mkdir"):
        engine.load_checkpoint(tmp_path, "theirs")
    assert not made.exists()


# --- other formats ---------------------------------------------------------------------------------------------------


def test_a_model_of_transformers_comes_out_as_one_folder(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_hidden_layers": 1}
    config = transformers.LlamaConfig(**sizes, num_key_value_heads=2, vocab_size=20, tie_word_embeddings=True)
    engine, *_ = zgraph.initialize_engine(
        model=transformers.LlamaForCausalLM(config),
        config={"train_batch_size": 1, "optimizer": {"type": "AdamW"}, "bf16": {"enabled": True}},
    )
    engine.save_checkpoint(tmp_path / "run")
    engine.export(tmp_path / "live")
    export_hf(tmp_path / "run" / "global_step0", tmp_path / "saved")
    assert engine.save_16bit_model(tmp_path)
    expected = {name: p.to(torch.bfloat16) for name, p in engine.module.named_parameters()}
    for folder in ("live", "saved"):
        model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / folder, dtype="auto")
        assert all(torch.equal(p, expected[name]) for name, p in model.named_parameters())
    found = load_file(tmp_path / "model.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())


FROZEN = "3.bias"


def deepspeed_files(
    folder: Path, net: nn.Sequential, moments: dict[str, torch.Tensor], stage: int, ranks: int, elastic: bool
) -> None:
    """Files laid out as DeepSpeed's: a vector for all parameters cut into ranks, or each parameter cut.

    Those of the frozen parameter are kept beside, or at stage 1 with the model only.
    """
    folder.mkdir()
    trained = {n: p.detach() for n, p in net.named_parameters() if n != FROZEN}
    values = {"master": trained, "exp_avg": {n: moments[n] for n in trained}}
    frozen = net.get_parameter(FROZEN).detach()
    fragments = _padded(frozen, ranks).chunk(ranks) if stage == 3 else [frozen] * ranks

    def cut(found: dict[str, torch.Tensor]) -> list[torch.Tensor]:
        if stage == 3:
            pieces = [_padded(t.flatten(), ranks).chunk(ranks) for t in found.values()]
            return [torch.cat([piece[rank] for piece in pieces]) for rank in range(ranks)]
        return list(_padded(torch.cat([t.flatten() for t in found.values()]), ranks).chunk(ranks))

    model = {
        "module": OrderedDict(net.state_dict()),
        "buffer_names": [n for n, _ in net.named_buffers()],
        "param_shapes": [OrderedDict((n, p.shape) for n, p in trained.items())],
        "frozen_param_shapes": {FROZEN: frozen.shape} if stage > 1 else None,
        "shared_params": {},
        "lr_scheduler": None,
        "global_steps": 5,
        "skipped_steps": 1,
        "dp_world_size": ranks,
        "mp_world_size": 1,
        "mine": "kept",
    }
    masters, firsts = cut(values["master"]), cut(values["exp_avg"])
    for rank in range(ranks):
        base = {
            "state": {0: {"step": torch.tensor(4.0), "exp_avg": firsts[rank], "exp_avg_sq": firsts[rank] ** 2}},
            "param_groups": [{"lr": 0.25, "betas": (0.5, 0.75), "params": [0]}],
        }
        own: dict[str, Any] = {"optimizer_state_dict": base, "fp32_flat_groups": [masters[rank]]}
        if stage < 3:
            state = [base["state"][0]] if elastic else base
            own = {"base_optimizer_state": state, "single_partition_of_fp32_groups": [masters[rank]]}
        torch.save({"optimizer_state_dict": own}, folder / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
        prefix = f"zero_pp_rank_{rank}_" if stage == 3 else ""
        model["frozen_param_fragments"] = {FROZEN: fragments[rank]} if stage > 1 else None
        torch.save(model, folder / f"{prefix}mp_rank_00_model_states.pt")


def _padded(vector: torch.Tensor, count: int) -> torch.Tensor:
    return torch.cat([vector, torch.zeros(-vector.numel() % count)])


@pytest.mark.parametrize(("stage", "elastic"), [(1, False), (1, True), (2, False), (3, False)])
def test_checkpoints_of_deepspeed_load(tmp_path: Path, stage: int, elastic: bool) -> None:
    torch.manual_seed(5)
    net = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.3), nn.BatchNorm1d(8), nn.Linear(8, 3))
    moments = {name: torch.randn(p.shape) for name, p in net.named_parameters()}
    deepspeed_files(tmp_path / "global_step5", net, moments, stage, ranks=3, elastic=elastic)
    (tmp_path / "latest").write_text("global_step5")
    engine = engine_of()
    assert engine.load_checkpoint(tmp_path) == (str(tmp_path / "global_step5"), {"mine": "kept"})
    assert engine.optimizer is not None
    assert (engine.global_steps, engine.skipped_steps) == (5, 1)
    if not elastic:  # which has no options of groups
        assert (engine.get_lr(), engine.optimizer.param_groups[0]["betas"]) == ([0.25], (0.5, 0.75))
    for name, parameter in engine.module.named_parameters():
        assert torch.equal(parameter, net.get_parameter(name))
        if name == FROZEN:
            continue
        state = engine.optimizer.state[parameter]
        assert torch.equal(state["exp_avg"], moments[name])
        assert torch.equal(state["exp_avg_sq"], moments[name] ** 2)
        assert state["step"] == 4


def as_stage_0(folder: Path) -> None:
    for path in folder.glob("*optim_states.pt"):
        path.unlink()
    path = folder / "mp_rank_00_model_states.pt"
    torch.save({**torch.load(path), "optimizer": {"state": {}}}, path)


@pytest.mark.parametrize(
    ("stage", "change", "said"),
    [
        (1, lambda folder: (folder / "zero_pp_rank_1_mp_rank_00_optim_states.pt").unlink(), "copy all of them"),
        (3, lambda folder: (folder / "zero_pp_rank_0_mp_rank_00_model_states.pt").unlink(), "copy all of them"),
        (2, lambda folder: (folder / "zero").mkdir(), "universal checkpoint"),
        (2, as_stage_0, "at stage 0"),
    ],
)
def test_checkpoints_of_deepspeed_that_do_not_load(
    tmp_path: Path, stage: int, change: Callable[[Path], None], said: str
) -> None:
    engine = engine_of()
    net = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.3), nn.BatchNorm1d(8), nn.Linear(8, 3))
    moments = {name: torch.zeros(p.shape) for name, p in net.named_parameters()}
    deepspeed_files(tmp_path / "tag", net, moments, stage, ranks=3, elastic=False)
    change(tmp_path / "tag")
    with pytest.raises(CheckpointError, match=said):
        engine.load_checkpoint(tmp_path, "tag")
