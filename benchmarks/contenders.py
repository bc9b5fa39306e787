"""The systems that are timed on a GPU, as steps that are ready to run: groups, AdamW over shards, whole training steps.

Every system of a kind starts from the same numbers. Gradients are dropped after each step, and the autograd graph with
them, so that each step does the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import HashStore
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed import fake_pg  # noqa: F401 - registers the group that sends nothing
from transformers import GPT2Config, GPT2Model, LlamaConfig, LlamaForCausalLM, LlamaModel

import zgraph
from benchmarks.clock import Step
from benchmarks.groups import GPT2, LLAMA, Group, Shape, tiny
from benchmarks.models import SEED
from zgraph.optim import AdamW
from zgraph.runtime import HostMemory, ShardStore

Prepare = Callable[[], Step]

COMPILERS: Mapping[str, Callable[[nn.Module], Callable[..., Any]]] = {
    "eager": lambda module: module,
    "torch.compile": torch.compile,
    "torch.compile, max-autotune": lambda module: torch.compile(module, mode="max-autotune-no-cudagraphs"),
}
KERNELS = ("aten", "triton", "inductor", "auto")

EAGER = ("eager", "torch foreach")
"""torch's default."""

NUM_SHARDS = 8
RATE = 1e-4


@contextmanager
def made_on(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Tensors are made there and so, from the seed."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    torch.manual_seed(SEED)
    try:
        with device:
            yield
    finally:
        torch.set_default_dtype(before)


# --- groups ----------------------------------------------------------------------------------------------------------


class ForwardBackward:
    """A module's forward and backward."""

    def __init__(self, module: Callable[..., Any], leaves: Sequence[Tensor], inputs: Sequence[Tensor]) -> None:
        self.module, self.inputs = module, inputs
        self.leaves = [t for t in (*leaves, *inputs) if t.requires_grad]
        self.tangents = [_tangent(out) for out in self._outputs()]

    def __call__(self) -> None:
        torch.autograd.backward(self._outputs(), self.tangents)
        self._drop_gradients()

    def results(self) -> list[Tensor]:
        """Outputs and gradients of one step."""
        outputs = self._outputs()
        torch.autograd.backward(outputs, self.tangents)
        found = [*(out.detach() for out in outputs), *(t.grad for t in self.leaves if t.grad is not None)]
        self._drop_gradients()
        return found

    def _outputs(self) -> tuple[Tensor, ...]:
        outputs = self.module(*self.inputs)
        return outputs if isinstance(outputs, tuple) else (outputs,)

    def _drop_gradients(self) -> None:
        for leaf in self.leaves:
            leaf.grad = None


class Drawing(ForwardBackward):
    """One whose results are drawn: there is nothing to compare."""

    def results(self) -> list[Tensor]:
        return []


def _tangent(out: Tensor) -> Tensor:
    """A gradient for an output, laid out as it is: the same numbers for each system; 1 for a loss."""
    if not out.dim():
        return torch.ones_like(out)
    generator = torch.Generator(out.device).manual_seed(SEED)
    drawn = torch.randn(out.shape, generator=generator, device=out.device, dtype=out.dtype)
    return torch.empty_like(out).copy_(drawn)


def of_group(group: Group, device: torch.device) -> dict[str, Prepare]:
    """All systems at a group."""
    kind = Drawing if group.draws else ForwardBackward

    def prepare(make: Callable[[], nn.Module], compiled: Callable[[nn.Module], Callable[..., Any]]) -> Prepare:
        def prepared() -> Step:
            with made_on(device, torch.bfloat16):
                module = make()
                inputs = group.inputs()
            return kind(compiled(module), list(module.parameters()), inputs)

        return prepared

    found = {name: prepare(group.module, compiled) for name, compiled in COMPILERS.items()}
    found |= {name: prepare(make, COMPILERS["eager"]) for name, make in group.others.items()}
    return found | {f"zgraph {k}": prepare(group.module, _zgraph(k)) for k in KERNELS}


def _zgraph(kernels: Any, param_dtype: torch.dtype | None = None) -> Callable[[nn.Module], nn.Module]:
    return lambda module: zgraph.compile(module, kernels=kernels, param_dtype=param_dtype)


# --- AdamW -----------------------------------------------------------------------------------------------------------


def layers(shape: Shape) -> nn.Module:
    """Four layers of Llama-3 8B, or all of GPT-2 XL's; without an embedding to speak of."""
    if shape.model == LLAMA.model:
        config = LlamaConfig(
            hidden_size=shape.width,
            intermediate_size=shape.inner,
            num_hidden_layers=4,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.kv_heads,
            vocab_size=8,
            bos_token_id=None,
            eos_token_id=None,
        )
        return LlamaModel(config)
    num_layers = 48 if shape == GPT2 else 2
    small = GPT2Config(
        n_embd=shape.width, n_layer=num_layers, n_head=shape.heads, vocab_size=8, bos_token_id=None, eos_token_id=None
    )
    return GPT2Model(small)


@dataclass(frozen=True)
class Update:
    """An optimizer's step over what `model` holds; gradients stay, so that each step does the same work."""

    optimizer: torch.optim.Optimizer
    model: nn.Module

    def __call__(self) -> None:
        self.optimizer.step()

    def results(self) -> list[Tensor]:
        """The first parameters, as they are after so many steps."""
        found = self.optimizer.param_groups[0]["params"][:4]
        return [(p._local_tensor if isinstance(p, DTensor) else p).detach().clone() for p in found]


def of_adamw(shape: Shape, device: torch.device) -> dict[str, Prepare]:
    """All systems at AdamW's step over one rank's shards of eight: torch's on them as plain tensors."""

    def torchs(**how: Any) -> Prepare:
        def prepared() -> Step:
            with sharded(shape, device) as model:
                plain = nn.ParameterList(p.detach().to_local().clone() for p in model.parameters())  # type: ignore[attr-defined]
                for p, own in zip(model.parameters(), plain, strict=True):
                    own.grad = p.grad.to_local()  # type: ignore[union-attr]
            return Update(torch.optim.AdamW(plain.parameters(), lr=RATE, **how), plain)

        return prepared

    def ours(kernels: Any) -> Prepare:
        def prepared() -> Step:
            with sharded(shape, device) as model:
                return Update(AdamW(model.parameters(), lr=RATE, kernels=kernels), model)

        return prepared

    ways = {"torch foreach": torchs(foreach=True), "torch fused": torchs(fused=True)}
    return ways | {f"zgraph {k}": ours(k) for k in ("aten", "triton")}


@contextmanager
def sharded(shape: Shape, device: torch.device) -> Iterator[nn.Module]:
    """A model as the first of eight ranks holds it, with gradients, in a group that sends nothing."""
    with made_on(device, torch.float32):
        model = layers(shape)
    dist.init_process_group("fake", store=HashStore(), rank=0, world_size=NUM_SHARDS)
    try:
        mesh = init_device_mesh(device.type, (NUM_SHARDS,))
        stages = dict.fromkeys((name for name, _ in model.named_parameters()), None)
        store = ShardStore(model, mesh, mesh.get_group(), stages, 3, None, device, {}, HostMemory(device))
        model.store = store  # type: ignore[assignment]  # the optimizer finds the shards by it while it lives
        dice = torch.Generator(device).manual_seed(SEED)
        for p in model.parameters():
            assert isinstance(p, DTensor)
            local = torch.randn(p.to_local().shape, generator=dice, device=device)
            p.grad = DTensor.from_local(
                local, p.device_mesh, p.placements, run_check=False, shape=p.shape, stride=p.stride()
            )
        yield model
    finally:
        dist.destroy_process_group()


# --- training --------------------------------------------------------------------------------------------------------


class LossOnly(nn.Module):
    """A language model that returns its loss and nothing else."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.model = LlamaForCausalLM(config)

    def forward(self, ids: Tensor) -> Tensor:
        loss: Tensor = self.model(input_ids=ids, labels=ids).loss
        return loss


def llama_1b(*, is_tiny: bool) -> LlamaConfig:
    """Llama-3.2-1B."""
    width, inner, num_layers, heads, words = (64, 96, 1, 4, 300) if is_tiny else (2048, 8192, 16, 32, 128_256)
    rope = {
        "rope_type": "llama3",
        "rope_theta": 500_000.0,
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    return LlamaConfig(
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=num_layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 4,
        vocab_size=words,
        max_position_embeddings=131_072,
        tie_word_embeddings=True,
        rms_norm_eps=1e-5,
        rope_parameters=rope,
        use_cache=False,
        bos_token_id=None,
        eos_token_id=None,
    )


class Masters:
    """AdamW on fp32 copies of parameters that are in bf16 themselves: how eager training keeps masters."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        self.parameters = parameters
        self.masters = [nn.Parameter(p.detach().clone()) for p in parameters]
        self.optimizer = torch.optim.AdamW(self.masters, lr=RATE, fused=True)
        for p in parameters:
            p.data = p.data.to(torch.bfloat16)

    @torch.no_grad()
    def step(self) -> None:
        for master, p in zip(self.masters, self.parameters, strict=True):
            assert p.grad is not None
            master.grad, p.grad = p.grad.float(), None
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        torch._foreach_copy_([*self.parameters], [*self.masters])

    def zero_grad(self) -> None: ...


class Training:
    """Forward, backward and update."""

    def __init__(self, model: Callable[..., Tensor], optimizer: Any, ids: Tensor) -> None:
        self.model, self.optimizer, self.ids = model, optimizer, ids

    def __call__(self) -> Tensor:
        loss = self.model(self.ids)
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()

    def results(self) -> list[Tensor]:
        """The loss of one more step."""
        return [self()]


def of_training(batch: int, tokens: int, device: torch.device, *, is_tiny: bool) -> dict[str, Prepare]:
    """All systems at a whole training step: computed in bf16, with masters and AdamW's moments in fp32."""

    def build() -> tuple[nn.Module, Tensor]:
        with made_on(device, torch.float32):
            model = LossOnly(llama_1b(is_tiny=is_tiny))
            return model, torch.randint(model.model.config.vocab_size, (batch, tokens))

    def torchs(compiled: Callable[[nn.Module], Callable[..., Any]]) -> Prepare:
        def prepared() -> Step:
            model, ids = build()
            optimizer = Masters(list(model.parameters()))
            return Training(compiled(model), optimizer, ids)

        return prepared

    def ours(kernels: Any) -> Prepare:
        def prepared() -> Step:
            model, ids = build()
            compiled = _zgraph(kernels, torch.bfloat16)(model)
            optimizer = AdamW(compiled.parameters(), lr=RATE, kernels="triton" if kernels == "triton" else "aten")
            return Training(compiled, optimizer, ids)

        return prepared

    return {n: torchs(c) for n, c in COMPILERS.items()} | {f"zgraph {k}": ours(k) for k in KERNELS}


def shapes(*, is_tiny: bool) -> tuple[Shape, ...]:
    """Of the models whose shards AdamW updates."""
    return tuple(tiny(s) if is_tiny else s for s in (LLAMA, GPT2))
