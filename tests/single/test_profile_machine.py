"""A measured profile of this machine is one like any other."""

from types import SimpleNamespace

import pytest
import torch

import zgraph
from tests.single.gpu import Gpu
from zgraph.compiler import machine_profile
from zgraph.cost import hardware


def test_this_machine_can_be_measured_and_planned_for(tmp_path):
    path = tmp_path / "this-machine.toml"
    found = zgraph.profile_machine(path)
    assert hardware(str(path)) == found
    assert found.name == "this-machine"
    assert found.device.rate("f32") > 1e8
    assert found.device.memory_bytes_per_s > 1e7


class Pretended:
    """Stands for a tensor on a GPU that multiplies at so many FLOP a second, and copies so many bytes."""

    rates = {torch.float32: 50e12, torch.bfloat16: 800e12}  # noqa: RUF012
    bandwidth = 4e12
    half_flop = 1e10

    def __init__(self, gpu: Gpu, size: int, dtype: torch.dtype = torch.float32) -> None:
        self.gpu, self.size, self.dtype = gpu, size, dtype

    def to(self, dtype: torch.dtype) -> "Pretended":
        return Pretended(self.gpu, self.size, dtype)

    def __matmul__(self, other: "Pretended") -> None:
        if self.dtype not in self.rates:
            raise RuntimeError("no such matmul")
        self.gpu.launch((2 * self.size**3 + self.half_flop) / self.rates[self.dtype])

    def t(self) -> "Pretended":
        return self

    def copy_(self, other: "Pretended") -> None:
        self.gpu.launch(2 * self.size / self.bandwidth)

    def add_(self, number: float) -> None:
        self.gpu.launch(1e-6)

    def numel(self) -> int:
        return self.size


def test_a_gpu_is_measured_and_not_its_host(monkeypatch, tmp_path):
    """Whose launches take 20 us, as long as seven matmuls of 1024."""
    gpu = Gpu(launch_s=20e-6)
    device = gpu.install(monkeypatch)
    cuda = SimpleNamespace(
        is_available=lambda: True,
        current_device=lambda: 0,
        mem_get_info=lambda device: (64 << 30, 80 << 30),
        get_device_name=lambda device: "NVIDIA Vega Nine",
        get_device_properties=lambda device: SimpleNamespace(total_memory=80 << 30),
    )
    for name, value in vars(cuda).items():
        monkeypatch.setattr(torch.cuda, name, value)
    sizes = []

    def zeros(size: int, **_: object) -> Pretended:
        sizes.append(size)
        return Pretended(gpu, size)

    def no_such(*_: object, **__: object) -> None:
        raise RuntimeError("no such matmul")

    dice = SimpleNamespace(manual_seed=lambda seed: None)
    made = {"device": lambda *_: device, "randn": lambda size, *_, **__: Pretended(gpu, size), "zeros": zeros}
    names = ("float32", "bfloat16", "float16", "float8_e4m3fn", "uint8", "cuda")
    fake = {name: getattr(torch, name) for name in names} | made
    fake |= {"empty_like": lambda like: Pretended(gpu, like.size), "Generator": lambda device: dice}
    fake |= {"ones": lambda *_, **__: None, "_scaled_mm": no_such}
    monkeypatch.setattr(machine_profile, "torch", SimpleNamespace(**fake))
    found = zgraph.profile_machine(tmp_path / "gpu.toml").device
    assert found.matmul_flops == pytest.approx({"f32": 50e12, "bf16": 800e12}, rel=0.02), "no rate of what does not run"
    assert found.matmul_half_flop == pytest.approx(1e10, rel=0.05)
    assert found.memory_bytes_per_s == pytest.approx(4e12, rel=0.02)
    assert found.launch_us == pytest.approx(20)
    assert found.memory_bytes == 80 << 30
    assert max(sizes) == 2 << 30
