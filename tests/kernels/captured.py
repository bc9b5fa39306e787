"""The kernels that the fusion pass makes of captured models; those with an operand `acc` are epilogues of matmuls."""

from functools import cache

import torch

import small
import zgraph
from zgraph.codegen.spec import KernelSpec
from zgraph.ir.external_ops import MATMUL, ROWS
from zgraph.passes import Context, parse_recipe


@cache
def of_small_models() -> dict[str, KernelSpec]:
    """Each different kernel of a Llama, a ViT, a T5 and a GPT-2, in fp32 and bf16."""
    ids = torch.zeros(2, 16, dtype=torch.int64)
    images = {"pixel_values": torch.zeros(2, 3, 32, 32), "labels": torch.zeros(2, dtype=torch.int64)}
    words = {"input_ids": ids, "labels": ids}
    found: dict[str, KernelSpec] = {}
    models = (
        (small.llama(32, 2, 50), words),
        (small.vit(32, 2), images),
        (small.t5(32, 1, 50), words),
        (small.gpt2(32, 1, 50), words),
    )
    for model, inputs in models:
        for dtype in (None, torch.bfloat16):
            cast = {k: v.to(dtype) if dtype and v.is_floating_point() else v for k, v in inputs.items()}
            found.update(_kernels(model, cast, dtype))
    return found


@cache
def of_demo() -> dict[str, KernelSpec]:
    """Those of one layer and the head of the Llama that `make demo` trains."""
    with torch.device("meta"):
        model = small.llama(384, 1, 256, num_heads=6, num_kv_heads=6, inner=1024, tie_word_embeddings=True)
    ids = torch.zeros(2, 128, dtype=torch.int64)
    return _kernels(model, {"input_ids": ids, "labels": ids}, None)


@cache
def of_llama_8b() -> dict[str, KernelSpec]:
    """Those of one layer and the head of Llama-3 8B at 4,096 tokens."""
    with torch.device("meta"):
        model = small.llama(4096, 1, 128_256, num_heads=32, num_kv_heads=8, inner=14_336)
    ids = torch.zeros(1, 4096, dtype=torch.int64)
    return _kernels(model, {"input_ids": ids, "labels": ids}, torch.bfloat16)


def _kernels(model: torch.nn.Module, inputs: dict, dtype: torch.dtype | None) -> dict[str, KernelSpec]:
    torch.compiler.reset()
    traced = zgraph.trace(model.train(), **inputs, param_dtype=dtype)
    graphs = [parse_recipe(f"canonicalize,fuse(matmuls={m})").run(traced, Context()) for m in ("never", "always")]
    texts = [str(n.args[-1]) for graph in graphs for n in graph.nodes if n.op in (ROWS, MATMUL)]
    return {text: KernelSpec.parse(text) for text in texts}
