"""Hugging Face's Trainer over sharded ranks: torchrun --nproc-per-node 2 examples/hf_trainer.py"""

from __future__ import annotations

import tempfile

import torch
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments

from zgraph.hf import Trainer  # was: from transformers import Trainer


class Counting(torch.utils.data.Dataset):
    """Rows that count up from a start, modulo the number of words."""

    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        row = (torch.arange(16) + index) % 64
        return {"input_ids": row, "labels": row}


def main() -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=64, use_cache=False
    )
    arguments = TrainingArguments(
        output_dir=tempfile.mkdtemp(),
        max_steps=20,
        per_device_train_batch_size=8,
        learning_rate=1e-2,
        logging_steps=5,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
        ddp_backend=None if torch.cuda.is_available() else "gloo",
    )
    Trainer(model=LlamaForCausalLM(config), args=arguments, train_dataset=Counting()).train()


if __name__ == "__main__":
    main()
