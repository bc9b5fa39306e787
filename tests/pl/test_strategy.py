"""The strategy on one rank: what is compiled, in which precision, and what is refused."""

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import nn

import zgraph
from tests.pl.training import Parts, Whole, loader, net, trainer
from zgraph.errors import UsageError
from zgraph.lightning import Strategy


def fitted(folder, model, strategy, **options):
    made = trainer(folder, strategy, **options)
    made.fit(model, loader(), loader())
    return made


@pytest.mark.parametrize("kind", [Whole, Parts])
def test_one_rank_trains_as_over_ddp(tmp_path, kind):
    models = []
    for strategy in ("ddp", Strategy()):
        torch.manual_seed(0)
        models.append(kind())
        fitted(tmp_path, models[-1], strategy)
    expected, found = models
    assert found.told == pytest.approx(expected.told, rel=1e-5)
    for part in [found] if kind is Whole else [found.body, found.head]:
        assert zgraph.report(part).num_ranks == 1


def test_a_model_is_fitted_again_validated_and_loaded_elsewhere(tmp_path):
    model = Whole()
    saves = ModelCheckpoint(tmp_path, filename="last")
    made = fitted(tmp_path, model, Strategy(2), enable_checkpointing=True, callbacks=[saves], max_epochs=1)
    logged = made.callback_metrics["val_loss"].item()
    (again,) = trainer(tmp_path, Strategy(2)).validate(model, loader(), verbose=False)
    assert again["val_loss"] == pytest.approx(logged, rel=1e-6)
    plain = Whole.load_from_checkpoint(tmp_path / "last.ckpt")
    (elsewhere,) = trainer(tmp_path, "auto").validate(plain, loader(), verbose=False)
    assert elsewhere["val_loss"] == pytest.approx(logged, rel=1e-6)
    told = len(model.told)
    fitted(tmp_path, model, Strategy(2), max_epochs=1)
    assert len(model.told) == 2 * told


def test_precision_decides_what_is_computed_in(tmp_path):
    model = Whole()
    fitted(tmp_path, model, Strategy(), precision="bf16-mixed", max_epochs=1)
    assert model.scale.dtype == torch.float32
    assert any("bf16" in str(entry.plan.forward) for entry in zgraph.report(model).entries)
    model = Whole()
    fitted(tmp_path, model, Strategy(), precision="bf16-true", max_epochs=1)
    assert model.scale.dtype == torch.bfloat16
    for options in ({"precision": "64-true"}, {"plugins": [MixedPrecision("16-mixed", "cpu", object())]}):
        with pytest.raises(UsageError, match='"bf16-mixed", "bf16-true" or "32-true"'):
            fitted(tmp_path, Whole(), Strategy(), **options)


class Meta(Whole):
    """Built without memory, when the Trainer says so."""

    def __init__(self):
        LightningModule.__init__(self)
        self.told = []

    def configure_model(self):
        if not hasattr(self, "net"):
            with torch.device("meta"):
                self.net = net()
            self.scale = nn.Parameter(torch.tensor(1.0))


def test_a_model_on_the_meta_device_gets_its_memory_and_resumes(tmp_path):
    saves = ModelCheckpoint(tmp_path, filename="meta")
    model = Meta()
    fitted(tmp_path, model, Strategy(), enable_checkpointing=True, callbacks=[saves], max_epochs=1)
    assert not model.net[0].weight.is_meta
    again = Meta()
    (found,) = trainer(tmp_path, Strategy()).validate(again, loader(), ckpt_path=tmp_path / "meta.ckpt", verbose=False)
    assert found["val_loss"] == pytest.approx(model.trainer.callback_metrics["val_loss"].item(), rel=1e-6)


class Listed(Parts):
    """Its layers are in a list."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(2, 2)])


class Loose(Parts):
    """It has a parameter beside its modules, and no forward."""

    def __init__(self):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(2))


@pytest.mark.parametrize(
    ("model", "options", "said"),
    [
        (Listed, {}, "layers: a list of modules has no forward"),
        (Loose, {}, "bias: parameters in no compiled module"),
        (Parts, {"modules": "nothing"}, "Parts has no module 'nothing'"),
        (Parts, {"modules": ["body"]}, r"head\.weight, head\.bias: parameters in no compiled module"),
        (Parts, {"stages": 1}, "no option stages"),
        (Parts, {"param_dtype": torch.bfloat16}, 'precision="bf16-mixed"'),
    ],
)
def test_what_cannot_be_compiled_is_refused(tmp_path, model, options, said):
    with pytest.raises(UsageError, match=said):
        fitted(tmp_path, model(), Strategy(**options))


def test_sync_batchnorm_is_refused(tmp_path):
    with pytest.raises(UsageError, match="sync_batchnorm"):
        fitted(tmp_path, Whole(), Strategy(), sync_batchnorm=True)
