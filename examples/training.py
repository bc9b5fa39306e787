"""The work of each rank of the demo: train with zgraph, train the same with DDP, and measure every ZeRO stage."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import LlamaConfig, LlamaForCausalLM

import zgraph
from examples.launch import Rank
from examples.progress import Started, Stepped
from examples.text import sample_batch
from zgraph.compiler.report import Report

STAGES = (0, 1, 2, 3)
STEPS_TO_MEASURE = 3


@dataclass(frozen=True)
class Job:
    """Model and data of a run.

    Args:
        stage: the ZeRO stage to train with.
        num_steps: optimizer steps.
        tokens: the text.
        vocab_size: different tokens.
    """

    stage: int
    num_steps: int
    tokens: torch.Tensor
    vocab_size: int
    batch_size: int = 4
    seq_len: int = 64
    learning_rate: float = 2e-3


@dataclass(frozen=True)
class Built:
    """The model exists."""

    num_parameters: int


@dataclass(frozen=True)
class Measured:
    """Bytes of live storages on the first rank.

    Args:
        parameters: what the model holds.
        moments: what AdamW holds.
        gradients: what the parameters' `.grad` hold between the backward and the step.
    """

    parameters: int
    moments: int
    gradients: int

    @property
    def rest(self) -> int:
        return self.parameters + self.moments


@dataclass(frozen=True)
class Run:
    """A run has ended: each rank's losses, what it held, and what was compiled (nothing, for DDP)."""

    name: str
    stage: int | None
    losses: Sequence[Sequence[float]]
    measured: Measured
    report: Report | None


def build(job: Job, device: torch.device) -> LlamaForCausalLM:
    """A Llama with the same random weights on every call.

    It has as many key-value heads as heads: torch adds the gradients of grouped ones in another order when it captures
    a graph than when it runs eagerly, and then losses would equal DDP's to seven digits, not to the last bit.
    """
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=job.vocab_size,
        hidden_size=384,
        intermediate_size=1024,
        num_hidden_layers=6,
        num_attention_heads=6,
        num_key_value_heads=6,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        use_cache=False,
        bos_token_id=None,
        eos_token_id=None,
    )
    with device:
        return LlamaForCausalLM(config)


def work(rank: Rank, job: Job) -> None:
    """The demo on one rank. Events go to the launching program as they happen."""
    rank.tell(Built(sum(p.numel() for p in build(job, torch.device("meta")).parameters())))

    model = zgraph.compile(build(job, rank.device), stage=job.stage)
    name = f"zgraph, stage {job.stage}"
    rank.tell(_train(rank, job, name, model, job.num_steps, job.stage))
    del model
    torch.compiler.reset()

    ddp = nn.parallel.DistributedDataParallel(build(job, rank.device))
    rank.tell(_train(rank, job, "DDP, the same steps", ddp, job.num_steps, None))
    del ddp

    for stage in STAGES:
        if stage != job.stage:
            model = zgraph.compile(build(job, rank.device), stage=stage)
            name = f"zgraph, stage {stage}"
            rank.tell(_train(rank, job, name, model, min(STEPS_TO_MEASURE, job.num_steps), stage))
            del model
            torch.compiler.reset()


def _train(rank: Rank, job: Job, name: str, model: nn.Module, num_steps: int, stage: int | None) -> Run:
    rank.tell(Started(name, num_steps))
    optimizer = torch.optim.AdamW(model.parameters(), lr=job.learning_rate)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, job.learning_rate, total_steps=max(num_steps, 3))
    losses: list[float] = []
    gradients, since = 0, 0.0
    for step in range(num_steps):
        ids = sample_batch(job.tokens, job.batch_size, job.seq_len, step=step, rank=rank.index).to(rank.device)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        gradients = live_bytes(p.grad for p in model.parameters())
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        since = since or time.monotonic()  # the first step compiles; speed is measured from its end
        seconds = time.monotonic() - since
        rank.tell(Stepped(losses[-1], step * ids.numel() * rank.num_ranks / seconds if step else 0.0))
    measured = Measured(
        live_bytes(model.parameters()),
        live_bytes(value for state in optimizer.state.values() for value in state.values()),
        gradients,
    )
    everywhere: list[list[float]] = [[] for _ in range(rank.num_ranks)]
    dist.all_gather_object(everywhere, losses)
    return Run(name, stage, everywhere, measured, None if stage is None else zgraph.report(model))


def live_bytes(tensors: Iterable[torch.Tensor | None]) -> int:
    """Bytes of the storages behind `tensors` on this rank, each counted once."""
    storages: dict[int, int] = {}
    for tensor in tensors:
        if tensor is not None:
            storage = (tensor.to_local() if isinstance(tensor, DTensor) else tensor).untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())
