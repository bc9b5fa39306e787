"""Ways to make a loss."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed.nn.functional as dist_functional
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.habit.nets import (
    CLASSES,
    HIDDEN,
    WIDTH,
    Classifier,
    Language,
    Net,
    features,
    next_word,
    rows,
    words,
)
from benchmarks.habit.side import Side, gradients, numbered, trained, values
from benchmarks.habit.table import Found, Table

TABLE = Table("losses")
habit = TABLE.habit


@habit("the loss within the forward")
def loss_in_forward(side: Side) -> Found:
    model = side.model(Classifier)
    return trained(side, model, lambda step: model(*rows(side.seed(step))))


@habit("the loss outside of the model")
def loss_outside(side: Side) -> Found:
    model = side.model(Net)

    def loss(step: int) -> Tensor:
        x, y = rows(side.seed(step))
        return F.cross_entropy(model(x), y, label_smoothing=0.1)

    return trained(side, model, loss)


@habit("a penalty over all parameters beside the loss: `sum(p.pow(2).sum() for p in model.parameters())`")
def penalty(side: Side) -> Found:
    model = side.model(Net)

    def loss(step: int) -> Tensor:
        x, y = rows(side.seed(step))
        decay = sum(p.pow(2).sum() for p in model.parameters())
        return F.cross_entropy(model(x), y) + 1e-2 * decay

    return trained(side, model, loss)


@habit("the same with `.full_tensor()` of the penalty, where it is a DTensor")
def penalty_made_whole(side: Side) -> Found:
    model = side.model(Net)

    def loss(step: int) -> Tensor:
        x, y = rows(side.seed(step))
        decay = sum(p.pow(2).sum() for p in model.parameters())
        return F.cross_entropy(model(x), y) + 1e-2 * getattr(decay, "full_tensor", lambda: decay)()

    return trained(side, model, loss)


@habit("an L1 penalty on one layer's weight")
def penalty_on_a_layer(side: Side) -> Found:
    model = side.model(Net)

    def loss(step: int) -> Tensor:
        x, y = rows(side.seed(step))
        return F.cross_entropy(model(x), y) + 1e-2 * model.first.weight.abs().mean()

    return trained(side, model, loss)


class TwoHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(WIDTH, HIDDEN)
        self.sort, self.size = nn.Linear(HIDDEN, CLASSES), nn.Linear(HIDDEN, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        hidden = torch.relu(self.body(x))
        return {"sort": self.sort(hidden), "size": self.size(hidden)}


@habit("several losses, weighted and summed")
def several_losses(side: Side) -> Found:
    model = side.model(TwoHeads)

    def loss(step: int) -> Tensor:
        x, y = rows(side.seed(step))
        out = model(x)
        return F.cross_entropy(out["sort"], y) + 0.3 * F.mse_loss(out["size"][:, 0], x.sum(-1))

    return trained(side, model, loss)


@habit("a head without a loss: its parameters have no gradient")
def head_without_loss(side: Side) -> Found:
    model = side.model(TwoHeads)

    def loss(step: int) -> Tensor:
        x, y = rows(side.seed(step))
        return F.cross_entropy(model(x)["sort"], y)

    return trained(side, model, loss)


@habit("weights of several losses that are learned, as parameters of the model")
def learned_weights(side: Side) -> Found:
    class Weighted(TwoHeads):
        def __init__(self) -> None:
            super().__init__()
            self.logs = nn.Parameter(torch.zeros(2))

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            out = super().forward(x)
            both = torch.stack([F.cross_entropy(out["sort"], y), out["size"].square().mean()])
            return (both * torch.exp(-self.logs) + self.logs).sum()

    model = side.model(Weighted)
    return trained(side, model, lambda step: model(*rows(side.seed(step))))


@habit("a backward for each loss, the first with `retain_graph=True`")
def backward_for_each_loss(side: Side) -> Found:
    model = side.model(TwoHeads)
    losses = []
    for step in range(3):
        x, y = rows(side.seed(step))
        out = model(x)
        first, second = F.cross_entropy(out["sort"], y), out["size"].square().mean()
        first.backward(retain_graph=True)
        second.backward()
        losses += [first.detach(), second.detach()]
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= 0.1 * parameter.grad
                parameter.grad = None
    return {**numbered(losses), **values(model)}


@habit("`backward` of a vector, with a gradient for it")
def backward_of_a_vector(side: Side) -> Found:
    model = side.model(Net)
    x, _ = rows(side.seed(0))
    out = model(x)
    out.backward(torch.linspace(-1, 1, out.numel()).view_as(out))
    return gradients(model)


@habit("a contrastive loss: the model twice, one loss")
def contrastive(side: Side) -> Found:
    model = side.model(Net)

    def loss(step: int) -> Tensor:
        x = features(side.seed(step))
        left, right = (F.normalize(model(v), dim=-1) for v in (x, x + 0.1))
        return F.cross_entropy(left @ right.T / 0.2, torch.arange(len(x)))

    return trained(side, model, loss)


@habit("a contrastive loss over all ranks' rows, by `torch.distributed.nn.functional.all_gather`", ranks=(2,))
def contrastive_over_ranks(side: Side) -> Found:
    model = side.model(Net)

    def loss(step: int) -> Tensor:
        x = features(side.seed(step))
        left, right = (F.normalize(model(v), dim=-1) for v in (x, x + 0.1))
        right = torch.cat(dist_functional.all_gather(right))
        return F.cross_entropy(left @ right.T / 0.2, torch.arange(len(x)) + side.rank * len(x))

    return trained(side, model, loss)


@habit("a triplet loss: the model three times")
def triplet(side: Side) -> Found:
    model = side.model(Net)

    def loss(step: int) -> Tensor:
        anchor, near, far = (model(features(side.seed(10 * step + i))) for i in range(3))
        return F.triplet_margin_loss(anchor, near, far)

    return trained(side, model, loss)


@habit("R-Drop: two passes with dropout, and the divergence between both")
def r_drop(side: Side) -> Found:
    model = side.model(lambda: nn.Sequential(nn.Linear(WIDTH, HIDDEN), nn.Dropout(0.0), nn.Linear(HIDDEN, CLASSES)))

    def loss(step: int) -> Tensor:
        x, y = rows(side.seed(step))
        one, two = model(x), model(x)
        between = F.kl_div(one.log_softmax(-1), two.softmax(-1), reduction="batchmean")
        return F.cross_entropy(one, y) + F.cross_entropy(two, y) + between

    return trained(side, model, loss)


@habit("distillation from a frozen teacher that is compiled too")
def distillation(side: Side) -> Found:
    student = side.model(Net)
    teacher = side.model(lambda: Net().requires_grad_(False)).eval()

    def loss(step: int) -> Tensor:
        x, _ = rows(side.seed(step))
        with torch.no_grad():
            target = teacher(x + 0.5)
        return F.kl_div(student(x).log_softmax(-1), target.softmax(-1), reduction="batchmean")

    return trained(side, student, loss)


@habit("a perceptual loss: gradients through a frozen network that is not compiled")
def perceptual(side: Side) -> Found:
    model = side.model(Net)
    torch.manual_seed(5)
    judge = nn.Linear(CLASSES, 3).requires_grad_(False)

    def loss(step: int) -> Tensor:
        x, _ = rows(side.seed(step))
        return F.mse_loss(judge(model(x)), judge(x[:, :CLASSES]))

    return trained(side, model, loss)


@habit("a loss with parameters of its own, beside the compiled model")
def loss_with_parameters(side: Side) -> Found:
    model = side.model(Net)
    centres = side.model(lambda: nn.Embedding(CLASSES, CLASSES))
    optimizer = torch.optim.Adam([*model.parameters(), *centres.parameters()], lr=1e-2)

    def loss(step: int) -> Tensor:
        x, y = rows(side.seed(step))
        return (model(x) - centres(y)).square().mean()

    return {**trained(side, model, loss, optimizer=optimizer), **values(centres)}


@habit("an auxiliary loss that a module leaves in an attribute")
def loss_in_an_attribute(side: Side) -> Found:
    class Leaving(Net):
        def forward(self, x: Tensor) -> Tensor:
            hidden = self.first(x)
            self.extra = hidden.square().mean()
            return self.last(self.norm(hidden))

    model = side.model(Leaving)

    def loss(step: int) -> Tensor:
        x, y = rows(side.seed(step))
        return F.cross_entropy(model(x), y) + 0.1 * model.extra

    return trained(side, model, loss)


@habit("a loss that skips padding, by `ignore_index`")
def ignored_padding(side: Side) -> Found:
    model = side.model(Language)

    def loss(step: int) -> Tensor:
        ids = words(side.seed(step))
        ids[:, 5:] = 0
        return next_word(model(ids), ids, ignore_index=0)

    return trained(side, model, loss)


@habit("a loss per token, over the number of tokens of all ranks")
def over_all_tokens(side: Side) -> Found:
    model = side.model(Language)

    def loss(step: int) -> Tensor:
        ids = words(side.seed(step), length=5 + side.rank)
        count = side.mean(torch.tensor(float(ids[:, 1:].numel())))
        return next_word(model(ids), ids, reduction="sum") / count

    return trained(side, model, loss)


@habit("`F.ctc_loss`")
def ctc(side: Side) -> Found:
    model = side.model(Language)

    def loss(step: int) -> Tensor:
        logs = model(words(side.seed(step), length=12)).log_softmax(-1).transpose(0, 1)
        lengths = torch.full((2,), 12), torch.full((2,), 4)
        return F.ctc_loss(logs, words(side.seed(step), length=4), *lengths)

    return trained(side, model, loss)


@habit("a gradient penalty: `autograd.grad(create_graph=True)` of the inputs")
def gradient_penalty(side: Side) -> Found:
    model = side.model(Net)

    def loss(step: int) -> Tensor:
        x = features(side.seed(step)).requires_grad_()
        (gradient,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
        return (gradient.norm(dim=-1) - 1).square().mean()

    return trained(side, model, loss)


@habit("adversarial rows (FGSM): `autograd.grad` of the inputs, then training on them")
def adversarial_rows(side: Side) -> Found:
    model = side.model(Net)

    def loss(step: int) -> Tensor:
        x, y = rows(side.seed(step))
        x.requires_grad_()
        (gradient,) = torch.autograd.grad(F.cross_entropy(model(x), y), x)
        return F.cross_entropy(model((x + 0.1 * gradient.sign()).detach()), y)

    return trained(side, model, loss)


@habit("a loss that is not finite: the step is left out on all ranks")
def left_out_step(side: Side) -> Found:
    model = side.model(Net)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for step in range(4):
        x, y = rows(side.seed(step))
        loss = F.cross_entropy(model(x * (float("nan") if step == 1 else 1.0)), y)
        loss.backward()
        if torch.isfinite(side.mean(loss)):
            optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return {**numbered(losses), **values(model)}


@habit("a loss in double precision of a model in single")
def loss_in_double(side: Side) -> Found:
    model = side.model(Net)

    def loss(step: int) -> Tensor:
        x, y = rows(side.seed(step))
        return F.cross_entropy(model(x).double(), y)

    return trained(side, model, loss)


@habit("a dataclass or a tuple of outputs")
def tuple_of_outputs(side: Side) -> Found:
    class Giving(Net):
        def forward(self, x: Tensor, y: Tensor | None = None) -> tuple[Any, ...]:
            logits = super().forward(x)
            return (F.cross_entropy(logits, y), logits, None)

    model = side.model(Giving)

    def loss(step: int) -> Tensor:
        loss, logits, _ = model(*rows(side.seed(step)))
        return loss + 0.0 * logits.mean()

    return trained(side, model, loss)
