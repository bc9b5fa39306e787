"""Two ranks: as over DDP, resumed in the middle and elsewhere; an Accelerator beside a compiled model."""

import inspect
import os

import peft
import pytest
import torch
import transformers
from accelerate import Accelerator
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader

import zgraph
from tests.hf.training import Rows, adapted, arguments, history, llama, padded, same, t5, trainer
from zgraph.errors import UsageError
from zgraph.hf import Accelerator as ByFile
from zgraph.hf import Trainer, enable, prepare

LOGGED = ("loss", "grad_norm", "eval_loss")


def launched(mesh):
    """What torchrun sets."""
    rank, size = str(mesh.get_local_rank()), str(mesh.size())
    os.environ.update(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=size, LOCAL_WORLD_SIZE=size)


def train(mesh, kind, folder, resume):
    launched(mesh)
    saves = {"save_strategy": "steps", "save_steps": 3} if kind is Trainer else {}
    made = trainer(kind, folder, eval_strategy="steps", eval_steps=3, **saves)
    made.train(resume_from_checkpoint=resume)
    if kind is Trainer:
        assert made.model_wrapped is made.model
        assert isinstance(made.model.lm_head.weight, DTensor)
    return history(made, *LOGGED)


def test_as_over_ddp_and_resumed_at_two_ranks_and_at_one(pair, tmp_path):
    plain, ours = tmp_path / "plain", tmp_path / "ours"
    expected = pair.run(train, 2, transformers.Trainer, plain, None)[0]
    found, found_there = pair.run(train, 2, Trainer, ours, None)
    assert found == found_there
    same(found, expected)
    half = str(ours / "checkpoint-3")
    assert pair.run(train, 2, Trainer, tmp_path / "again", half)[0] == found
    alone = trainer(Trainer, tmp_path / "alone", per_device_train_batch_size=4)
    alone.train(resume_from_checkpoint=half)
    same(history(alone, "loss", "grad_norm"), [entry for entry in found if entry[1] != "eval_loss"])
    assert transformers.AutoModelForCausalLM.from_pretrained(ours / "checkpoint-6").lm_head.weight.shape == (100, 32)


def train_on_disk(mesh, kind, folder, resume):
    launched(mesh)
    config = {
        "zero_optimization": {"stage": 1, "offload_optimizer": {"device": "nvme", "nvme_path": str(folder / "disk")}}
    }
    given = {"zgraph": config} if kind is Trainer else {}
    made = trainer(kind, folder, given, save_strategy="steps", save_steps=2, max_steps=4)
    made.train(resume_from_checkpoint=resume)
    return history(made, "loss", "grad_norm")


def test_the_moments_of_stage_1_may_lie_on_disk_and_are_resumed(pair, tmp_path):
    plain, ours = tmp_path / "plain", tmp_path / "ours"
    expected = pair.run(train_on_disk, 2, transformers.Trainer, plain, None)[0]
    found = pair.run(train_on_disk, 2, Trainer, ours, None)[0]
    same(found, expected)
    assert pair.run(train_on_disk, 2, Trainer, ours, str(ours / "checkpoint-2"))[0] == found


def train_adapted(mesh, kind, folder, resume):
    launched(mesh)
    saves = {"save_strategy": "steps", "save_steps": 2}
    made = trainer(kind, folder, {"model": adapted()}, **saves, activation_checkpointing=True, max_steps=4)
    made.train(resume_from_checkpoint=resume)
    if kind is Trainer:
        frozen = made.model.get_base_model().lm_head.weight
        assert isinstance(frozen, DTensor)
        assert not frozen.requires_grad
    adapter = {n: getattr(p, "full_tensor", lambda p=p: p)() for n, p in made.model.named_parameters() if "lora" in n}
    return history(made, "loss", "grad_norm"), {n: p.detach() for n, p in adapter.items()}


def test_adapters_are_trained_beside_frozen_shards_and_resumed(pair, tmp_path):
    plain, ours = tmp_path / "plain", tmp_path / "ours"
    expected, _ = pair.run(train_adapted, 2, transformers.Trainer, plain, None)[0]
    found, weights = pair.run(train_adapted, 2, Trainer, ours, None)[0]
    same(found, expected)
    assert pair.run(train_adapted, 2, Trainer, ours, str(ours / "checkpoint-2"))[0][0] == found
    loaded = peft.PeftModel.from_pretrained(llama(), ours / "checkpoint-4").state_dict()
    assert all(torch.equal(loaded[name], weight) for name, weight in weights.items())
    sizes = [sum(path.stat().st_size for path in (at / "checkpoint-4").glob("*.safetensors")) for at in (ours, plain)]
    assert sizes[0] == sizes[1]


def train_padded(mesh, kind, folder):
    """With rows of other lengths in each batch, from the first on, and an optimizer that was made before."""
    launched(mesh)
    lengths, losses = [], []

    def collate(rows):
        batch = padded(rows)
        lengths.append(batch["input_ids"].shape[1])
        return batch

    model = llama()
    given = {"model": model, "optimizers": (torch.optim.AdamW(model.parameters(), lr=1e-2), None)}
    made = trainer(kind, folder, {**given, "data_collator": collate}, max_steps=3, eval_strategy="steps", eval_steps=3)
    compute_loss = made.compute_loss

    def counted(*args, **kwargs):
        losses.append(compute_loss(*args, **kwargs))
        return losses[-1]

    made.compute_loss = counted
    made.train()
    return history(made, *LOGGED), lengths, len(losses)


def test_ranks_may_begin_with_batches_of_other_sizes(pair, tmp_path):
    expected, _, num_losses = pair.run(train_padded, 2, transformers.Trainer, tmp_path)[0]
    (found, lengths, num_losses_found), (_, there, _) = pair.run(train_padded, 2, Trainer, tmp_path)
    assert lengths[0] != there[0]
    assert num_losses_found == num_losses
    same(found, expected)


def generated(mesh, make, compiles):
    """Tokens that each rank asks for by itself, and what its forward takes."""
    model = zgraph.compile(make(), stage=3) if compiles else make()
    model.eval()
    rank = mesh.get_local_rank()
    ids = torch.randint(2, 100, (2, 5), generator=torch.Generator().manual_seed(rank))
    found = model.generate(input_ids=ids, attention_mask=ids.bool(), do_sample=False, min_length=4, max_length=9 + rank)
    if compiles:
        assert isinstance(model.lm_head.weight, DTensor)
        with zgraph.gathered(model):
            assert model(input_ids=ids, labels=ids).loss.item() > 0
            if rank == 0:  # ranks do not meet in here
                model.generate(input_ids=ids, max_length=6)
    return found, str(inspect.signature(model.forward))


@pytest.mark.parametrize("make", [llama, t5])
def test_each_rank_generates_as_many_tokens_as_it_wants(pair, make):
    expected, found = pair.run(generated, 2, make, False), pair.run(generated, 2, make, True)
    for (tokens, forward), (tokens_plain, forward_plain) in zip(found, expected, strict=True):
        assert torch.equal(tokens, tokens_plain)
        assert forward == forward_plain
    assert found[0][0].shape != found[1][0].shape


def predicted(mesh, enables, folder):
    launched(mesh)
    kind = enable(transformers.Seq2SeqTrainer) if enables else transformers.Seq2SeqTrainer
    chosen = {**arguments(folder).to_dict(), "predict_with_generate": True, "generation_max_length": 9}
    args = transformers.Seq2SeqTrainingArguments(**{k: v for k, v in chosen.items() if v is not None})
    found = kind(args=args, model=t5()).predict(Rows(4))
    return found.predictions, found.metrics["test_loss"]


def test_seq2seq_predicts_by_generating(pair, tmp_path):
    expected, loss = pair.run(predicted, 2, False, tmp_path)[0]
    found, loss_found = pair.run(predicted, 2, True, tmp_path)[0]
    assert (found == expected).all()
    assert loss_found == pytest.approx(loss, rel=1e-5)


def accelerated(mesh, how, folder):
    """The losses of three steps of two micro-batches, clipped, by a script of one's own."""
    launched(mesh)
    if how == "by a file":
        os.environ.update(
            ACCELERATE_USE_FSDP="true", FSDP_VERSION="2", FSDP_RESHARD_AFTER_FORWARD="false", FSDP_AUTO_WRAP_POLICY="x"
        )
    compiles = how == "compiled"
    kind = ByFile if how == "by a file" else Accelerator
    accelerator = kind(cpu=True, gradient_accumulation_steps=2)
    model = zgraph.compile(llama(), stage=3) if compiles else llama()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    loader = DataLoader(Rows(), 2)
    if compiles:
        model, optimizer, loader = prepare(accelerator, model, optimizer, loader)
    else:
        model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    losses = []
    for batch in loader:
        with accelerator.accumulate(model):
            loss = model(**batch).loss
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
            optimizer.zero_grad()
        losses.append(accelerator.gather(loss.detach()).mean().item())
    if how == "by a file":
        assert isinstance(model.lm_head.weight, DTensor)
        accelerator.save_model(model, folder)
        with pytest.raises(UsageError, match="first rank's shards"):
            accelerator.save_state(folder)
    if compiles:
        assert accelerator.unwrap_model(model) is model
        with pytest.raises(UsageError, match="first rank's shards"):
            accelerator.save_state(folder)
        with pytest.raises(UsageError, match=r"call zgraph\.hf\.prepare\(accelerator, model"):
            Accelerator(cpu=True).prepare(zgraph.compile(llama(), stage=3))
    return losses


def test_an_accelerator_takes_a_compiled_model_and_compiles_as_its_file_says(pair, tmp_path):
    expected = pair.run(accelerated, 2, "plain", tmp_path)[0]
    for how in ("compiled", "by a file"):
        assert pair.run(accelerated, 2, how, tmp_path)[0] == pytest.approx(expected, rel=1e-5)
    saved = load_file(tmp_path / "model.safetensors")
    assert saved["model.embed_tokens.weight"].shape == (100, 32)


def test_an_accelerator_that_would_do_what_zgraph_does_is_refused(tmp_path):
    model = zgraph.compile(llama(), stage=3)
    accelerator = Accelerator(cpu=True)
    with pytest.raises(UsageError, match="is not compiled"):
        prepare(accelerator, llama())
    accelerator.state._mixed_precision = "bf16"
    with pytest.raises(UsageError, match=r"param_dtype=torch\.bfloat16"):
        prepare(accelerator, model)
    with pytest.raises(UsageError, match=r"call zgraph\.hf\.prepare"):
        accelerator.prepare(model)
    accelerator.state._mixed_precision = "no"
    with pytest.raises(UsageError, match=r"zgraph\.hf\.Trainer instead"):
        trainer(transformers.Trainer, tmp_path, {"model": model}).train()
    assert prepare(accelerator, model) is model
    assert accelerator.prepare(model) is model
