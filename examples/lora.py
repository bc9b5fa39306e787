"""LoRA with the frozen weights sharded: torchrun --nproc-per-node 2 examples/lora.py"""

from __future__ import annotations

import tempfile

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

import zgraph


def main() -> None:
    zgraph.init_distributed()
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=64, use_cache=False
    )
    adapter = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj"])
    model = get_peft_model(LlamaForCausalLM(config), adapter).to("cuda" if torch.cuda.is_available() else "cpu")
    model = zgraph.compile(model, stage=3)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=2e-2)
    rows = ((torch.arange(16) + torch.arange(8)[:, None]) % 64).to(model.device)
    for step in range(30):
        loss = model(input_ids=rows, labels=rows).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 9 and rank() == 0:
            print(f"step {step + 1}: loss {loss.item():.4f}", flush=True)
    state = {name: whole(p) for name, p in model.named_parameters() if p.requires_grad}  # all ranks gather
    if rank() == 0:
        torch.save(state, f"{tempfile.mkdtemp()}/adapter.pt")
        print(f"saved {len(state)} tensors of the adapter, {sum(t.numel() for t in state.values()):,} numbers")


def whole(parameter: torch.Tensor) -> torch.Tensor:
    """A parameter gathered from its shards; all ranks call it."""
    found = parameter.detach()
    return found.full_tensor() if hasattr(found, "full_tensor") else found


def rank() -> int:
    """This process's rank; 0 without a launcher."""
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


if __name__ == "__main__":
    main()
