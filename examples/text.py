"""Real text from Python's own standard library, and a tokenizer trained on it: nothing is downloaded."""

from __future__ import annotations

import sysconfig
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

SOURCE_BYTES = 1_000_000


@dataclass(frozen=True)
class Corpus:
    """Text as tokens.

    Args:
        tokens: the whole text, int64 of one dimension.
        num_bytes: the length of the text.
    """

    tokens: torch.Tensor
    num_bytes: int


def load_corpus(vocab_size: int) -> Corpus:
    """Python's manual and sources of its library, split by a byte-level BPE of `vocab_size` tokens trained on them."""
    documents = [*manual(), *library_sources(SOURCE_BYTES)]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(documents, trainer)
    ids = [token for encoding in tokenizer.encode_batch(documents) for token in encoding.ids]
    return Corpus(torch.tensor(ids), sum(len(document.encode()) for document in documents))


def manual() -> list[str]:
    """The topics of Python's manual, in the order of their names."""
    return [topics[name] for name in sorted(topics)]


def library_sources(max_bytes: int) -> list[str]:
    """Modules of the standard library, in the order of their names, up to `max_bytes` in all."""
    found = []
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        text = path.read_text(encoding="utf-8", errors="replace")
        max_bytes -= len(text.encode())
        if max_bytes < 0:
            break
        found.append(text)
    return found


def sample_batch(tokens: torch.Tensor, batch_size: int, seq_len: int, *, step: int, rank: int) -> torch.Tensor:
    """Windows of the text, `batch_size` x `seq_len`: the same for the same step and rank, whoever asks."""
    generator = torch.Generator().manual_seed(1_000 * step + rank)
    starts = torch.randint(0, len(tokens) - seq_len, (batch_size,), generator=generator)
    return torch.stack([tokens[start : start + seq_len] for start in starts.tolist()])
