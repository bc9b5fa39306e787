"""Models used or changed in odd ways."""

from __future__ import annotations

import copy
import pickle

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.habit.nets import (
    CLASSES,
    HIDDEN,
    WIDTH,
    Classifier,
    Net,
    features,
    rows,
    tiny_llama,
    words,
)
from benchmarks.habit.side import Side, trained, values, whole
from benchmarks.habit.table import Found, Table
from benchmarks.habit.training import outside, training

TABLE = Table("modules")
habit = TABLE.habit


@habit("`model.forward(x)` in the place of `model(x)`")
def forward_itself(side: Side) -> Found:
    model = side.model(Net)
    return outside(side, model, model.forward)


class WithMethod(Net):
    def logits(self, x: Tensor) -> Tensor:
        return self.last(self.norm(self.first(x)))


@habit("another method than the forward is called: `model.logits(x)`")
def another_method(side: Side) -> Found:
    model = side.model(WithMethod)
    return outside(side, model, model.logits)


@habit("a part is called: `model.first(x)`")
def part_alone(side: Side) -> Found:
    model = side.model(Net)
    return outside(side, model, lambda x: model.last(model.norm(model.first(x))))


@habit("a part is called under `zgraph.gathered`, to look at its features")
def part_gathered(side: Side) -> Found:
    import zgraph

    model = side.model(Net)
    if not side.is_zgraph:
        return {"features": model.first(features(0)).detach()}
    with zgraph.gathered(model):
        return {"features": model.first(features(0)).detach()}


@habit("the compiled model as a part of another module that is not compiled")
def part_of_another(side: Side) -> Found:
    class Outer(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return F.cross_entropy(self.inner(x), y)

    model = Outer(side.model(Net))
    return training(side, model)


@habit("parts compiled one by one, the whole not")
def parts_compiled(side: Side) -> Found:
    torch.manual_seed(0)
    parts = nn.Sequential(nn.Linear(WIDTH, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, CLASSES))
    side.ready(parts[0])
    side.ready(parts[2])
    return outside(side, parts)


@habit("`torch.compile` around a call of a compiled model")
def compiled_again(side: Side) -> Found:
    model = side.model(Net)
    return outside(side, model, torch.compile(lambda x: model(x), backend="eager"))


@habit("`copy.deepcopy` of a compiled model, which trains on")
def deep_copy(side: Side) -> Found:
    model = side.copy(side.model(Classifier))
    return training(side, model)


@habit("`copy.copy` of a compiled model")
def shallow_copy(side: Side) -> Found:
    model = copy.copy(side.model(Classifier))
    return training(side, model)


@habit("`pickle.dumps(model)`")
def pickled(side: Side) -> Found:
    model = pickle.loads(pickle.dumps(side.model(Classifier)))
    return values(model)


@habit("`model.apply(init)`, after the model is compiled")
def applied(side: Side) -> Found:
    model = side.model(Classifier)

    def init(module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.constant_(module.weight, 0.02)
            module.bias.data.zero_()

    model.apply(init)
    return training(side, model)


@habit(
    "random initialisation after the model is compiled: `nn.init.normal_(p)`, by its spread (on processors torch warns "
    "that ranks may draw alike)",
    tolerance=0.3,
)
def random_init(side: Side) -> Found:
    model = side.model(Classifier)
    torch.manual_seed(7)
    nn.init.normal_(model.first.weight, std=0.1)
    return {"spread": float(whole(model.first.weight).std())}


@habit("`model.to(device)` and `model.cpu()`, of a model that is there")
def to_device(side: Side) -> Found:
    return training(side, side.model(Classifier).to("cpu").cpu())


@habit("`model.half()` after it is compiled")
def halved(side: Side) -> Found:
    model = side.model(Net).half()
    return {"out": model(features(0).half()).detach().float()}


@habit("`model.to(torch.bfloat16)` after it is compiled")
def to_dtype(side: Side) -> Found:
    model = side.model(Net).to(torch.bfloat16)
    return {"out": model(features(0).bfloat16()).detach().float()}


@habit("`model.double()` after it is compiled")
def doubled(side: Side) -> Found:
    model = side.model(Net).double()
    return {"out": model(features(0).double()).detach().float()}


@habit("`model.to_empty(device)` after it is compiled")
def emptied(side: Side) -> Found:
    model = side.model(Net)
    state = {n: whole(p) for n, p in model.state_dict().items()}
    model.to_empty(device="cpu")
    model.load_state_dict(state)
    return {"out": model(features(0)).detach()}


@habit("`model.share_memory()`")
def shared_memory(side: Side) -> Found:
    return training(side, side.model(Classifier).share_memory())


@habit("a new head after the model is compiled")
def new_head(side: Side) -> Found:
    model = side.model(Net)
    torch.manual_seed(1)
    model.last = nn.Linear(HIDDEN, 3)
    return {"out": model(features(0)).detach()}


@habit("a layer replaced by `nn.Identity()`")
def removed_layer(side: Side) -> Found:
    model = side.model(Net)
    model.norm = nn.Identity()
    return outside(side, model)


@habit("an activation replaced")
def replaced_activation(side: Side) -> Found:
    model = side.model(Net)
    model.act = nn.Tanh()
    return outside(side, model)


@habit("`resize_token_embeddings` after the model is compiled")
def resized(side: Side) -> Found:
    model = side.model(tiny_llama)
    model.resize_token_embeddings(40)
    return {"out": model(words(0)).logits.detach()}


@habit("`get_peft_model` before the model is compiled", package="peft")
def adapters_before(side: Side) -> Found:
    from peft import LoraConfig, get_peft_model

    def build() -> nn.Module:
        model = get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
        return model

    model = side.model(build)
    return trained(side, model, lambda step: model(input_ids=(ids := words(side.seed(step))), labels=ids).loss)


@habit("`get_peft_model` after the model is compiled", package="peft")
def adapters_after(side: Side) -> Found:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(side.model(tiny_llama), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    return {"out": model(words(0)).logits.detach()}


@habit("`weight_norm` before the model is compiled")
def weight_norm(side: Side) -> Found:
    def build() -> nn.Module:
        model = Classifier()
        nn.utils.parametrizations.weight_norm(model.last)
        return model

    return training(side, side.model(build))


@habit("`spectral_norm` before the model is compiled")
def spectral_norm(side: Side) -> Found:
    def build() -> nn.Module:
        model = Classifier()
        nn.utils.parametrizations.spectral_norm(model.last)
        return model

    return training(side, side.model(build))


@habit("`torch.nn.utils.prune` before the model is compiled")
def pruned_before(side: Side) -> Found:
    from torch.nn.utils import prune

    def build() -> nn.Module:
        model = Classifier()
        prune.l1_unstructured(model.first, "weight", amount=0.3)
        return model

    return training(side, side.model(build))


@habit("`torch.nn.utils.prune` after the model is compiled")
def pruned_after(side: Side) -> Found:
    from torch.nn.utils import prune

    model = side.model(Classifier)
    prune.l1_unstructured(model.first, "weight", amount=0.3)
    return training(side, model)


@habit("`torch.func.functional_call` with other weights")
def functional(side: Side) -> Found:
    model = side.model(Net)
    other = {n: 0.5 * p.detach() for n, p in model.named_parameters()}
    return {"out": torch.func.functional_call(model, other, (features(0),)).detach()}


@habit("MAML: an inner step with `functional_call` and `create_graph=True`")
def maml(side: Side) -> Found:
    model = side.model(Net)

    def loss(step: int) -> Tensor:
        x, y = rows(side.seed(step))
        names, params = zip(*model.named_parameters(), strict=True)
        inner = F.cross_entropy(model(x), y)
        grads = torch.autograd.grad(inner, params, create_graph=True)
        moved = {n: p - 0.1 * g for n, p, g in zip(names, params, grads, strict=True)}
        return F.cross_entropy(torch.func.functional_call(model, moved, (x + 0.1,)), y)

    return trained(side, model, loss)


@habit("gradients of each row: `torch.func.vmap(grad(...))`")
def rows_gradients(side: Side) -> Found:
    model = side.model(Net)
    params = {n: p.detach() for n, p in model.named_parameters()}

    def loss(params: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(model, params, (x[None],)).square().sum()

    found = torch.func.vmap(torch.func.grad(loss), (None, 0))(params, features(0))
    return {n: whole(g) for n, g in found.items()}
