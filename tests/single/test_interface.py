"""Inputs and outputs: any arguments, any outputs, and the decorator."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree
from transformers.modeling_outputs import CausalLMOutputWithPast

import zgraph
from small import llama
from zgraph.errors import UsageError

from .nets import Mlp, built, dice, rows


class Pair(NamedTuple):
    left: torch.Tensor
    right: Any


class Nested(nn.Module):
    """Takes and gives nested things."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(
        self, batch: dict[str, Any], *more: torch.Tensor, scale: float = 1.0, label: str = "a", mask: Any = None
    ) -> dict[str, Any]:
        hidden = self.layer(batch["x"][0]) * scale + batch["x"][1]["deep"]
        for extra in more:
            hidden = hidden + extra
        if mask is not None:
            hidden = hidden * mask
        if label == "b":
            hidden = -hidden
        return {"loss": hidden.square().mean(), "list": [hidden, Pair(hidden.sum(0), None)], "label": label, "n": 3}


CALLS: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
    "plain": ((), {}),
    "scalar": ((), {"scale": 2.5}),
    "text": ((), {"label": "b"}),
    "more": ((torch.ones(4), torch.full((2, 4), 0.5)), {"mask": torch.tensor([1.0, 0.0, 1.0, 1.0])}),
}


@pytest.mark.parametrize("case", CALLS)
def test_nested_inputs_and_outputs(case: str) -> None:
    args, kwargs = CALLS[case]
    plain, model = built(Nested), zgraph.compile(built(Nested))
    found = []
    for net in (plain, model):
        source = dice(3)
        batch = {"x": (torch.randn(2, 4, generator=source), {"deep": torch.randn(4, generator=source)}), "unused": 1}
        output = net(batch, *args, **kwargs)
        (output["loss"] + output["list"][1].left.sum()).backward()
        found.append((output, [p.grad for p in net.parameters()]))
    (expected, theirs), (output, ours) = found
    assert all(torch.equal(a, b) for a, b in zip(theirs, ours, strict=True))
    values, shape = pytree.tree_flatten(output)
    expected_values, expected_shape = pytree.tree_flatten(expected)
    assert shape == expected_shape
    for value, wanted in zip(values, expected_values, strict=True):
        assert torch.equal(value, wanted) if isinstance(wanted, torch.Tensor) else value == wanted


def test_scalars_may_change_from_call_to_call() -> None:
    plain, model = built(Nested), zgraph.compile(built(Nested))
    batch = {"x": (torch.randn(2, 4), {"deep": torch.randn(4)})}
    for scale in (1.0, 0.5, 3.0, 0.25):
        assert torch.equal(model(batch, scale=scale)["loss"], plain(batch, scale=scale)["loss"])


def test_a_model_output() -> None:
    plain, model = (built(lambda: llama(32, 1, 61)) for _ in range(2))
    model = zgraph.compile(model, stage=3)
    ids = torch.randint(61, (2, 7))
    output, expected = model(input_ids=ids, labels=ids), plain(input_ids=ids, labels=ids)
    assert isinstance(output, CausalLMOutputWithPast)
    assert output.keys() == expected.keys()
    assert torch.equal(output.logits, expected.logits)
    output.loss.backward()
    expected.loss.backward()
    assert torch.equal(model.lm_head.weight.grad, plain.lm_head.weight.grad)


def test_gradients_flow_into_inputs() -> None:
    plain, model = built(Mlp).eval(), zgraph.compile(built(Mlp)).eval()
    x, y = rows(0)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    model(ours * 2, y).backward()
    plain(theirs * 2, y).backward()
    assert torch.equal(ours.grad, theirs.grad)


def test_the_model_stays_what_it_was() -> None:
    plain = built(Mlp)
    model = zgraph.compile(plain, stage=3)
    assert model is plain
    assert type(model) is Mlp
    assert list(model.state_dict()) == list(built(Mlp).state_dict())
    assert [n for n, _ in model.named_modules()] == [n for n, _ in built(Mlp).named_modules()]


@dataclass
class Config:
    width: int


@zgraph.compile(stage=2)
class Decorated(nn.Module):
    """A class whose instances are compiled as they are made."""

    def __init__(self, config: Config, *, bias: bool = True) -> None:
        super().__init__()
        self.layer = nn.Linear(config.width, 3, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x).square().sum()


class Child(Decorated):
    """Makes more parameters after its parent's __init__ is over."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.more = nn.Linear(3, 1)


def test_the_class_decorator() -> None:
    assert isinstance(Decorated, type)
    assert Decorated.__name__ == "Decorated"
    assert Decorated.__doc__ == "A class whose instances are compiled as they are made."
    model = Decorated(Config(4), bias=False)
    assert [n for n, _ in model.named_parameters()] == ["layer.weight"]
    assert "partition(stage=2)" in zgraph.report(model).recipe
    x = torch.randn(2, 4)
    model(x).backward()
    plain = model.layer.weight.detach().clone().requires_grad_()
    (x @ plain.t()).square().sum().backward()
    assert torch.allclose(model.layer.weight.grad, plain.grad, rtol=1e-6)
    assert len(zgraph.report(model).entries) == 1


def test_subclasses_of_a_decorated_class_are_left_alone() -> None:
    with pytest.raises(UsageError, match="is not compiled"):
        zgraph.report(Child(Config(4)))


def test_the_decorator_on_an_instance() -> None:
    model = zgraph.compile(stage=1)(built(Mlp))
    assert "partition(stage=1)" in zgraph.report(model).recipe
    model(*rows(0)).backward()


def test_two_models_of_one_class_do_not_mix() -> None:
    first, second = zgraph.compile(built(Mlp)), zgraph.compile(Mlp())
    plain = built(Mlp)
    plain.load_state_dict(copy.deepcopy(second.state_dict()))
    for net in (first, second, plain):
        torch.manual_seed(0)
        net(*rows(1)).backward()
    assert torch.equal(second.last.weight.grad, plain.last.weight.grad)
    assert not torch.equal(first.last.weight.grad, plain.last.weight.grad)


class Drawing(nn.Module):
    """Its forward generates; a hook turns gradients on, and does more."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.linear.register_forward_hook(lambda module, inputs, output: output.requires_grad_(True) * 2)

    def generate(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.linear(x))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.generate(x).sum()


def test_a_model_may_have_a_generate_and_hooks_of_its_own() -> None:
    model = built(Drawing)
    x = rows(0)[0][:, :4]
    expected = copy.deepcopy(model)(x)
    assert zgraph.compile(model)(x).item() == pytest.approx(expected.item())


def test_a_layer_without_shapes_is_named() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.LazyLinear(2))
    with pytest.raises(UsageError, match=r"parameter 1\.weight has no shape yet.*Call the model once"):
        zgraph.compile(model)
    model(torch.ones(2, 4))
    zgraph.compile(model)(torch.ones(2, 4)).sum().backward()
