"""Two ranks: Lightning's Trainer logs what it logs over DDP, and resumes there and elsewhere."""

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.distributed.tensor import DTensor

from tests.deep import deep
from tests.pl.training import Parts, Whole, launched, loader, net, trainer
from zgraph.lightning import Strategy


def fit(mesh, kind, folder, stage=None, resume=None, **options):
    """The losses of a rank's batches, the last of validation, and where the last epoch but one was saved."""
    launched(mesh.get_local_rank())
    saves = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)
    strategy = "ddp" if stage is None else Strategy(stage)
    made = trainer(folder, strategy, mesh.size(), enable_checkpointing=True, callbacks=[saves], **options)
    torch.manual_seed(0)
    model = kind()
    made.fit(model, loader(), loader(), ckpt_path=resume)
    if stage:
        assert all(isinstance(p, DTensor) for p in model.parameters())
    again = made.validate(model, loader(), verbose=False)[0]["val_loss"]
    assert again == pytest.approx(made.callback_metrics["val_loss"].item(), rel=1e-6)
    return model.told, again


def fit_bf16(mesh, kind, folder, stage):
    return fit(mesh, kind, folder, stage, precision="bf16-mixed")


@pytest.mark.parametrize(("kind", "stage"), [(Whole, 3), (Parts, 1), deep(Parts, 3), deep(Whole, 0), deep(Whole, 2)])
def test_the_losses_are_those_over_ddp_and_a_checkpoint_resumes_at_two_ranks_and_at_one(pair, tmp_path, kind, stage):
    expected = pair.run(fit, 2, kind, tmp_path / "plain")
    found = pair.run(fit, 2, kind, tmp_path / "ours", stage)
    for (losses, validated), (losses_expected, validated_expected) in zip(found, expected, strict=True):
        assert losses == pytest.approx(losses_expected, rel=1e-5)
        assert validated == pytest.approx(validated_expected, rel=1e-5)
    half = tmp_path / "ours" / "epoch=0.ckpt"
    resumed = pair.run(fit, 2, kind, tmp_path / "again", stage, half)
    assert [losses for losses, _ in resumed] == [losses[len(losses) // 2 :] for losses, _ in found]
    plain = pair.run(fit, 2, kind, tmp_path / "back", None, half)  # over DDP
    assert plain[0][0] == pytest.approx(resumed[0][0], rel=1e-5)
    alone = kind()
    trainer(tmp_path, Strategy(stage), accumulate_grad_batches=1).fit(alone, loader(8), loader(), ckpt_path=half)
    assert alone.trainer.callback_metrics["val_loss"].item() == pytest.approx(expected[0][1], rel=1e-4)


def test_bf16_mixed_computes_in_bf16_as_it_does_over_ddp(pair, tmp_path):
    expected = pair.run(fit_bf16, 2, Whole, tmp_path / "plain", None)
    found = pair.run(fit_bf16, 2, Whole, tmp_path / "ours", 3)
    for (losses, _), (losses_expected, _) in zip(found, expected, strict=True):
        assert losses == pytest.approx(losses_expected, rel=2e-2)
        assert losses[0] == pytest.approx(losses_expected[0], rel=1e-3)
    saved = torch.load(tmp_path / "ours" / "epoch=1.ckpt", weights_only=True)["state_dict"]
    assert {value.dtype for value in saved.values()} == {torch.float32}
    net().load_state_dict({k.removeprefix("net."): v for k, v in saved.items() if k.startswith("net.")})
