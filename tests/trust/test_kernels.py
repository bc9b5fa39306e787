"""Kernels are compared by their specification with the ops in whose place they stand."""

import re
from collections.abc import Callable
from dataclasses import replace
from functools import cache

import pytest
import torch
import transformers as hf
from torch import nn

from tests.deep import DEEP
from zgraph.certify.certificate import certify
from zgraph.errors import VerifyError
from zgraph.estimate.trace import traced
from zgraph.ir import DType, Graph, Node
from zgraph.passes import RECIPES, fusing, parse_recipe
from zgraph.runfile.format import RunFile

SMALL = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 32, "vocab_size": 64, "use_cache": False}


class LossOnly(nn.Module):
    """A language model that returns its loss alone, so that the logits can stay inside of it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids=ids, labels=ids).loss


class Blocks(nn.Module):
    """Norms, dropouts, biases and activations of several kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.last = nn.LayerNorm(32), nn.LayerNorm(32)
        self.up, self.gate, self.down = nn.Linear(32, 64), nn.Linear(32, 64), nn.Linear(64, 32)
        self.drop, self.other = nn.Dropout(0.1), nn.Dropout(0.1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for activation in (nn.functional.gelu, nn.functional.silu, torch.relu, torch.tanh):
            h = self.norm(x)
            h = self.drop(activation(self.up(h))) * self.gate(h).sigmoid()
            x = self.last(x + self.other(self.down(h)))
        return torch.softmax(x, dim=-1).square().mean()


def llama(**options: object) -> nn.Module:
    return hf.LlamaForCausalLM(hf.LlamaConfig(**SMALL, intermediate_size=64, **options))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "llama": llama,
    "tied": lambda: llama(tie_word_embeddings=True),
    "loss only": lambda: LossOnly(llama()),
    "gpt2": lambda: hf.GPT2LMHeadModel(hf.GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=64, use_cache=False)),
    "neox": lambda: hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**SMALL, intermediate_size=64)),  # turns part of the columns
    "phi3": lambda: hf.Phi3ForCausalLM(hf.Phi3Config(**SMALL, intermediate_size=64, pad_token_id=0)),
    "blocks": Blocks,
}


@cache
def run(name: str, matmuls: str = "auto", mixed: bool = False) -> RunFile:
    with torch.device("meta"):
        model = MODELS[name]()
        ids = torch.zeros(2, 8, dtype=torch.int64)
        inputs = (
            {"x": torch.zeros(2, 8, 32)}
            if name == "blocks"
            else {"ids": ids}
            if name == "loss only"
            else {
                "input_ids": ids,
                "labels": ids,
            }
        )
    recipe = fusing(RECIPES[3]).replace("fuse", f"fuse(matmuls={matmuls})")
    return traced(
        model,
        inputs,
        parse_recipe(recipe),
        hardware="8x8-h100",
        num_ranks=2,
        param_dtype=torch.bfloat16 if mixed else None,
    )


def steps_of(found: RunFile) -> list[tuple[str, Graph]]:
    return [(name.partition("#")[0], found.graph(name)) for name in found.names]


CASES = [(name, matmuls, mixed) for name in MODELS for matmuls in ("never", "always") for mixed in (False, True)]
if not DEEP:
    CASES = [case for number, case in enumerate(CASES) if number % 4 in (number // 4 % 4, 2)]


@pytest.mark.parametrize(("name", "matmuls", "mixed"), CASES)
def test_what_fuse_makes_is_certified(name, matmuls, mixed):
    found = run(name, matmuls, mixed)
    assert any(n.op.startswith("zgraph.") for n in found.graph("fuse").nodes)
    made = certify(steps_of(found), found.context)
    assert "kernels by their specification" in {c.rule for c in made.checked}


Change = Callable[[Node], Node | None]


def text(pattern: str, new: str) -> Change:
    """Another kernel text."""

    def change(node: Node) -> Node | None:
        if not isinstance(node.args[-1], str):
            return None
        made = re.sub(pattern, new, node.args[-1], count=1)
        return None if made == node.args[-1] else replace(node, args=(*node.args[:-1], made))

    return change


def swapped_inputs(node: Node) -> Node | None:
    if node.op != "zgraph.rows.default" or not isinstance(given := node.args[0], tuple) or len(given) < 2:
        return None
    first, second, *others = given
    return None if first.type != second.type else replace(node, args=((second, first, *others), node.args[1]))


def of(op: str, change: Callable[[Node], tuple]) -> Change:
    return lambda node: replace(node, args=change(node)) if node.op.startswith(op) else None


def narrow(node: Node) -> Node | None:
    if node.op != "zgraph.rows.default":
        return None
    made = re.sub(r"-> (\w+) f32", r"-> \1 bf16", str(node.args[1]))
    kind = replace(node.results[0].tensor, dtype=DType.bf16)
    return replace(node, args=(node.args[0], made), results=(replace(node.results[0], type=kind), *node.results[1:]))


FAULTS: dict[str, tuple[str, str, Change]] = {
    "a constant of gelu": ("gpt2", "never", text(r"0\.044715", "0.44715")),
    "a factor": ("blocks", "never", text(r"0\.7071067811865476", "0.7071067811865475")),
    "an activation": ("llama", "never", text("sigmoid", "tanh")),
    "a difference turned round": ("llama", "never", text(r"sub\(1\.0, (\w+)\)", r"sub(\1, 1.0)")),
    "a sum in the place of a product": ("llama", "never", text(r" mul\(", " add(")),
    "the mean's divisor": ("llama", "never", text(r"0\.03125", "0.0625")),
    "epsilon": ("llama", "never", text(r"1e-06", "1e-05")),
    "what a dropout keeps": ("gpt2", "never", text(r"1\.1111111111111112", "2.2222222222222223")),
    "a dropout's probability": ("gpt2", "never", text(r"less\(0\.1,", "less(0.2,")),
    "two inputs": ("llama", "never", swapped_inputs),
    "rotary turned back": ("llama", "never", of("zgraph.rotary", lambda n: (*n.args[:-1], not n.args[-1]))),
    "cosines and sines": (
        "llama",
        "never",
        of("zgraph.rotary", lambda n: (n.args[0], n.args[2], n.args[1], *n.args[3:])),
    ),
    "a sum for a mean": ("llama", "never", of("zgraph.cross_entropy.", lambda n: (*n.args[:-1], False))),
    "a sum for a mean in the backward": (
        "llama",
        "never",
        of("zgraph.cross_entropy_b", lambda n: (*n.args[:-1], False)),
    ),
    "what is ignored": ("loss only", "never", of("zgraph.linear_cross_entropy.", lambda n: (*n.args[:-2], 0, True))),
    "what is ignored in the backward": (
        "loss only",
        "never",
        of("zgraph.linear_cross_entropy_b", lambda n: (*n.args[:-2], 0, True)),
    ),
    "the end of a matmul": ("blocks", "always", text(r"add\(acc, (\w+)\)", r"sub(acc, \1)")),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_another_kernel_is_refused(fault):
    name, matmuls, change = FAULTS[fault]
    with pytest.raises(VerifyError, match=r"after fuse.*\[kernels by their specification\]"):
        refused(name, matmuls, change)


def refused(name: str, matmuls: str, change: Change) -> None:
    """Certify a run whose first kernel that a change fits is changed."""
    found = run(name, matmuls)
    steps = steps_of(found)
    at = next(i for i, (step, _) in enumerate(steps) if step == "fuse")
    nodes = list(steps[at][1].nodes)
    position, made = next((i, new) for i, n in enumerate(nodes) if n.op.startswith("zgraph.") and (new := change(n)))
    nodes[position] = made
    certify([*steps[:at], ("fuse", steps[at][1].with_nodes(nodes))], found.context)


def test_two_dropouts_do_not_share_a_seed():
    found = run("gpt2", "never")
    steps = steps_of(found)
    at = next(i for i, (step, _) in enumerate(steps) if step == "fuse")
    graph = steps[at][1]
    first, second, *_ = (n.results[0] for n in graph.nodes if n.op == "zgraph.seed.default")
    nodes = [n.substitute({second.name: first}) for n in graph.nodes]
    with pytest.raises(VerifyError, match="kernels by their specification"):
        certify([*steps[:at], ("fuse", graph.with_nodes(nodes))], found.context)


def test_what_was_not_rounded_before_stays_so():
    """A kernel may round less than the ops that it stands for, and never more."""
    found = run("llama", "never")
    graph = found.graph("fuse")
    nodes = list(graph.nodes)
    position, made = next((i, made) for i, n in enumerate(nodes) if (made := narrow(n)) is not None)
    wide = nodes[position].results[0]
    back = replace(wide, name=f"{wide.name}_wide")
    cast = Node("aten._to_copy.default", made.results[:1], (back,), (("dtype", DType.f32),), made.phase)
    nodes[position:] = [made, cast, *(n.substitute({wide.name: back}) for n in nodes[position + 1 :])]
    steps = steps_of(found)
    steps = steps[: next(i for i, (step, _) in enumerate(steps) if step == "fuse")]
    foreign = {**graph.foreign, "aten._to_copy.default": found.graph("captured").foreign["aten._to_copy.default"]}
    with pytest.raises(VerifyError, match="rounds to bf16 what was not rounded"):
        certify([*steps, ("fuse", replace(graph, nodes=tuple(nodes), foreign=foreign))], found.context)
