"""Jobs for tests of inference that the device repeats from recordings."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any
from unittest.mock import patch

import torch
import transformers
from torch import nn

import zgraph
from tests.emulated import cuda
from tests.emulated.races import races
from zgraph.inference.continuous import ContinuousBatch, Request
from zgraph.runtime import replays

PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12, 13], [14]]
NUM_NEW = 5


def _llama() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=61,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        attn_implementation="eager",
        bos_token_id=0,
        eos_token_id=60,
        pad_token_id=0,
    )
    return transformers.LlamaForCausalLM(config).eval()


def _t5() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=61,
        d_model=16,
        d_kv=8,
        d_ff=32,
        num_layers=1,
        num_heads=2,
        decoder_start_token_id=0,
        pad_token_id=0,
        attn_implementation="eager",
    )
    model = transformers.T5ForConditionalGeneration(config).eval()
    model.generation_config.decoder_start_token_id = 0
    return model


def _net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 8), nn.ReLU())


def _pair(make: Callable[[], nn.Module], **options: Any) -> tuple[Any, Any, list[nn.Module]]:
    """A model that is recorded, and the same that is not; and both models."""
    torch.compiler.reset()
    models = [make().to("cuda"), make().to("cuda")]
    return zgraph.infer(models[0], cuda_graphs=True, **options), zgraph.infer(models[1], **options), models


@cache
def _llamas(kv: str | None) -> tuple[Any, Any, list[nn.Module]]:
    """The same of a Llama, captured once for all jobs."""
    return _pair(_llama, max_batch=3, max_len=32, kv=kv)


@contextmanager
def _counted(inference: Any) -> Iterator[list[Any]]:
    """A list, in which are afterwards what is said of recordings made within, and how many programs were replayed."""
    found: list[Any] = []
    for recordings in inference.programs.recordings:
        recordings.forget()
        recordings.replays.num_replays = recordings.replays.num_moved = 0
    yield found
    found += ["\n".join(inference.cuda_graphs), sum(r.replays.num_replays for r in inference.programs.recordings)]


def _prompts() -> tuple[torch.Tensor, torch.Tensor]:
    longest = max(map(len, PROMPTS))
    ids = torch.tensor([[0] * (longest - len(p)) + p for p in PROMPTS])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in PROMPTS])
    return ids.to("cuda"), mask.to("cuda")


def _are_same(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(one, other, strict=True))


def tokens(kv: str | None) -> tuple[bool, str, int, list[str]]:
    """Whether tokens and caches of two rounds are the same; what is said of recordings, replays, and races.

    Args:
        kv: how keys and values are kept.
    """
    recorded, plain, _ = _llamas(kv)
    given, found = _prompts(), []
    with cuda.recorded() as log, _counted(recorded) as counted:
        for inference in (recorded, plain):
            inference.calls.clear()
            made = [inference.generate(*given, max_new_tokens=NUM_NEW) for _ in range(2)]
            found.append([*made, *(t.clone() for t in inference.calls.arena.named.values())])
    return _are_same(*found), *counted, [str(race) for race in races(log)]


def requests() -> tuple[bool, str, int]:
    """Whether requests that come and go get the same tokens, in rows that they take in turns."""
    recorded, plain, _ = _llamas(None)
    found = []
    with _counted(recorded) as counted:
        for inference in (recorded, plain):
            batch, made = ContinuousBatch(inference), []
            for number, prompt in enumerate([*PROMPTS, *PROMPTS]):
                batch.submit(Request(prompt, max_new_tokens=3 + number))
            while batch.is_busy:
                made += batch.step()
            found.append(made)
    return found[0] == found[1], *counted


def changed_weights() -> tuple[bool, str, int]:
    """Whether tokens follow weights that are written to, and memory that was given back and taken again."""
    recorded, plain, models = _llamas(None)
    given, found = _prompts(), []
    with _counted(recorded) as counted:
        for inference, model in zip((recorded, plain), models, strict=True):
            made = [inference.generate(*given, max_new_tokens=NUM_NEW)]
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.mul_(1.25)
            made.append(inference.generate(*given, max_new_tokens=NUM_NEW))
            values = {name: p.detach().clone() * 0.8 for name, p in model.named_parameters()}
            storages = {t.untyped_storage() for t in inference.programs._resident.values()}
            sizes = [inference.calls.arena.num_bytes, *(storage.nbytes() for storage in storages)]
            inference.programs.unload()
            inference.calls.arena.resize(is_there=False)
            held = [torch.full((size,), 60, dtype=torch.uint8, device="cuda") for size in sizes]  # where the memory was
            inference.calls.arena.resize(is_there=True)
            inference.programs.load(values.items())
            made.append(inference.generate(*given, max_new_tokens=NUM_NEW))
            del held
            found.append(made)
    return _are_same(*found), *counted


def answers() -> tuple[bool, str, int]:
    """Whether answers of an encoder with a decoder are the same."""
    recorded, plain, models = _pair(_t5, max_batch=3, max_len=16, max_source=8)
    given, found = _prompts(), []
    with _counted(recorded) as counted:
        for inference in (recorded, plain):
            found.append([inference.generate(*given, max_new_tokens=NUM_NEW) for _ in range(2)])
    del models
    return _are_same(*found), *counted


def forwards() -> tuple[float, str, int]:
    """Largest difference of outputs that somebody keeps, of a module, in turns of two sizes."""
    recorded, plain, models = _pair(_net)
    kept = []
    with _counted(recorded) as counted:
        for inference in (recorded, plain):
            torch.manual_seed(1)
            kept.append([inference(input=torch.randn(2 + number % 2, 8).to("cuda")) for number in range(10)])
    del models
    return max(float((a - b).abs().max()) for a, b in zip(*kept, strict=True)), *counted


def copied_caches() -> bool:
    """Whether tokens are those of a model that is not recorded, where a recording writes to copies of caches."""

    def copied(self: Any, given: Any) -> Any:
        made = replays._Copied.like(given)
        made.takes(given)
        return made

    with patch.object(replays._Stretch, "_input", copied):
        return changed_weights()[0]
