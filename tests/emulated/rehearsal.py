"""A part of a lease of a GPU, rehearsed on the emulated device: python -m tests.emulated.rehearsal part NAME ...

What takes a GPU long is made small, and what the device lacks is told: it sleeps for no time.
"""

from __future__ import annotations

import importlib
import os
import sys
from types import SimpleNamespace
from typing import Any

from tests.emulated import cuda


def prepare() -> None:
    """Have a device, before torch is imported."""
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":0:0"  # budgets here are smaller than its workspace
    cuda.install()
    import torch

    from tests.emulated import kernels
    from zgraph.compiler import machine_profile
    from zgraph.runtime import clock

    register = torch.cuda.cudart().cudaHostRegister

    class Generator(torch.Generator):
        """The device has none of its own, and computes with the processor's."""

        def __new__(cls, device: Any = None) -> Any:
            return super().__new__(cls, "cpu")

    torch.Generator = Generator  # type: ignore[misc]
    torch.cuda.__dict__.update(
        _sleep=lambda cycles: None,
        cudart=lambda: SimpleNamespace(cudaHostRegister=register, cudaHostUnregister=lambda address: 0),
    )
    torch.set_num_threads(1)
    clock.COLD_BYTES = clock.FEWEST_COLD_BYTES = 1 << 16
    profile: Any = machine_profile
    profile.SIZES_ON_DEVICE, profile.SMALL_SIZE, profile.COPY_BYTES_ON_DEVICE = (64,), 32, 1 << 16
    kernels.watch()


def spell_attention_out() -> None:
    """The device has no attention of its own."""
    from benchmarks import contenders

    whole: Any = contenders.llama_1b

    def llama(*, is_tiny: bool) -> Any:
        config = whole(is_tiny=is_tiny)
        config._attn_implementation = "eager"
        return config

    contenders.llama_1b = llama


if __name__ == "__main__":
    prepare()
    from benchmarks.lease.child import main

    if sys.argv[2] == "steps":
        spell_attention_out()
    if os.environ.get("ZGRAPH_DEEP"):
        importlib.import_module(f"benchmarks.lease.{sys.argv[2]}").REHEARSED = None
    main(sys.argv[2:])
