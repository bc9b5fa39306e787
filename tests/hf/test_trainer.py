"""What a Trainer's user does, on one rank: as transformers.Trainer does it."""

import json
import shutil

import numpy as np
import pytest
import torch
import transformers

import zgraph
from tests.hf.training import Rows, adapted, history, llama, same, trainer
from zgraph.errors import CheckpointError, UsageError
from zgraph.hf import Trainer

LOGGED = ("loss", "grad_norm", "learning_rate", "eval_loss", "eval_right")
BOTH = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2}


def right(found):
    """The share of tokens that are the likeliest."""
    kept = found.label_ids[:, 1:] != -100
    return {"right": float(np.mean((found.predictions.argmax(-1)[:, :-1] == found.label_ids[:, 1:])[kept]))}


class Steps(transformers.TrainerCallback):
    """What a callback is told."""

    def __init__(self):
        self.seen = []

    def on_pre_optimizer_step(self, args, state, control, model, optimizer, **_):
        self.seen.append((state.global_step, model.training, len(optimizer.param_groups)))


def test_a_training_with_all_its_trimmings(tmp_path):
    trained, callbacks = [], []
    for kind in (transformers.Trainer, Trainer):
        callbacks.append(Steps())
        made = trainer(
            kind,
            tmp_path / kind.__module__,
            {"compute_metrics": right, "callbacks": callbacks[-1:]},
            **BOTH,
            load_best_model_at_end=True,
            metric_for_best_model="right",
            learning_rate=0.03,
        )
        made.train()
        trained.append(made)
    plain, ours = trained
    assert zgraph.report(ours.model).recipe
    same(history(ours, *LOGGED), history(plain, *LOGGED))
    assert callbacks[1].seen == callbacks[0].seen
    assert ours.state.best_global_step == plain.state.best_global_step
    best = plain.model.state_dict()
    for name, weight in ours.model.state_dict().items():
        torch.testing.assert_close(weight, best[name], rtol=1e-4, atol=1e-5)
    found, expected = ours.predict(Rows(6)), plain.predict(Rows(6))
    np.testing.assert_allclose(found.predictions, expected.predictions, rtol=1e-3, atol=1e-5)
    assert found.metrics["test_right"] == expected.metrics["test_right"]

    for folder, save in ((tmp_path / "saved", ours.save_model), (tmp_path / "kept", ours.model.save_pretrained)):
        save(str(folder))
        loaded = transformers.AutoModelForCausalLM.from_pretrained(folder)
        assert all(torch.equal(loaded.state_dict()[n], w) for n, w in ours.model.state_dict().items())

    again = trainer(Trainer, tmp_path / Trainer.__module__, {"compute_metrics": right}, **BOTH, learning_rate=0.03)
    again.train(resume_from_checkpoint=str(tmp_path / Trainer.__module__ / "checkpoint-4"))
    assert history(again, *LOGGED) == history(ours, *LOGGED)


def test_bf16_and_fp16_compute_in_half_with_masters_in_fp32(tmp_path):
    losses = {}
    for name, kind in (("fp32", transformers.Trainer), ("bf16", Trainer), ("fp16", Trainer)):
        made = trainer(kind, tmp_path, **({} if name == "fp32" else {name: True}), max_steps=3)
        made.train()
        losses[name] = [value for _, _, value in history(made, "loss")]
        assert made.model.lm_head.weight.dtype == torch.float32
    for name, nearest, near in (("bf16", 1e-5, 1e-2), ("fp16", 1e-7, 1e-3)):
        assert losses[name] == pytest.approx(losses["fp32"], rel=near)
        assert losses[name] != pytest.approx(losses["fp32"], rel=nearest)


def test_fp16_leaves_out_steps_that_overflow(tmp_path):
    config = {
        "zero_optimization": {"stage": 3},
        "fp16": {"enabled": "auto", "initial_scale_power": 60, "hysteresis": 1},
    }
    made = trainer(Trainer, tmp_path, {"zgraph": config}, fp16=True, max_steps=2)
    before = {n: w.clone() for n, w in made.model.state_dict().items()}
    made.train()
    assert all(torch.equal(w, before[n]) for n, w in made.model.state_dict().items())
    assert made.accelerator.scaler.get_scale() == 2.0**58
    assert made.lr_scheduler.last_epoch == 0


def test_a_given_optimizer_and_activation_checkpointing(tmp_path):
    found = []
    for kind in (transformers.Trainer, Trainer):
        model = llama()
        optimizer = torch.optim.SGD(
            [{"params": model.model.parameters()}, {"params": model.lm_head.parameters(), "lr": 0.3}], 0.1
        )
        given = {"model": model, "optimizers": (optimizer, None)}
        made = trainer(kind, tmp_path, given, gradient_checkpointing=True, max_steps=3)
        made.train()
        found.append(made)
    same(history(found[1], "loss", "grad_norm"), history(found[0], "loss", "grad_norm"))
    assert "_again" in str(zgraph.report(found[1].model))  # the names of what is computed again


def test_adapters_with_checkpointed_activations_can_be_planned_and_are_not_changed():
    model = adapted()
    model.activation_checkpointing_enable()
    model.get_base_model().config.use_cache = True  # transformers logs once that this cannot be
    embeddings = model.get_input_embeddings()
    hooks = list(embeddings._forward_hooks.values())
    ids = torch.zeros(2, 8, dtype=torch.int64)
    assert hooks
    assert "checkpoint=" in str(zgraph.trace(model, input_ids=ids, labels=ids))
    assert list(embeddings._forward_hooks.values()) == hooks
    assert embeddings(ids).requires_grad


def test_an_optimizer_and_a_schedule_of_the_configuration(tmp_path):
    config = {
        "zero_optimization": {"stage": 3},
        "optimizer": {"type": "Lion"},
        "scheduler": {
            "type": "WarmupDecayLR",
            "params": {
                "warmup_num_steps": "auto",
                "total_num_steps": "auto",
                "warmup_max_lr": "auto",
                "warmup_type": "linear",
            },
        },
    }
    made = trainer(Trainer, tmp_path, {"zgraph": config}, max_steps=4, warmup_steps=2, learning_rate=1e-3)
    made.train()
    assert type(made.optimizer.optimizer) is zgraph.optim.Lion
    assert [r for _, _, r in history(made, "learning_rate")] == pytest.approx([0.0, 0.0, 5e-4, 1e-3])  # as DeepSpeed's


def test_checkpoints_that_cannot_be_resumed_say_so(tmp_path):
    made = trainer(Trainer, tmp_path / "run", max_steps=1, save_strategy="steps", save_steps=1)
    made.train()

    def harmed(name, harm):
        folder = tmp_path / name
        shutil.copytree(tmp_path / "run" / "checkpoint-1", folder)
        harm(folder / "zgraph")
        return str(folder)

    def cut(folder):
        shards = folder / "rank_0_0.safetensors"
        shards.write_bytes(shards.read_bytes()[:-100])

    def rename(folder):
        options = folder / "optimizer.json"
        options.write_text(options.read_text().replace("lm_head.weight", "head.weight"))

    def replace(folder):
        shutil.rmtree(folder)
        (folder.parent / "optimizer.pt").write_bytes(b"")

    for number, (harm, error, said) in enumerate(
        (
            (lambda folder: (folder / "index.json").unlink(), UsageError, "not written to its end"),
            (cut, CheckpointError, "is damaged"),
            (rename, CheckpointError, r"optimizer\.json is damaged"),
            (replace, UsageError, "another Trainer"),
        )
    ):
        with pytest.raises(error, match=said):
            made._load_optimizer_and_scheduler(harmed(f"case-{number}", harm))
    made._load_optimizer_and_scheduler(harmed("none", lambda folder: None))


def test_the_last_complete_checkpoint_is_resumed(tmp_path, caplog):
    saving = {"save_strategy": "steps", "save_steps": 1}
    made = trainer(Trainer, tmp_path, max_steps=3, **saving)
    made.train()
    (tmp_path / "checkpoint-3" / "trainer_state.json").unlink()
    state = tmp_path / "checkpoint-2" / "trainer_state.json"
    state.write_text(state.read_text()[:-10])
    again = trainer(Trainer, tmp_path, max_steps=3, **saving)
    again.train(resume_from_checkpoint=True)
    assert "checkpoint-2 was not written to its end" in caplog.text
    assert history(again, "loss") == history(made, "loss")
    assert json.loads(state.read_text())["global_step"] == 2
    for folder in tmp_path.glob("checkpoint-*"):
        (folder / "trainer_state.json").unlink()
    for wanted in (True, str(tmp_path / "checkpoint-3")):
        with pytest.raises(UsageError, match="written to its end"):
            again.train(resume_from_checkpoint=wanted)
