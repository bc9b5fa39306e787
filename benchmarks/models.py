"""The models that are trained, and the data they are trained on. Both depend on seeds only."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PretrainedConfig, Qwen3MoeConfig

from benchmarks.errors import UnknownName

BATCH_SIZE = 4
SEQUENCE_LENGTH = 128
SEED = 0


def llama(width: int, inner: int, num_layers: int, num_heads: int, num_words: int) -> PretrainedConfig:
    """A Llama with as many heads for keys and values as for queries, embedding and head apart."""
    return LlamaConfig(
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=num_heads,
        vocab_size=num_words,
        use_cache=False,
    )


def llama_tiny() -> PretrainedConfig:
    return llama(64, 176, 2, 4, 256)


def llama_30m() -> PretrainedConfig:
    """29,893,120 parameters."""
    return llama(512, 1408, 8, 8, 4096)


def llama_8m() -> PretrainedConfig:
    """8,524,032 parameters."""
    return llama(256, 704, 8, 4, 4096)


def gpt2_4l() -> PretrainedConfig:
    """GPT-2 small in width and vocabulary, 4 layers instead of 12, no dropout."""
    return GPT2Config(n_layer=4, attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0, use_cache=False)


def llama_10l() -> PretrainedConfig:
    """Ten layers, 36,186,624 parameters."""
    return llama(512, 1408, 10, 8, 4096)


def moe_small() -> PretrainedConfig:
    """A mixture of 16 experts in each of 4 layers, 25,961,856 parameters of which 25,165,824 are experts'."""
    return Qwen3MoeConfig(
        hidden_size=128,
        intermediate_size=512,
        moe_intermediate_size=1024,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=32,
        num_experts=16,
        num_experts_per_tok=2,
        decoder_sparse_step=1,
        vocab_size=2048,
        use_cache=False,
    )


def break_between_layers(model: nn.Module) -> None:
    """Have each layer begin with a graph break."""
    for layer in decoder_layers(model):
        layer.register_forward_pre_hook(_break)


def break_in_layers(model: nn.Module) -> None:
    """Have each layer break the graph between its attention and its MLP."""
    for layer in decoder_layers(model):
        layer.mlp.register_forward_pre_hook(_break)


def _break(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    torch._dynamo.graph_break()


@dataclass(frozen=True)
class Preset:
    """A named model configuration, the change made to the model, and the shape of a rank's batch."""

    name: str
    config: Callable[[], PretrainedConfig]
    change: Callable[[nn.Module], None] = lambda model: None
    batch_size: int = BATCH_SIZE
    sequence_length: int = SEQUENCE_LENGTH

    @property
    def num_tokens(self) -> int:
        """Tokens of a step on one rank."""
        return self.batch_size * self.sequence_length


PRESETS = (
    Preset("llama-tiny", llama_tiny),
    Preset("llama-30m", llama_30m),
    Preset("gpt2-4l", gpt2_4l),
    Preset("llama-8m", llama_8m),
    Preset("moe-small", moe_small, batch_size=2),
    Preset("llama-8m-2k", llama_8m, batch_size=8, sequence_length=256),
    Preset("llama-10-breaks", llama_10l, break_between_layers),
    Preset("llama-breaks-inside", llama_10l, break_in_layers),
)
NAMES = tuple(preset.name for preset in PRESETS)


def preset(name: str) -> Preset:
    """The preset of that name. Raises UnknownName."""
    for candidate in PRESETS:
        if candidate.name == name:
            return candidate
    raise UnknownName(f"no model preset is called {name!r}", f"Use one of: {', '.join(NAMES)}")


def build(name: str, device: torch.device) -> nn.Module:
    """The model of a preset, in fp32 and training mode; the same numbers in every process."""
    torch.manual_seed(SEED)
    model: nn.Module = AutoModelForCausalLM.from_config(preset(name).config(), dtype=torch.float32)  # type: ignore[no-untyped-call]
    preset(name).change(model)
    return model.train().to(device)


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The repeated blocks of a decoder, in order: the longest ModuleList in it."""
    stacks = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    return max((list(stack) for stack in stacks), key=len)


def batch(name: str, *, step: int, rank: int, device: torch.device) -> Tensor:
    """Token ids, [batch size, sequence length] int64, different for each step and rank.

    Every row counts upwards from a random token, so that the loss falls within a few steps and a rank that
    misses the others' gradients shows in it.
    """
    found = preset(name)
    vocab_size: int = found.config().vocab_size
    generator = torch.Generator().manual_seed(SEED + 4096 * step + rank)
    first = torch.randint(vocab_size, (found.batch_size, 1), generator=generator)
    return ((first + torch.arange(found.sequence_length)) % vocab_size).to(device)
