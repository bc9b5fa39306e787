"""Hooks, and looking on while a model trains."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.habit.nets import Classifier, Net, features, rows
from benchmarks.habit.side import Side, gradients, numbered, sgd, trained, values, whole
from benchmarks.habit.table import Found, Table
from benchmarks.habit.training import training

TABLE = Table("hooks")
habit = TABLE.habit


@habit("a forward hook that changes a layer's output")
def changing_hook(side: Side) -> Found:
    model = side.model(Classifier)
    model.norm.register_forward_hook(lambda _module, _inputs, out: out * 1.5)
    return training(side, model)


@habit("a forward hook that keeps activations in a list or a dict")
def keeping_hook(side: Side) -> Found:
    model = side.model(Classifier)
    kept: dict[str, Tensor] = {}
    model.norm.register_forward_hook(lambda _module, _inputs, out: kept.__setitem__("norm", out.detach()))
    found = dict(training(side, model))
    return {**found, "kept": kept["norm"].clone()}


@habit("a forward pre-hook with keyword arguments")
def pre_hook(side: Side) -> Found:
    model = side.model(Classifier)
    model.register_forward_pre_hook(lambda _m, args, kwargs: ((args[0] + 1, *args[1:]), kwargs), with_kwargs=True)
    return training(side, model)


@habit("a hook that comes and goes between steps")
def passing_hook(side: Side) -> Found:
    model = side.model(Classifier)
    losses = []
    optimizer = sgd(model)
    for step in range(4):
        handle = model.act.register_forward_hook(lambda *seen: seen[-1] * 2) if step % 2 else None
        loss = model(*rows(side.seed(step)))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if handle:
            handle.remove()
        losses.append(loss.detach())
    return {**numbered(losses), **values(model)}


@habit("a full backward hook on a module that scales gradients")
def backward_hook(side: Side) -> Found:
    model = side.model(Classifier)
    model.norm.register_full_backward_hook(lambda _m, grads, _out: tuple(0.5 * g for g in grads))
    return training(side, model)


@habit("a hook on the output tensor")
def tensor_hook(side: Side) -> Found:
    model = side.model(Net)

    def loss(step: int) -> Tensor:
        x, y = rows(side.seed(step))
        out = model(x)
        out.register_hook(lambda g: g.clamp(-0.05, 0.05))
        return F.cross_entropy(out, y)

    return trained(side, model, loss)


@habit("`p.register_hook` on a parameter, which scales its gradient")
def parameter_hook(side: Side) -> Found:
    model = side.model(Classifier)
    model.first.weight.register_hook(lambda g: g * 0.5)
    return training(side, model)


@habit("a mask on a parameter's gradient, by a hook")
def masking_hook(side: Side) -> Found:
    model = side.model(Classifier)
    mask = (torch.arange(model.last.weight.numel()).view(model.last.weight.shape) % 2).float()

    def masked(gradient: Tensor) -> Tensor:
        return gradient * mask

    model.last.weight.register_hook(masked)
    return training(side, model)


@habit("an optimizer for each parameter, stepped in a post-accumulate hook")
def step_in_a_hook(side: Side) -> Found:
    model = side.model(Classifier)
    optimizers = {p: torch.optim.SGD([p], lr=0.1) for p in model.parameters()}

    def update(parameter: Tensor) -> None:
        optimizers[parameter].step()
        optimizers[parameter].zero_grad()

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(update)
    losses = []
    for step in range(3):
        loss = model(*rows(side.seed(step)))
        loss.backward()
        losses.append(loss.detach())
    return {**numbered(losses), **values(model)}


@habit("hooks before and behind an optimizer's step")
def optimizer_hooks(side: Side) -> Found:
    model = side.model(Classifier)
    optimizer, seen = sgd(model), []
    optimizer.register_step_pre_hook(lambda *_: torch.nn.utils.clip_grad_value_(model.parameters(), 0.01))
    optimizer.register_step_post_hook(lambda *_: seen.append(whole(model.first.bias)))
    found = dict(training(side, model, optimizer=optimizer))
    return {**found, "seen": torch.stack(seen)}


@habit("Grad-CAM: `autograd.grad` of the output for an activation that a hook kept")
def grad_cam(side: Side) -> Found:
    model = side.model(Net)
    kept: list[Tensor] = []
    model.norm.register_forward_hook(lambda _m, _i, out: kept.append(out))
    out = model(features(side.seed(0)))
    (gradient,) = torch.autograd.grad(out[:, 0].sum(), kept[0])
    return {"cam": (gradient * kept[0]).detach()}


@habit("logging each parameter's norm and its gradient's: `p.norm()`, `p.grad.norm()`")
def logged_norms(side: Side) -> Found:
    model = side.model(Classifier)
    model(*rows(side.seed(0))).backward()
    found = {f"{n}.norm": float(p.detach().norm()) for n, p in model.named_parameters()}
    return {**found, **{f"{n}.grad.norm": float(p.grad.norm()) for n, p in model.named_parameters()}}


@habit("logging statistics: `p.mean()`, `p.std()`, `p.abs().max()`, `(p == 0).sum()`")
def logged_statistics(side: Side) -> Found:
    model = side.model(Classifier)
    found = {}
    for name, parameter in model.named_parameters():
        p = parameter.detach()
        found |= {f"{name} mean": float(p.mean()), f"{name} max": float(p.abs().max())}
        found |= {f"{name} std": float(p.std()), f"{name} zeros": float((p == 0).sum())}
    return found


@habit("a histogram of a gradient: `torch.histc(p.grad)`")
def histogram(side: Side) -> Found:
    model = side.model(Classifier)
    model(*rows(side.seed(0))).backward()
    return {n: whole(torch.histc(p.grad, bins=5, min=-1, max=1)) for n, p in model.named_parameters()}


@habit("`p.grad.cpu().numpy()` and `p.detach().numpy()`")
def as_numpy(side: Side) -> Found:
    model = side.model(Classifier)
    model(*rows(side.seed(0))).backward()
    grads = {f"{n}.grad": torch.from_numpy(p.grad.cpu().numpy()) for n, p in model.named_parameters()}
    return {**grads, **{n: torch.from_numpy(p.detach().cpu().numpy()) for n, p in model.named_parameters()}}


@habit("`p.tolist()` and `p.data[0, 0].item()`")
def as_list(side: Side) -> Found:
    model = side.model(Classifier)
    return {"list": torch.tensor(model.first.bias.tolist()), "item": model.first.weight.data[0, 0].item()}


@habit("`parameters_to_vector` and `vector_to_parameters`")
def as_vector(side: Side) -> Found:
    model = side.model(Classifier)
    vector = nn.utils.parameters_to_vector(model.parameters())
    nn.utils.vector_to_parameters(vector * 0.5, model.parameters())
    return {"vector": whole(vector), **training(side, model)}


@habit("`torch.autograd.detect_anomaly`")
def anomaly(side: Side) -> Found:
    model = side.model(Classifier)
    with torch.autograd.detect_anomaly(check_nan=True):
        return training(side, model)


@habit("`torch.autograd.graph.saved_tensors_hooks` around the forward")
def saved_tensors(side: Side) -> Found:
    model = side.model(Classifier)

    def loss(step: int) -> Tensor:
        with torch.autograd.graph.save_on_cpu():
            return model(*rows(side.seed(step)))

    return trained(side, model, loss)


@habit("`torch.profiler.profile` around steps")
def profiled(side: Side) -> Found:
    model = side.model(Classifier)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]):
        return training(side, model)


@habit("gradients of given parameters: `autograd.grad(loss, [model.last.weight])`")
def gradient_of_one(side: Side) -> Found:
    model = side.model(Classifier)
    loss = model(*rows(side.seed(0)))
    (gradient,) = torch.autograd.grad(loss, [model.last.weight])
    return {"gradient": whole(gradient) if side.is_zgraph else side.mean(gradient), "left": len(gradients(model))}


@habit("`loss.backward(inputs=[...])`")
def backward_for_inputs(side: Side) -> Found:
    model = side.model(Classifier)
    model(*rows(side.seed(0))).backward(inputs=[model.last.weight, model.first.bias])
    return gradients(model)


@habit("counting parameters: `sum(p.numel() for p in model.parameters() if p.requires_grad)`")
def counted(side: Side) -> Found:
    model = side.model(Classifier)
    return {"count": sum(p.numel() for p in model.parameters() if p.requires_grad)}
