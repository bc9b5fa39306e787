"""`deepspeed.checkpointing`: torch's activation checkpointing, which the captured graph keeps to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.utils import checkpoint as torch_checkpoint

from zgraph.deepspeed.absent import finder
from zgraph.errors import UsageError

__getattr__ = finder(
    __name__,
    {
        "CheckpointFunction": "call checkpoint",
        "partition_activations_in_checkpoint": "leave it out: there is no tensor parallelism to share activations in",
        "set_num_layers": "leave it out",
        **dict.fromkeys(
            ("get_cuda_rng_tracker", "model_parallel_cuda_manual_seed", "model_parallel_reconfigure_tp_seed"),
            "call torch.manual_seed: there is no tensor parallelism",
        ),
    },
)


def checkpoint(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call a function whose values in between are computed again in the backward."""
    return torch_checkpoint.checkpoint(function, *args, use_reentrant=False, **kwargs)


non_reentrant_checkpoint = checkpoint


def configure(
    mpu_: Any = None,
    deepspeed_config: Any = None,
    partition_activations: bool | None = None,
    contiguous_checkpointing: bool | None = None,
    num_checkpoints: int | None = None,
    checkpoint_in_cpu: bool | None = None,
    synchronize: bool | None = None,
    profile: bool | None = None,
) -> None:
    """Take what DeepSpeed's `configure` takes. What it would choose, the passes do, by the memory budget.

    Raises:
        UsageError: it asks for what only the engine's configuration can: activations on the host.
    """
    if checkpoint_in_cpu:
        raise UsageError(
            'checkpoint_in_cpu: give {"activation_checkpointing": {"cpu_checkpointing": true}} in the configuration'
        )


def is_configured() -> bool:
    """True: there is nothing to configure."""
    return True


def reset() -> None:
    """Begin anew, which takes nothing: no activations are kept between two steps."""
