"""The Trainer where ranks compute together: their batches, steps, tokens and checkpoints are those of fewer ranks."""

import math

import pytest
import torch
import transformers
from accelerate import Accelerator
from accelerate.parallelism_config import ParallelismConfig
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, IterableDataset

from tests.deep import deep
from tests.distributed.tensor_zoo import EXPERTS
from tests.hf.test_ranks import launched
from tests.hf.training import Rows, arguments, history, llama, same, trainer
from zgraph.errors import ConfigError, UsageError
from zgraph.hf import Accelerator as Ours
from zgraph.hf import Trainer, TrainingArguments
from zgraph.hf.config import filled
from zgraph.hf.parallelism import asked_together

LOGGED = ("loss", "grad_norm", "eval_loss", "num_input_tokens_seen", "total_flos")


class Streamed(IterableDataset):
    """Rows without a length."""

    def __iter__(self):
        rows = Rows()
        return (rows[index] for index in range(len(rows)))


def words(prediction):
    """A metric that says how many rows there were."""
    return {"rows": len(prediction.label_ids), "sum": float(prediction.label_ids.sum())}


def trained(mesh, kind, folder, axes, resume=None, rows=2, num_predicted=7):
    """Logs of a Trainer, its counts, and its predictions."""
    if mesh is not None:
        launched(mesh)
    saves = {"save_strategy": "steps", "save_steps": 3} if kind is Trainer else {}
    given = {"zgraph": {"zero_optimization": {"stage": 3}, **axes}} if kind is Trainer else {}
    made = trainer(
        kind,
        folder,
        {"compute_metrics": words, **given},
        eval_strategy="steps",
        eval_steps=3,
        include_num_input_tokens_seen="all",
        per_device_train_batch_size=rows,
        **saves,
    )
    made.train(resume_from_checkpoint=resume)
    if kind is Trainer:
        assert isinstance(made.model.lm_head.weight, DTensor)
    found = made.predict(Rows(num_predicted))
    num_steps = found.metrics["test_steps_per_second"] * found.metrics["test_runtime"]
    counts = found.metrics["test_rows"], found.metrics["test_sum"], round(num_steps), made.state.total_flos
    return history(made, *LOGGED), counts, found.metrics["test_loss"]


def test_two_ranks_that_compute_together_are_one(pair, tmp_path):
    axes = {"tensor_parallel": {"autotp_size": 2}}
    expected, counts, loss = trained(None, transformers.Trainer, tmp_path / "plain", {}, None, 2, 8)
    found, counts_found, loss_found = pair.run(trained, 2, Trainer, tmp_path / "ours", axes, None, 2, 8)[0]
    same(found, expected)
    assert counts_found == counts
    assert loss_found == pytest.approx(loss, rel=1e-5)


@pytest.mark.parametrize("axes", [deep({"tensor_parallel": {"autotp_size": 2}}), deep({"sequence_parallel_size": 2})])
def test_training_goes_on_from_a_checkpoint_in_the_same_layout_and_in_another(pair, tmp_path, axes):
    expected, counts, _ = trained(None, transformers.Trainer, tmp_path / "plain", {})
    ours = tmp_path / "ours"
    found, counts_found, _ = pair.run(trained, 2, Trainer, ours, axes)[0]
    same(found, expected)
    assert counts_found == counts  # of as many rows as no number of ranks divides
    half = str(ours / "checkpoint-3")
    assert pair.run(trained, 2, Trainer, tmp_path / "again", axes, half)[0][0] == found
    apart = pair.run(trained, 2, Trainer, tmp_path / "apart", {}, half, 1)[0][0]
    same([e for e in apart if e[1] == "loss"], [e for e in expected if e[1] == "loss"])


@pytest.mark.parametrize("axes", [deep({"tensor_parallel": {"autotp_size": 2}, "sequence_parallel_size": 2})])
def test_four_ranks_with_two_axes_are_one(pool, tmp_path, axes):
    expected, counts, _ = trained(None, transformers.Trainer, tmp_path / "plain", {})
    found, counts_found, _ = pool.run(trained, 4, Trainer, tmp_path / "ours", axes)[0]
    same(found, expected)
    assert counts_found == counts


@pytest.mark.parametrize("axes", [deep({"tensor_parallel": {"autotp_size": 2}})])
def test_four_ranks_of_which_two_compute_together_are_two(pool, pair, tmp_path, axes):
    expected, counts, _ = pair.run(trained, 2, transformers.Trainer, tmp_path / "plain", {})[0]
    found, counts_found, _ = pool.run(trained, 4, Trainer, tmp_path / "ours", axes)[0]
    same(found, expected)
    assert counts_found[:3] == counts[:3]


def over_experts(mesh, folder, axes):
    """Losses and norms of a small Mixtral at stage 3."""
    launched(mesh)
    torch.manual_seed(0)
    config = transformers.MixtralConfig(**{**EXPERTS, "vocab_size": 100}, num_local_experts=4)
    model = transformers.MixtralForCausalLM(config)
    given = {"zgraph": {"zero_optimization": {"stage": 3}, **axes}, "model": model}
    made = trainer(Trainer, folder, given, eval_strategy="steps", eval_steps=2, max_steps=2)
    made.train()
    return history(made, "loss", "grad_norm", "eval_loss")


@pytest.mark.parametrize("num_ranks", [deep(2)])
def test_ranks_that_share_experts_train_as_those_that_do_not(pair, tmp_path, num_ranks):
    """Each has a batch of its own, which counts once."""
    apart = pair.run(over_experts, num_ranks, tmp_path / "apart", {})
    together = pair.run(over_experts, num_ranks, tmp_path / "together", {"expert_parallel": {"autoep_size": 2}})
    for found, expected in zip(together, apart, strict=True):
        same(found, expected)


def streamed(mesh, folder):
    """Losses over rows without a length, by arguments of zgraph's own."""
    launched(mesh)
    chosen = {k: v for k, v in arguments(folder, max_steps=2).to_dict().items() if v is not None}
    args = TrainingArguments(**chosen, tensor_parallel=2)
    with pytest.raises(UsageError, match=r"tensor_parallel= of zgraph\.hf\.TrainingArguments is read by"):
        transformers.Trainer(args=args, model=llama())
    made = Trainer(args=args, model=llama(), train_dataset=Streamed())
    made.train()
    assert made.get_total_train_batch_size(args) == 4
    return history(made, "loss")


@pytest.mark.parametrize("num_ranks", [deep(2)])
def test_rows_without_a_length_are_read_by_all_ranks(pair, tmp_path, num_ranks):
    plain = transformers.Trainer(args=arguments(tmp_path, max_steps=2), model=llama(), train_dataset=Streamed())
    plain.train()
    same(pair.run(streamed, num_ranks, tmp_path)[0], history(plain, "loss"))


def accelerated(mesh, theirs):
    """Losses by accelerate's loop, and the rows that are gathered."""
    if mesh is not None:
        launched(mesh)
    accelerator = Ours(cpu=True, parallelism_config=theirs) if theirs else Accelerator(cpu=True)
    model = llama()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    model, optimizer, loader = accelerator.prepare(model, optimizer, DataLoader(Rows(7), 2))
    losses, rows = [], []
    for batch in loader:
        loss = model(**batch).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(accelerator.gather(loss.detach()).mean().item())
        rows.append(accelerator.gather_for_metrics(batch["input_ids"])[:, 0].tolist())
        rows.append(accelerator.gather_for_metrics(["one", "two"], use_gather_object=True)[:1])
    return losses, rows


def reduced(mesh):
    """Sums and means of ranks that share a batch, and how many batches and which number they have."""
    launched(mesh)
    accelerator = Ours(cpu=True, zgraph={"tensor_parallel": 2})
    given = {"a": torch.tensor([3.0, 5.0]), "b": [torch.tensor(7.0)]}
    found = [accelerator.reduce(given), accelerator.reduce(given, "mean")]
    return [(f["a"].tolist(), f["b"][0].item()) for f in found], accelerator.num_processes, accelerator.process_index


def test_ranks_that_share_a_batch_reduce_it_once(pair):
    for (summed, averaged), count, number in pair.run(reduced, 2):
        assert summed == ([3.0, 5.0], 7)
        assert averaged == ([3.0, 5.0], 7)
        assert (count, number) == (1, 0)


@pytest.mark.parametrize("num_ranks", [deep(2)])
def test_an_accelerator_takes_a_parallelism_config(pair, num_ranks):
    (losses, rows), _ = pair.run(accelerated, num_ranks, ParallelismConfig(tp_size=2))
    expected, expected_rows = accelerated(None, None)
    assert losses == pytest.approx(expected, rel=1e-5)
    assert rows == expected_rows


def test_what_arguments_say_is_filled_in(tmp_path):
    args = arguments(tmp_path)
    args.parallelism_config = ParallelismConfig(tp_size=2, sp_size=2)
    asked = asked_together(args, 8)
    assert (asked.tensor, asked.context, asked.expert) == (2, 2, 1)
    args.parallelism_config = None
    assert "tensor_parallel" not in filled({}, args)
    assert filled({"tensor_parallel": {"autotp_size": "auto"}}, args)["tensor_parallel"] == {"autotp_size": 1}
    ours = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, expert_parallel=2)
    assert filled({}, ours)["expert_parallel"] == {"autoep_size": 2, "enabled": True}


@pytest.mark.parametrize(
    ("theirs", "own", "num_ranks", "said"),
    [
        ({"tp_size": 2}, {}, 3, "3 ranks are no multiple of tp_size x cp_size x sp_size = 2"),
        ({"tp_size": 2, "dp_shard_size": 3}, {}, 8, "is 1 x 3, and 4 ranks have"),
        ({"tp_size": 2, "dp_shard_size": 2, "dp_replicate_size": 2}, {}, 8, "all others shard; leave it out"),
        ({"tp_size": 2}, {"tensor_parallel": 4}, 8, "it is 4, and 2 by parallelism_config"),
        ({}, {"context_parallel": 0}, 8, "context_parallel: it must be a number of ranks, 1 or more, not 0"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(tmp_path, theirs, own, num_ranks, said):
    args = arguments(tmp_path)
    for name, size in own.items():
        setattr(args, name, size)
    args.parallelism_config = ParallelismConfig(**theirs)
    with pytest.raises(ConfigError, match=said):
        asked_together(args, num_ranks)


def test_copies_of_shards_are_an_axis_of_the_mesh(tmp_path):
    args = arguments(tmp_path)
    args.parallelism_config = ParallelismConfig(dp_replicate_size=2, dp_shard_size=2)
    assert asked_together(args, 4).copies == 2
    assert math.prod(asked_together(args, 4)[:3]) == 1
