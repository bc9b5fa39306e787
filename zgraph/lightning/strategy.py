"""A strategy of Lightning's Trainer: modules are compiled and sharded, all else is as with DDP."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from lightning.pytorch.plugins.precision import HalfPrecision, MixedPrecision, Precision
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch.optim import Optimizer

from zgraph import api
from zgraph.engine.checkpoint.optimizer_state import place_optimizer_state, whole_optimizer_state
from zgraph.engine.checkpoint.tensors import whole_state_dict
from zgraph.errors import UsageError
from zgraph.lightning.parts import compiled_parts, parts_of
from zgraph.options.settings import Options
from zgraph.options.validate import ATTRIBUTE, Stage

log = logging.getLogger("zgraph")


class Strategy(DDPStrategy):  # type: ignore[misc]
    """Strategy for `lightning.pytorch.Trainer(strategy=...)`, which compiles before the optimizers are configured.

    A LightningModule with a forward of its own is compiled whole, and its steps call `self(...)`; of one without, each
    module in its attributes. Checkpoints are Lightning's: whole tensors in one file, written by the first rank, which
    resume at any number of ranks and stage.

    Args:
        stage: the ZeRO stage, as `zgraph.compile` takes it.
        modules: names of the modules to compile, where it should be others.
        ddp: what DDPStrategy takes of processes (`process_group_backend`, `timeout`, `start_method`,
            `cluster_environment`).
        options: of `zgraph.compile`. The Trainer's `precision` decides `param_dtype`.

    Raises:
        UsageError: an option or the precision means nothing here.
    """

    strategy_name = "zgraph"

    def __init__(
        self, stage: Stage = 3, *, modules: Sequence[str] = (), ddp: Mapping[str, Any] | None = None, **options: Any
    ) -> None:
        if unknown := options.keys() - Options.__annotations__.keys():
            raise UsageError(f"zgraph.compile has no option {', '.join(sorted(unknown))}")
        if "param_dtype" in options:
            raise UsageError('param_dtype: give the Trainer precision="bf16-mixed"')
        super().__init__(**(ddp or {}))
        self.modules = [modules] if isinstance(modules, str) else [*modules]
        self.options = {"stage": stage, **options}

    # --- the model ---------------------------------------------------------------------------------------------------

    def setup(self, trainer: Any) -> None:
        """Compile the model, and have it configure its optimizers if it is to be trained."""
        _check(self.precision_plugin)
        if self._layer_sync is not None:
            raise UsageError("sync_batchnorm: a compiled model takes the first rank's statistics; leave it out")
        self.accelerator.setup(trainer)
        self.model = self.precision_plugin.convert_module(self.lightning_module)
        self._compile()
        if trainer.state.fn == TrainerFn.FITTING:
            self.setup_optimizers(trainer)
        self.setup_precision_plugin()

    def _compile(self) -> None:
        parts = parts_of(self.lightning_module, self.modules)
        if not any(p.is_meta for p in self.lightning_module.parameters()):
            self.model_to_device()
        param_dtype = torch.bfloat16 if isinstance(self.precision_plugin, MixedPrecision) else None
        for part in parts:
            if ATTRIBUTE not in part.__dict__:
                api.compile(part, param_dtype=param_dtype, **self.options)

    @contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        """Context of the micro-batches that end no step: see `zgraph.no_sync`."""
        with ExitStack() as stack:
            for part in compiled_parts(self.lightning_module):
                stack.enter_context(api.no_sync(part))
            yield

    def teardown(self) -> None:
        """Let go of plugins; the model stays where it is, as it may be called again."""
        self.cluster_environment.teardown()
        self.precision_plugin.teardown()
        self.accelerator.teardown()
        self.checkpoint_io.teardown()

    # --- checkpoints -------------------------------------------------------------------------------------------------

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        return True  # a model on the meta device has no memory before

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The whole weights, on the first rank. All ranks call it."""
        return whole_state_dict(self.lightning_module, keep=self.is_global_zero)

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        """The whole state of an optimizer, on the first rank. All ranks call it."""
        inner: Optimizer = getattr(optimizer, "_optimizer", optimizer)
        return whole_optimizer_state(inner, keep=self.is_global_zero)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Take whole states, each rank its part."""
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            optimizer.load_state_dict(place_optimizer_state(optimizer, state))

    @classmethod
    def register_strategies(cls, strategy_registry: Any) -> None:
        """Register none: a strategy is given as an object, with its options."""


def _check(plugin: Precision) -> None:
    """Refuse a precision that a compiled model does not compute in."""
    kind = str(plugin.precision)
    is_half = isinstance(plugin, MixedPrecision | HalfPrecision)
    if type(plugin) is not Precision and not (is_half and kind in ("bf16-mixed", "bf16-true")):
        raise UsageError(f'precision={kind!r}: a compiled model takes "bf16-mixed", "bf16-true" or "32-true"')
