"""Runs of small models whose graphs are given faults: every stage, one and two mesh axes, and each kind of recipe."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
import transformers as hf
from torch import nn

from zgraph.capture.deep import capture_deep
from zgraph.cost import hardware
from zgraph.cost.table import CostTable
from zgraph.ir import Axis, DType, Graph, InputKind
from zgraph.passes import RECIPES, Context, fusing, parse_recipe
from zgraph.runfile.format import Provenance, Recording, RunFile

CLUSTER = CostTable(hardware=hardware("8x8-h100"), per_host=8)
LINE, SQUARE = (Axis("shard", 2),), (Axis("replicate", 2), Axis("shard", 2))


class Norms(nn.Module):
    """Convolutions with batch norms, whose buffers change in the forward."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)
        self.norm, self.other = nn.BatchNorm2d(8), nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.first(x)).relu()
        x = self.other(self.second(x)).relu()
        return self.head(x.mean((2, 3))).square().mean()


class Drops(nn.Module):
    """Linear layers with dropouts of one shape."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(32, 32) for _ in range(4))
        self.first, self.second = nn.Dropout(0.1), nn.Dropout(0.2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(torch.tanh(self.layers[0](x)))
        x = self.second(torch.tanh(self.layers[1](x)))
        a, b = self.layers[2](x), self.layers[3](x)
        return (self.first(a) + self.first(b)).square().mean()


def llama(**options: Any) -> nn.Module:
    config = hf.LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
        use_cache=False,
        **options,
    )
    return hf.LlamaForCausalLM(config)


def _tokens() -> dict[str, torch.Tensor]:
    ids = torch.zeros(2, 8, dtype=torch.int64)
    return {"input_ids": ids, "labels": ids}


@dataclass(frozen=True)
class Subject:
    """A model and how it is compiled; `fit` is what the recipe has in the place of that pass."""

    model: Callable[[], nn.Module]
    inputs: Callable[[], dict[str, torch.Tensor]]
    stage: int
    mesh: tuple[Axis, ...] = LINE
    mixed: bool = False
    fused: bool = False
    offload: str = ""
    reduce_dtype: DType | None = None
    fit: str = "fit"
    context: tuple[tuple[str, Any], ...] = ()

    def run(self) -> RunFile:
        with torch.device("meta"):
            model, inputs = self.model(), self.inputs()
        graph, how = capture_deep(model, inputs, torch.bfloat16 if self.mixed else None)
        graph = replace(
            graph,
            inputs=tuple(
                replace(i, offload=self.offload, master=i.master or i.value.tensor.dtype)
                if self.offload and i.kind is InputKind.param
                else i
                for i in graph.inputs
            ),
        )
        recipe = RECIPES[self.stage].replace("fit", self.fit)
        recipe = fusing(recipe) if self.fused else recipe
        context = Context(mesh=self.mesh, costs=CLUSTER, reduce_dtype=self.reduce_dtype, **dict(self.context))
        recording = Recording(graph)
        parse_recipe(recipe).run(graph, context, [recording])
        return recording.run_file(Provenance(model="", torch=torch.__version__, captured=how), context)


def _images() -> dict[str, torch.Tensor]:
    return {"x": torch.zeros(2, 3, 8, 8)}


def _rows() -> dict[str, torch.Tensor]:
    return {"x": torch.zeros(4, 32)}


AS_ON_GPUS = (("groups_calls", True), ("keeps_blocks", True))

SUBJECTS: dict[str, Subject] = {
    "llama, stage 0": Subject(llama, _tokens, 0),
    "llama, stage 0, two axes": Subject(llama, _tokens, 0, SQUARE, mixed=True, reduce_dtype=DType.f32),
    "tied llama, stage 1, two axes": Subject(lambda: llama(tie_word_embeddings=True), _tokens, 1, SQUARE, mixed=True),
    "llama, stage 1": Subject(llama, _tokens, 1, context=AS_ON_GPUS),
    "llama, stage 2, fused": Subject(llama, _tokens, 2, fused=True),
    "llama, stage 2, recomputed": Subject(llama, _tokens, 2, context=(("recomputes", "always"),)),
    "llama, stage 3": Subject(llama, _tokens, 3),
    "tied llama, stage 3, as on GPUs": Subject(
        lambda: llama(tie_word_embeddings=True), _tokens, 3, SQUARE, mixed=True, context=AS_ON_GPUS
    ),
    "llama, stage 3, recomputed": Subject(llama, _tokens, 3, context=(*AS_ON_GPUS, ("recomputes", "always"))),
    "llama, stage 3, activations on the host": Subject(llama, _tokens, 3, fit="offload(num_bytes=20000,min_bytes=1)"),
    "llama, stage 3, parameters on the host": Subject(llama, _tokens, 3, mixed=True, offload="parameters"),
    "llama, stage 2, optimizer on the host": Subject(llama, _tokens, 2, mixed=True, offload="optimizer"),
    "tied llama, stage 3, fused": Subject(
        lambda: llama(tie_word_embeddings=True), _tokens, 3, mixed=True, fused=True, context=AS_ON_GPUS
    ),
    "norms, stage 1": Subject(Norms, _images, 1),
    "norms, stage 3, two axes": Subject(Norms, _images, 3, SQUARE, context=(("recomputes", "always"),)),
    "drops, stage 2, recomputed": Subject(Drops, _rows, 2, context=(("recomputes", "always"),)),
    "drops, stage 3, fused": Subject(Drops, _rows, 3, fused=True),
}


@cache
def run(name: str) -> RunFile:
    """The run of a subject."""
    return SUBJECTS[name].run()


@cache
def steps(name: str) -> tuple[tuple[str, Graph], ...]:
    """The graphs of a subject's run, each with the pass that made it."""
    found = run(name)
    return tuple((each.partition("#")[0], found.graph(each)) for each in found.names)
