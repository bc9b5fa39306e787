"""Saving and loading."""

from __future__ import annotations

import io
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file, save_model
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict

import zgraph
from benchmarks.habit.nets import Classifier, Language, rows, tiny_llama, words
from benchmarks.habit.side import Side, sgd, trained, values, whole
from benchmarks.habit.table import Found, Table

TABLE = Table("saving")
habit = TABLE.habit


def _trained(side: Side) -> tuple[Classifier, torch.optim.Optimizer]:
    model = side.model(Classifier)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    trained(side, model, lambda step: model(*rows(side.seed(step))), optimizer=optimizer)
    return model, optimizer


@contextmanager
def _folder(side: Side) -> Iterator[Path]:
    """A folder that all ranks see, until all have read."""
    with tempfile.TemporaryDirectory() as own:
        name = [own]
        if side.num_ranks > 1:
            dist.broadcast_object_list(name, 0)
        yield Path(name[0])
        if side.num_ranks > 1:
            dist.barrier()


def _barrier(side: Side) -> None:
    if side.num_ranks > 1:
        dist.barrier()


@habit("`torch.save(model.state_dict())` on every rank, and `torch.load`")
def torch_save(side: Side) -> Found:
    model, _ = _trained(side)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other = side.model(Classifier)
    other.load_state_dict(torch.load(file, weights_only=True))
    return values(other)


@habit("`{k: v.cpu() for k, v in model.state_dict().items()}`, loaded into an eager model")
def on_the_host(side: Side) -> Found:
    model, _ = _trained(side)
    state = {name: value.cpu() for name, value in model.state_dict().items()}
    other = Classifier()
    other.load_state_dict(state)
    return values(other)


@habit("`v.full_tensor()` of each DTensor, saved on the first rank alone, loaded into an eager model")
def full_tensors(side: Side) -> Found:
    model, _ = _trained(side)
    state = {n: v.full_tensor() if hasattr(v, "full_tensor") else v for n, v in model.state_dict().items()}
    with _folder(side) as folder:
        if side.rank == 0:
            torch.save(state, folder / "model.pt")
        _barrier(side)
        other = Classifier()
        other.load_state_dict(torch.load(folder / "model.pt", weights_only=True))
    return values(other)


@habit("the state dict on the first rank alone: `if rank == 0: torch.save(model.state_dict(), ...)`")
def on_the_first_rank(side: Side) -> Found:
    model, _ = _trained(side)
    with _folder(side) as folder:
        if side.rank == 0:
            torch.save(model.state_dict(), folder / "model.pt")
        _barrier(side)
        other = Classifier()
        other.load_state_dict(torch.load(folder / "model.pt", weights_only=True))
    return values(other)


@habit("`safetensors.torch.save_file(model.state_dict())`", package="safetensors")
def safetensors_file(side: Side) -> Found:
    model, _ = _trained(side)
    with _folder(side) as folder:
        save_file(model.state_dict(), folder / f"{side.rank}.safetensors")
        return load_file(folder / f"{side.rank}.safetensors")


@habit("`safetensors.torch.save_model(model)`, of tied weights", package="safetensors")
def safetensors_model(side: Side) -> Found:
    model = side.model(Language)
    with _folder(side) as folder:
        save_model(model, str(folder / f"{side.rank}.safetensors"))
        return load_file(folder / f"{side.rank}.safetensors")


@habit("`model.save_pretrained` in a loop of one's own, loaded by transformers", package="transformers")
def save_pretrained(side: Side) -> Found:
    model = side.model(tiny_llama)
    trained(side, model, lambda step: model(input_ids=(ids := words(side.seed(step))), labels=ids).loss)
    with _folder(side) as folder:
        model.save_pretrained(folder)
        _barrier(side)
        return values(type(model).from_pretrained(folder))


@habit("`if rank == 0: model.save_pretrained(folder)`", package="transformers")
def save_pretrained_on_the_first(side: Side) -> Found:
    model = side.model(tiny_llama)
    with _folder(side) as folder:
        if side.rank == 0:
            model.save_pretrained(folder)
        _barrier(side)
        return values(type(model).from_pretrained(folder))


@habit("`model.save_pretrained(state_dict={k: v.full_tensor() ...})`", package="transformers")
def save_pretrained_full(side: Side) -> Found:
    model = side.model(tiny_llama)
    state = {n: whole(v) for n, v in model.state_dict().items()}
    with _folder(side) as folder:
        if side.rank == 0:
            model.save_pretrained(folder, state_dict=state)
        _barrier(side)
        return values(type(model).from_pretrained(folder))


@habit("`from_pretrained`, then compiled, then trained", package="transformers")
def from_pretrained(side: Side) -> Found:
    torch.manual_seed(3)
    with _folder(side) as folder:
        if side.rank == 0:
            tiny_llama().save_pretrained(folder)
        _barrier(side)
        model = side.model(lambda: type(tiny_llama()).from_pretrained(folder))
    return trained(side, model, lambda step: model(input_ids=(ids := words(side.seed(step))), labels=ids).loss)


@habit("`torch.distributed.checkpoint` of model and optimizer")
def distributed_checkpoint(side: Side) -> Found:
    from torch.distributed import checkpoint as dcp

    model, _ = _trained(side)
    with _folder(side) as folder:
        dcp.save({"model": model.state_dict()}, checkpoint_id=folder, no_dist=side.num_ranks == 1)
        other = side.model(Classifier)
        state = other.state_dict()
        dcp.load({"model": state}, checkpoint_id=folder, no_dist=side.num_ranks == 1)
        other.load_state_dict(state)
    return values(other)


@habit("`get_model_state_dict(full_state_dict=True)` and `set_model_state_dict`")
def full_state_dict(side: Side) -> Found:
    model, _ = _trained(side)
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    other = side.model(Classifier)
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=side.num_ranks > 1)
    set_model_state_dict(other, state, options=options)
    return {**values(other), **{f"full {n}": whole(v) for n, v in state.items()}}


@habit("an optimizer's state: `torch.save(optimizer.state_dict())`, and training that goes on from it")
def optimizer_state(side: Side) -> Found:
    model, optimizer = _trained(side)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    other = side.model(Classifier)
    resumed = torch.optim.AdamW(other.parameters(), lr=1e-2)
    other.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["optimizer"])
    return trained(side, other, lambda step: other(*rows(side.seed(step + 9))), optimizer=resumed)


@habit("the state of `zgraph.optim.AdamW`, saved and resumed")
def own_optimizer_state(side: Side) -> Found:
    kind = zgraph.optim.AdamW if side.is_zgraph else torch.optim.AdamW
    model = side.model(Classifier)
    optimizer = kind(model.parameters(), lr=1e-2)
    trained(side, model, lambda step: model(*rows(side.seed(step))), optimizer=optimizer)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    other = side.model(Classifier)
    resumed = kind(other.parameters(), lr=1e-2)
    other.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["optimizer"])
    return trained(side, other, lambda step: other(*rows(side.seed(step + 9))), optimizer=resumed)


@habit("an eager model's state dict loaded into the compiled one, `strict=False`")
def loaded_not_strict(side: Side) -> Found:
    torch.manual_seed(4)
    state = {n: v for n, v in Classifier().state_dict().items() if "norm" not in n}
    model = side.model(Classifier)
    answer = model.load_state_dict({**state, "other": torch.ones(1)}, strict=False)
    return {**values(model), "missing": len(answer.missing_keys), "unexpected": len(answer.unexpected_keys)}


@habit("`load_state_dict(assign=True)`")
def assigned(side: Side) -> Found:
    torch.manual_seed(4)
    state = Classifier().state_dict()
    model = side.model(Classifier)
    model.load_state_dict(state, assign=True)
    return trained(side, model, lambda step: model(*rows(side.seed(step))))


@habit("the state dict of a part: `model.last.state_dict()`, `model.last.load_state_dict(...)`")
def of_a_part(side: Side) -> Found:
    model, _ = _trained(side)
    state = {n: torch.full(v.shape, 0.1) for n, v in model.last.state_dict().items()}
    model.last.load_state_dict(state)
    return values(model)


@habit("the best state kept by `copy.deepcopy(model.state_dict())`, and put back")
def best_state(side: Side) -> Found:
    import copy

    model, optimizer = _trained(side)
    best = copy.deepcopy(model.state_dict())
    trained(side, model, lambda step: model(*rows(side.seed(step + 5))), optimizer=optimizer)
    model.load_state_dict(best)
    return values(model)


@habit("the best state kept without a copy, which eager PyTorch overwrites too: `best = model.state_dict()`")
def best_state_without_copy(side: Side) -> Found:
    model, optimizer = _trained(side)
    best: dict[str, Tensor] = model.state_dict()
    trained(side, model, lambda step: model(*rows(side.seed(step + 5))), optimizer=optimizer)
    return {name: whole(value) for name, value in best.items()}


@habit("a checkpoint with a random state and a scheduler's")
def whole_checkpoint(side: Side) -> Found:
    model = side.model(Classifier)
    optimizer = sgd(model)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    trained(side, model, lambda step: model(*rows(side.seed(step))), optimizer=optimizer)
    schedule.step()
    file = io.BytesIO()
    states = {"m": model.state_dict(), "o": optimizer.state_dict(), "s": schedule.state_dict()}
    torch.save({**states, "rng": torch.get_rng_state()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    for thing, key in ((model, "m"), (optimizer, "o"), (schedule, "s")):
        thing.load_state_dict(saved[key])
    torch.set_rng_state(saved["rng"])
    return trained(side, model, lambda step: model(*rows(side.seed(step + 9))), optimizer=optimizer)
