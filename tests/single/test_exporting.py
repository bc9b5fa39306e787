"""Exported forwards give the model's numbers in other runtimes, and what cannot be exported is said."""

import copy

import onnx
import onnxruntime
import pytest
import torch
import transformers as hf

import zgraph
from tests.deep import deep
from zgraph.codegen import quantised
from zgraph.errors import CaptureError, InferenceError, UsageError
from zgraph.inference import exported_layers, exporting

SMALL = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64}
MODELS = {
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**SMALL, tie_word_embeddings=True)),
    "gpt2": lambda: hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=96, n_embd=32, n_layer=1, n_head=4, n_positions=96)),
    "bert": lambda: hf.BertModel(hf.BertConfig(**SMALL)),
}
ANY = {"input_ids": (0, 1), "attention_mask": (0, 1)}


class Tagger(torch.nn.Module):
    """Scores of three classes for each token."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.inner = torch.nn.Embedding(48, 16), torch.nn.Linear(16, 32)
        self.outer = torch.nn.Linear(32, 3)

    def forward(self, ids, scale=1.0):
        x = self.inner(self.table(ids)).relu()
        return self.outer(x) * scale, x.mean(-1)


def tokens(rows: int, length: int) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 48, (rows, length), generator=torch.Generator().manual_seed(rows))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def by_onnxruntime(path, given):
    """Outputs by name, with activations as they are."""
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    session = onnxruntime.InferenceSession(path, options)
    names = [found.name for found in session.get_outputs()]
    made = session.run(names, {name: tensor.numpy() for name, tensor in given.items()})
    return {name: torch.from_numpy(array) for name, array in zip(names, made, strict=True)}


def rounded(model):
    """A copy whose tables and linear layers have the numbers that their int8 stands for."""
    found = copy.deepcopy(model)
    with torch.no_grad():
        for module in found.modules():
            if isinstance(module, torch.nn.Linear | torch.nn.Embedding):
                data, scale = quantised.to_int8(module.weight, 1)
                module.weight.copy_(data.float() * scale)
    return found


@pytest.mark.parametrize("weights", [None, "int8"])
def test_onnxruntime_gives_the_numbers_of_the_model(tmp_path, weights):
    model, path = Tagger(), tmp_path / "new" / "model.onnx"
    zgraph.export_model(
        model, {"ids": torch.zeros(2, 3, dtype=torch.long)}, path, dynamic={"ids": (0, 1)}, weights=weights
    )
    given = {"ids": tokens(3, 7)["input_ids"]}
    with torch.no_grad():
        wanted = (rounded(model) if weights else model)(**given)
    found = by_onnxruntime(path, given)
    assert [*found] == ["output.0", "output.1"]
    for one, other in zip(found.values(), wanted, strict=True):
        assert torch.allclose(one, other, rtol=1e-5, atol=1e-6)
    graph = onnx.load(path).graph
    integers = sorted(
        tuple(t.dims) for t in graph.initializer if t.data_type == onnx.TensorProto.INT8 and len(t.dims) > 1
    )
    assert integers == ([(3, 32), (32, 16), (48, 16)] if weights else [])
    assert sum(node.op_type == "DequantizeLinear" for node in graph.node) == (2 if weights else 0)
    assert model.training
    assert [*path.parent.iterdir()] == [path]


@pytest.mark.parametrize("ending", [".pt2", deep(".onnx")])
@pytest.mark.parametrize("kind", ["llama", deep("gpt2"), deep("bert")])
@pytest.mark.parametrize("weights", [None, deep("int8")])
def test_models_of_transformers(tmp_path, kind, ending, weights):
    torch.manual_seed(0)
    model, path = MODELS[kind]().eval(), tmp_path / f"model{ending}"
    exporting.export_model(model, tokens(2, 7), path, dynamic=ANY, weights=weights)
    given = tokens(3, 20)
    own = exported_layers.in_int8(model, exported_layers.scaled) if weights else model
    with torch.no_grad():
        wanted = own(**given)
    found = by_onnxruntime(path, given) if ending == ".onnx" else torch.export.load(path).module()(**given)
    names = ["last_hidden_state", "pooler_output"] if kind == "bert" else ["logits"]
    assert [*found] == names
    for name in names:
        assert torch.allclose(found[name], wanted[name], rtol=1e-5, atol=1e-5)


def test_int8_of_a_copy_leaves_the_model_and_shares_what_stays():
    torch.manual_seed(0)
    model = MODELS["gpt2"]().eval()
    before = copy.deepcopy(model.state_dict())
    found = exported_layers.in_int8(model, exported_layers.scaled)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert found.transformer.ln_f.weight is model.transformer.ln_f.weight
    assert found.lm_head.data is found.transformer.wte.data
    given = tokens(2, 7)
    with torch.no_grad():
        error = (found(**given).logits - model(**given).logits).norm() / model(**given).logits.norm()
    assert 0 < error < 0.02


class Branches(torch.nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x


class Draws(torch.nn.Module):
    def forward(self, x):
        return x + torch.rand_like(x)


class Says(torch.nn.Module):
    def forward(self, x):
        return x * 2, "words"


class Halves(torch.nn.Module):
    def forward(self, x):
        return x.view(2, 3) * 2


class Jumps(torch.nn.Module):
    def forward(self, x):
        return x * 2 if x.shape[1] > 16 else x + 1


class Returns(torch.nn.Module):
    def forward(self, x):
        y = x + 1
        return {"given": x, "one": y, "two": y}


class SameName(torch.nn.Module):
    def forward(self, x):
        return {"x": x * 2}


class Twice(torch.nn.Module):
    """A layer with two names, whose weight is read, too."""

    def __init__(self) -> None:
        super().__init__()
        self.first = self.second = torch.nn.Linear(3, 3)

    def forward(self, x):
        return torch.nn.functional.linear(self.second(self.first(x)), self.first.weight)


X = {"x": torch.ones(2, 3)}
REFUSED = {
    "an ending": (Tagger, X, {"path": "model.bin"}, UsageError, "path must end in"),
    "int4": (Tagger, X, {"weights": "int4"}, UsageError, "load_quantised"),
    "bits": (Tagger, X, {"weights": "int3"}, UsageError, "None or int8"),
    "no inputs": (Halves, {}, {}, UsageError, "inputs are tensors"),
    "a list": (Halves, {"x": [1]}, {}, UsageError, "inputs are tensors"),
    "another name": (Halves, {"y": torch.ones(2, 3)}, {}, UsageError, "cannot be called with these inputs"),
    "a dim of another input": (Halves, X, {"dynamic": {"y": (0,)}}, UsageError, "dynamic has 'y'"),
    "a dim that is not there": (Halves, X, {"dynamic": {"x": (2,)}}, UsageError, "dim 2 of x"),
    "a dim of one": (Halves, {"x": torch.ones(1, 6)}, {"dynamic": {"x": (0,)}}, UsageError, "size 2 or more"),
    "a size that is fixed": (Halves, X, {"dynamic": {"x": (0,)}}, CaptureError, "x of other sizes"),
    "what depends on numbers": (Branches, X, {}, CaptureError, "cannot be exported"),
    "what is drawn": (Draws, X, {}, InferenceError, "away from the model's own"),
    "a branch on a size": (Jumps, X, {"dynamic": {"x": (1,)}}, CaptureError, "computes otherwise by size"),
    "one name": (SameName, X, {"path": "model.onnx"}, UsageError, "name of an input and of an output"),
    "bfloat16": (Jumps, {"x": X["x"].bfloat16()}, {"path": "model.onnx"}, UsageError, "in bfloat16"),
    "words": (Says, X, {}, InferenceError, "has a str"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_exported_is_said_and_nothing_is_written(tmp_path, case):
    make, inputs, options, kind, words = REFUSED[case]
    path = tmp_path / options.get("path", "model.pt2")
    with pytest.raises(kind, match=words):
        zgraph.export_model(make(), inputs, path, **{k: v for k, v in options.items() if k != "path"})
    assert not [*tmp_path.iterdir()]


def test_a_layer_with_two_names_is_in_int8_under_both(tmp_path):
    found = exported_layers.in_int8(Twice(), exported_layers.scaled)
    assert found.first is found.second
    assert found.first.data.dtype == torch.int8
    exporting.export_model(Twice(), X, tmp_path / "model.pt2", weights="int8")


@pytest.mark.parametrize("ending", [".pt2", deep(".onnx")])
def test_what_is_given_back_or_twice_is_an_output_of_its_own(tmp_path, ending):
    path = tmp_path / f"model{ending}"
    exporting.export_model(Returns(), X, path, dynamic={"x": (0,)})
    given = {"x": torch.rand(5, 3)}
    found = by_onnxruntime(path, given) if ending == ".onnx" else torch.export.load(path).module()(**given)
    assert torch.equal(found["given"], given["x"])
    assert torch.equal(found["one"], found["two"])


def test_what_infer_gives_is_refused(tmp_path):
    with pytest.raises(UsageError, match="pass the model that"):
        zgraph.export_model(zgraph.infer(Halves2()), X, tmp_path / "model.pt2")


class Halves2(torch.nn.Linear):
    def __init__(self) -> None:
        super().__init__(3, 2)
