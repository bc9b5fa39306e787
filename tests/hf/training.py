"""A small Llama and a Trainer of it, the same whatever its class."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.distributed as dist
import transformers
from torch.utils.data import Dataset

import small

ROWS, LENGTH, WORDS = 24, 12, 100


class Rows(Dataset):
    """Tokens, some of whose labels do not count: rows of different weight."""

    def __init__(self, count: int = ROWS) -> None:
        self.ids = torch.randint(WORDS, (count, LENGTH), generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        labels = self.ids[index].clone()
        labels[: index % 6] = -100
        return {"input_ids": self.ids[index], "labels": labels}


def padded(rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """A batch of rows cut to other lengths, which say what their first tokens are, as long as its longest."""
    kept = [LENGTH - int(row["input_ids"][0]) % 6 for row in rows]
    ids, labels = (torch.stack([row[key][: max(kept)] for row in rows]) for key in ("input_ids", "labels"))
    for line, length in zip(labels, kept, strict=True):
        line[length:] = -100
    return {"input_ids": ids, "labels": labels}


def llama() -> Any:
    torch.manual_seed(0)
    return small.llama(32, 1, WORDS, max_position_embeddings=32)


def adapted() -> Any:
    """A Llama whose own weights are frozen, with LoRA beside its queries and values."""
    lora = peft.LoraConfig(
        task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, lora_dropout=0.0
    )
    return peft.get_peft_model(llama(), lora)


def t5() -> Any:
    torch.manual_seed(0)
    return small.t5(32, 1, WORDS)


def arguments(folder: Path, **options: Any) -> Any:
    """Training arguments: six steps of two micro-batches of two rows."""
    chosen = {
        "output_dir": str(folder),
        "max_steps": 6,
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-2,
        "weight_decay": 0.1,
        "max_grad_norm": 0.5,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "ddp_backend": "gloo" if dist.is_initialized() else None,
    }
    return transformers.TrainingArguments(**{**chosen, **options})


def trainer(kind: Any, folder: Path, given: dict[str, Any] | None = None, **options: Any) -> Any:
    """A Trainer; `given` goes to it, all else to its arguments."""
    given = {"model": llama(), **(given or {})}
    return kind(args=arguments(folder, **options), train_dataset=Rows(), eval_dataset=Rows(8), **given)


def history(trained: Any, *keys: str) -> list[tuple[int, str, float]]:
    """What was logged under these keys, with the step."""
    return [(e["step"], k, e[k]) for e in trained.state.log_history for k in keys if k in e]


def same(found: list[tuple[int, str, float]], expected: list[tuple[int, str, float]], rel: float = 1e-5) -> None:
    """The same keys at the same steps, with the same values."""
    assert [e[:2] for e in found] == [e[:2] for e in expected]
    assert [e[2] for e in found] == pytest.approx([e[2] for e in expected], rel=rel)
