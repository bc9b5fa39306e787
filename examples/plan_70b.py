"""Memory and time of a 70-billion-parameter model on 64 GPUs, from a laptop: python examples/plan_70b.py

Nothing is allocated: the model is on the meta device, and the hardware is a profile.
"""

from __future__ import annotations

import argparse

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import zgraph


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hardware", default="8x8-h100", help="hosts, devices of each, and a profile")
    parser.add_argument("--layers", type=int, default=80)
    asked = parser.parse_args()
    config = LlamaConfig(
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=asked.layers,
        num_attention_heads=64,
        num_key_value_heads=8,
        vocab_size=128256,
        max_position_embeddings=8192,
        use_cache=False,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
        tokens = torch.zeros(1, 4096, dtype=torch.long)
    plan = zgraph.plan(
        model, input_ids=tokens, labels=tokens, hardware=asked.hardware, param_dtype=torch.bfloat16, stage=(2, 3)
    )
    print(plan)
    if plan.best is None:
        raise SystemExit(3)


if __name__ == "__main__":
    main()
