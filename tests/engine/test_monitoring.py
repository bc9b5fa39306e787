"""What an engine tells on one rank: lines, files, FLOP by module; and packages that are missing."""

import csv
import logging
import re
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import zgraph
from zgraph.cost.hardware import hardware, save
from zgraph.engine.config import read as configuration
from zgraph.engine.config.keys import EngineConfig, FlopsProfiler
from zgraph.engine.config.read import read_config
from zgraph.engine.monitor.flops import flop_by_module, flop_tables, useful_flop
from zgraph.engine.monitor.monitor import say
from zgraph.engine.monitor.writers import Event, is_installed, writers
from zgraph.errors import ConfigError
from zgraph.viz import as_text

WORDS, WIDTH, INNER, ROWS, LENGTH, ACCUMULATION, STEPS = 19, 8, 12, 3, 5, 2, 4
PEAK = 1e6


class Words(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(WORDS, WIDTH)
        self.layers = nn.Sequential(nn.Linear(WIDTH, INNER), nn.Tanh())
        self.head = nn.Linear(INNER, WORDS)

    def forward(self, ids):
        return F.cross_entropy(self.head(self.layers(self.embed(ids))).flatten(0, 1), ids.flatten())


def number(name, line):
    return float(re.search(rf"{name} ([\d.,e+-]+\d)", line)[1].replace(",", ""))


def test_lines_and_files_have_the_numbers_of_the_steps(tmp_path, caplog):
    caplog.set_level(logging.INFO, "zgraph")
    device = hardware("cpu").device.model_copy(update={"peak_flops": {"f32": PEAK}})
    save(hardware("cpu").model_copy(update={"device": device}), tmp_path / "slow.toml")
    torch.manual_seed(0)
    engine, *_ = zgraph.initialize_engine(
        model=Words(),
        config={
            "train_micro_batch_size_per_gpu": ROWS,
            "gradient_accumulation_steps": ACCUMULATION,
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-2}},
            "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 4, "warmup_max_lr": 1e-2}},
            "steps_per_print": 2,
            "wall_clock_breakdown": True,
            "flops_profiler": {"enabled": True, "profile_step": 2, "output_file": str(tmp_path / "flops.txt")},
            "csv_monitor": {"enabled": True, "output_path": str(tmp_path), "job_name": "job"},
            "zgraph": {"hardware": str(tmp_path / "slow.toml"), "recompute": True},
        },
    )
    losses, norms, rates = [], [], []
    for step in range(STEPS):
        if step == 2:
            began = time.perf_counter()
        micro = []
        for _ in range(ACCUMULATION):
            loss = engine(torch.randint(WORDS, (ROWS, LENGTH)))
            engine.backward(loss)
            engine.step()
            micro.append(loss.item())
        losses.append(sum(micro) / len(micro))
        norms.append(engine.get_global_grad_norm())
        rates.append(engine.get_lr()[0])
    seconds = time.perf_counter() - began

    lines = [r.message for r in caplog.records if r.message.startswith("step ")]
    assert [line.split(":")[0] for line in lines] == ["step 2", "step 4"]
    for at, line in zip((1, 3), lines, strict=True):
        assert number("loss", line) == pytest.approx(losses[at], abs=1e-4)
        assert number("grad norm", line) == pytest.approx(norms[at], abs=1e-4)
        assert number("lr", line) == pytest.approx(rates[at], rel=1e-3)
        assert "loss scale" not in line
        assert "exposed" not in line
    entry = zgraph.report(engine.module).entries[0]
    of_two_steps = 2 * ACCUMULATION * ROWS * LENGTH
    assert of_two_steps / seconds <= float(re.search(r"([\d,]+) tokens/s", lines[1])[1].replace(",", "")) + 1
    assert 2 * ACCUMULATION * useful_flop(entry) / seconds / PEAK <= number("MFU", lines[1]) / 100 + 1e-3
    assert 0 < 2 * sum(number(what, lines[1]) for what in ("forward", "backward", ", step")) <= 1e3 * seconds
    assert (tmp_path / "flops.txt").read_text() == as_text(flop_tables(entry, "Words", FlopsProfiler()), width=110)

    for name, values in (("train_loss", losses), ("lr", rates)):
        head, *rows = csv.reader((tmp_path / "job" / f"Train_Samples_{name}.csv").open())
        assert head == ["step", name]
        assert [int(row[0]) for row in rows] == [ROWS * ACCUMULATION * (step + 1) for step in range(STEPS)]
        assert [float(row[1]) for row in rows] == pytest.approx(values)

    counted = {m.path: (m.forward, m.backward, m.again) for m in flop_by_module(entry)}
    first, last = 2 * ROWS * LENGTH * WIDTH * INNER, 2 * ROWS * LENGTH * INNER * WORDS
    whole = (first + last, 2 * (first + last), first + last)  # each is computed again
    layer = (first, 2 * first, first)
    assert counted == {"": whole, "layers": layer, "layers.0": layer, "head": (last, 2 * last, last)}
    assert list(counted) == ["", "layers", "layers.0", "head"]
    shown = as_text(flop_tables(entry, "Words", FlopsProfiler(module_depth=1, detailed=False)), width=110)
    assert [word for word in ("Words", "layers", "layers.0", "head") if f" {word} " in shown] == ["Words", "head"]


def test_where_no_log_takes_it_a_line_goes_to_standard_error(capsys):
    say("a line")
    assert capsys.readouterr().err == "a line\n"


def test_writers_call_their_packages(tmp_path, monkeypatch):
    said = []
    summary = SimpleNamespace(add_scalar=lambda *event: said.append(event), flush=lambda: said.append("flush"))
    board = SimpleNamespace(SummaryWriter=lambda log_dir: said.append(log_dir) or summary)
    run = SimpleNamespace(log=lambda values, step: said.append((values, step)))
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", board)
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda **keys: said.append(keys) or run))
    keys = EngineConfig.model_validate(
        {
            "tensorboard": {"enabled": True, "output_path": str(tmp_path), "job_name": "job"},
            "wandb": {"enabled": True, "team": "ours"},
        }
    )
    for writer in writers(keys):
        writer.write([Event("Train/Samples/lr", 0.5, 8)])
    assert said == [
        f"{tmp_path}/job",
        {"project": "deepspeed", "group": None, "entity": "ours"},
        ("Train/Samples/lr", 0.5, 8),
        "flush",
        ({"Train/Samples/lr": 0.5}, 8),
    ]


def test_a_package_that_is_missing_is_named_with_the_remedy(tmp_path, monkeypatch):
    (tmp_path / "left_behind").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    assert not is_installed("left_behind")
    assert not is_installed("there_is_none")
    assert is_installed("torch")
    monkeypatch.setattr(configuration, "is_installed", lambda package: False)
    asked = {"train_batch_size": 1, "tensorboard": {"enabled": True}, "wandb": {"enabled": True}}
    with pytest.raises(ConfigError) as caught:
        read_config(asked, world_size=1)
    assert [p.rpartition("; ")[2] for p in caught.value.problems] == ["pip install tensorboard", "pip install wandb"]
