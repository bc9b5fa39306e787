"""Training loops: several models, accumulation, precision, freezing."""

from __future__ import annotations

import copy
import itertools
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.algorithms.join import Join
from torch.distributed.device_mesh import init_device_mesh
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import SWALR, AveragedModel, get_ema_multi_avg_fn, update_bn

import zgraph
from benchmarks.habit.nets import (
    CLASSES,
    WIDTH,
    Classifier,
    Conv,
    Language,
    Net,
    features,
    images,
    next_word,
    rows,
    tiny_llama,
    words,
)
from benchmarks.habit.side import Side, numbered, sgd, trained, values
from benchmarks.habit.table import Found, Table
from benchmarks.habit.training import training

TABLE = Table("loops")
habit = TABLE.habit


@habit("a GAN: two models, two optimizers, `detach`")
def gan(side: Side) -> Found:
    maker, judge = side.model(lambda: Net(out=WIDTH)), side.model(lambda: Net(out=1))
    maker_optimizer, judge_optimizer = sgd(maker, 0.05), sgd(judge, 0.05)
    losses = []
    for step in range(3):
        noise, real = features(side.seed(step)), features(side.seed(step + 50))
        made = maker(noise)
        judge_optimizer.zero_grad()
        good, bad = judge(real), judge(made.detach())
        loss = F.softplus(-good).mean() + F.softplus(bad).mean()
        loss.backward()
        judge_optimizer.step()
        maker_optimizer.zero_grad()
        fooled = F.softplus(-judge(made)).mean()
        fooled.backward()
        maker_optimizer.step()
        losses += [loss.detach(), fooled.detach()]
    return {**numbered(losses), **values(maker), **{f"judge {n}": v for n, v in values(judge).items()}}


@habit("a GAN whose judge is frozen, by `requires_grad_`, while the maker trains")
def gan_with_freezing(side: Side) -> Found:
    maker, judge = side.model(lambda: Net(out=WIDTH)), side.model(lambda: Net(out=1))
    optimizers = sgd(maker, 0.05), sgd(judge, 0.05)
    losses = []
    for step in range(4):
        trains_judge = step % 2 == 0
        judge.requires_grad_(trains_judge)
        maker.requires_grad_(not trains_judge)
        made = judge(maker(features(side.seed(step))))
        loss = F.softplus(made if trains_judge else -made).mean()
        loss.backward()
        optimizers[trains_judge].step()
        for optimizer in optimizers:
            optimizer.zero_grad()
        losses.append(loss.detach())
    return {**numbered(losses), **values(maker), **{f"judge {n}": v for n, v in values(judge).items()}}


@habit("two models in one loss, one optimizer")
def two_models_in_one_loss(side: Side) -> Found:
    coder, decoder = side.model(Net), side.model(lambda: Net(width=CLASSES, out=WIDTH))
    optimizer = torch.optim.AdamW(itertools.chain(coder.parameters(), decoder.parameters()), lr=1e-2)

    def loss(step: int) -> Tensor:
        x = features(side.seed(step))
        return F.mse_loss(decoder(coder(x)), x)

    return {**trained(side, coder, loss, optimizer=optimizer), **{f"d {n}": v for n, v in values(decoder).items()}}


@habit("a teacher that is an average of the student (EMA), by hand over `parameters()`")
def ema_by_hand(side: Side) -> Found:
    model = side.model(Net)
    teacher = copy.deepcopy(model).requires_grad_(False)

    def loss(step: int) -> Tensor:
        x = features(side.seed(step))
        with torch.no_grad():
            target = teacher(x + 0.1)
        return F.mse_loss(model(x), target) + model(x).square().mean()

    def average() -> None:
        with torch.no_grad():
            for mean, parameter in zip(teacher.parameters(), model.parameters(), strict=True):
                mean.mul_(0.9).add_(parameter, alpha=0.1)

    return {**trained(side, model, loss, before=average), **{f"t {n}": v for n, v in values(teacher).items()}}


@habit("an average of a state dict in a dictionary: `ema[k].mul_(0.9).add_(v, alpha=0.1)`")
def ema_of_a_state_dict(side: Side) -> Found:
    model = side.model(Classifier)
    average = {name: value.detach().clone() for name, value in model.state_dict().items()}

    def update() -> None:
        for name, value in model.state_dict().items():
            average[name].mul_(0.9).add_(value, alpha=0.1)

    found = training(side, model, before=update)
    model.load_state_dict(average)
    return {**found, **{f"ema {n}": v for n, v in values(model).items()}}


@habit("`AveragedModel`, `SWALR` and `update_bn`")
def swa(side: Side) -> Found:
    model = side.model(Conv)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    optimizer = sgd(model)
    schedule = SWALR(optimizer, swa_lr=0.05)

    def loss(step: int) -> Tensor:
        image, y = images(side.seed(step))
        return F.cross_entropy(model(image), y)

    def average_too() -> None:
        average.update_parameters(model)
        schedule.step()

    found = trained(side, model, loss, optimizer=optimizer, before=average_too)
    update_bn([images(n)[0] for n in range(2)], average)
    return {**found, **{f"a {n}": v for n, v in values(average.module).items()}, "bn": average.module.norm.running_mean}


@habit("generate, then train on what was generated")
def generate_then_train(side: Side) -> Found:
    model = side.model(tiny_llama)

    def loss(step: int) -> Tensor:
        model.eval()
        prompt = words(side.seed(step), length=4)
        ids = model.generate(prompt, max_new_tokens=3 + side.rank, min_new_tokens=3 + side.rank, do_sample=False)
        model.train()
        return model(input_ids=ids, labels=ids).loss

    return trained(side, model, loss)


@habit("a greedy loop of one's own under `no_grad`: the model called with ever longer rows")
def own_generation(side: Side) -> Found:
    model = side.model(Language)
    ids = words(side.seed(0))
    with torch.no_grad():
        for _ in range(4):
            ids = torch.cat([ids, model(ids)[:, -1:].argmax(-1)], 1)
    return {"ids": ids.float(), **trained(side, model, lambda _: next_word(model(ids), ids))}


@habit("layers frozen in the middle of training, and thawed")
def frozen_in_the_middle(side: Side) -> Found:
    model = side.model(Classifier)
    optimizer = sgd(model)
    losses = []
    for step in range(6):
        model.first.requires_grad_(step not in (2, 3))
        loss = model(*rows(side.seed(step)))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return {**numbered(losses), **values(model)}


@habit("frozen from the beginning, the optimizer given what trains alone")
def frozen_body(side: Side) -> Found:
    def build() -> nn.Module:
        model = Classifier()
        model.first.requires_grad_(False)
        return model

    model = side.model(build)
    return training(side, model, optimizer=sgd(p for p in model.parameters() if p.requires_grad))


@habit("a parameter group that is added when a layer is thawed")
def added_group(side: Side) -> Found:
    model = side.model(Classifier)
    model.first.requires_grad_(False)
    optimizer = sgd(p for p in model.parameters() if p.requires_grad)
    found = dict(training(side, model, optimizer=optimizer))
    model.first.requires_grad_(True)
    optimizer.add_param_group({"params": [*model.first.parameters()], "lr": 0.01})
    return {**{f"before {n}": v for n, v in found.items()}, **training(side, model, optimizer=optimizer)}


def _accumulated(side: Side, *, under_no_sync: bool) -> Found:
    model = side.model(Classifier)
    optimizer = sgd(model)
    losses = []
    for step in range(6):
        is_last = step % 3 == 2
        with side.no_sync(model) if under_no_sync and not is_last else nullcontext():
            loss = model(*rows(side.seed(step))) / 3
            loss.backward()
        losses.append(loss.detach())
        if is_last:
            optimizer.step()
            optimizer.zero_grad()
    return {**numbered(losses), **values(model)}


@habit("gradient accumulation")
def accumulation(side: Side) -> Found:
    return _accumulated(side, under_no_sync=False)


@habit("gradient accumulation under `no_sync`")
def accumulation_without_sync(side: Side) -> Found:
    return _accumulated(side, under_no_sync=True)


@habit("accumulation by tokens: micro-batches of other lengths, gradients divided by all tokens at the end")
def accumulation_by_tokens(side: Side) -> Found:
    model = side.model(Language)
    optimizer = sgd(model, 0.05)
    losses = []
    for step in range(2):
        count = torch.zeros(())
        for micro in range(3):
            ids = words(side.seed(10 * step + micro), length=4 + micro + side.rank)
            count += ids[:, 1:].numel()
            with side.no_sync(model) if micro < 2 else nullcontext():
                loss = next_word(model(ids), ids, reduction="sum")
                loss.backward()
            losses.append(loss.detach())
        for parameter in model.parameters():
            parameter.grad.div_(side.mean(count))
        optimizer.step()
        optimizer.zero_grad()
    return {**numbered(losses), **values(model)}


@habit("an optimizer step after an accumulation that a loader's end cuts short")
def accumulation_cut_short(side: Side) -> Found:
    model = side.model(Classifier)
    optimizer = sgd(model)
    with side.no_sync(model):
        model(*rows(side.seed(0))).backward()
    optimizer.step()
    optimizer.zero_grad()
    return values(model)


@habit("gradients zeroed in place: `zero_grad(set_to_none=False)`")
def zeroed_in_place(side: Side) -> Found:
    model = side.model(Classifier)
    optimizer = sgd(model)
    losses = []
    for step in range(3):
        optimizer.zero_grad(set_to_none=False)
        loss = model(*rows(side.seed(step)))
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return {**numbered(losses), **values(model)}


@habit("tied weights")
def tied_weights(side: Side) -> Found:
    model = side.model(Language)
    return trained(side, model, lambda step: next_word(model(ids := words(side.seed(step))), ids))


@habit("a mesh of two axes: shards within a host, copies between hosts", ranks=(4,))
def two_axes(side: Side) -> Found:
    mesh = init_device_mesh("cpu", (2, side.num_ranks // 2), mesh_dim_names=("copies", "shards"))
    model = side.model(Classifier, mesh=mesh)
    return training(side, model, before=lambda: nn.utils.clip_grad_norm_(model.parameters(), 0.3))


@habit("an empty batch on one rank, its loss a sum", ranks=(1, 2))
def empty_batch(side: Side) -> Found:
    model = side.model(Net)

    def loss(step: int) -> Tensor:
        x, y = rows(side.seed(step), num_rows=0 if step == 1 and side.rank == side.num_ranks - 1 else 4)
        return F.cross_entropy(model(x), y, reduction="sum") / 4

    return trained(side, model, loss)


@habit("an empty batch in the first step")
def empty_first_batch(side: Side) -> Found:
    model = side.model(Net)

    def loss(step: int) -> Tensor:
        x, y = rows(side.seed(step), num_rows=0 if step == 0 and side.rank == side.num_ranks - 1 else 4)
        return F.cross_entropy(model(x), y, reduction="sum") / 4

    return trained(side, model, loss)


@habit("a last batch that is shorter")
def short_last_batch(side: Side) -> Found:
    model = side.model(Classifier)
    return trained(side, model, lambda step: model(*rows(side.seed(step), num_rows=(6, 6, 1)[step])))


@habit("batches of other lengths on each rank in each step")
def other_lengths(side: Side) -> Found:
    model = side.model(Language)

    def loss(step: int) -> Tensor:
        ids = words(side.seed(step), length=4 + 2 * step + 3 * side.rank)
        return next_word(model(ids), ids)

    return trained(side, model, loss, steps=4)


@habit("evaluation between steps, under `no_grad` and under `inference_mode`")
def evaluation(side: Side) -> Found:
    model = side.model(Conv)
    optimizer, scores = sgd(model), []
    for step in range(4):
        image, y = images(side.seed(step))
        F.cross_entropy(model(image), y).backward()
        optimizer.step()
        optimizer.zero_grad()
        model.eval()
        with torch.no_grad() if step % 2 else torch.inference_mode():
            scores.append(float(model(images(77)[0]).sum()))
        model.train()
    return {**numbered(scores), **values(model)}


@habit("uneven loaders under `zgraph.join(model)`, beside DDP's Join", ranks=(2,))
def uneven_loaders(side: Side) -> Found:
    return _uneven(side, side.num_ranks - 1 - side.rank, 3 + side.rank)


@habit("a loader without a batch on one rank, under `zgraph.join(model)`", ranks=(2,))
def loader_without_a_batch(side: Side) -> Found:
    return _uneven(side, 0, 3 * side.rank)


def _uneven(side: Side, first: int, count: int) -> Found:
    """Plain SGD over so many batches of this rank. DDP's Join updates on the ranks that have some, and shares that."""
    torch.manual_seed(0)
    loader = [rows(side.seed(first + number)) for number in range(count)]
    if side.is_zgraph:
        model = side.ready(Classifier())
        joining: Any = zgraph.join(model)
    else:
        model = DistributedDataParallel(Classifier())
        joining = Join([model])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with joining as joined:
        for x, y in joined(loader) if side.is_zgraph else loader:
            model(x, y).backward()
            optimizer.step()
            optimizer.zero_grad()
    return values(getattr(model, "module", model))
