"""A student and its teacher, sharded over ranks: the losses and gradients of a plain loop over DDP."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

import small
import zgraph
from tests.single.test_distillation import batch, plain_loss

from .pool import Pool


def train(mesh: DeviceMesh, stage: int, teacher_stage: int | None, kind: str) -> tuple[float, float, int, int]:
    """The largest relative differences of losses and of gradients over three steps, and the teacher's bytes at rest
    and whole.
    """
    torch.manual_seed(0)
    teacher = small.llama(num_layers=4)
    student = zgraph.prune_layers(teacher, [0, 3])
    plain, taught = copy.deepcopy(student), copy.deepcopy(teacher).eval()
    model = zgraph.distill(
        student, teacher, loss=kind, temperature=2.0, alpha=0.3, stage=stage, teacher_stage=teacher_stage, mesh=mesh
    )
    optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-2) for m in (model.student, plain)]
    losses = gradients = 0.0
    for step in range(3):
        given = batch(10 * step + dist.get_rank(), student.config.vocab_size)
        loss, wanted = model(**given).loss, plain_loss(plain, taught, given, kind)
        loss.backward()
        wanted.backward()
        losses = max(losses, abs(loss.item() - wanted.item()) / wanted.item())
        for (_, ours), (_, theirs) in zip(model.student.named_parameters(), plain.named_parameters(), strict=True):
            dist.all_reduce(theirs.grad, group=mesh.get_group())
            theirs.grad /= mesh.size()
            difference = (ours.grad.full_tensor() - theirs.grad).norm() / theirs.grad.norm()
            gradients = max(gradients, float(difference))
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    at_rest = sum(p.to_local().nbytes for p in model.teacher.parameters())
    return losses, gradients, at_rest, sum(p.nbytes for p in taught.parameters())


@pytest.mark.parametrize(
    ("stage", "teacher_stage", "kind"), [(3, None, "forward_kl"), (2, 3, "jsd"), (3, 0, "reverse_kl")]
)
def test_training_is_that_of_ddp(pool: Pool, stage: int, teacher_stage: int | None, kind: str) -> None:
    for losses, gradients, at_rest, whole in pool.run(train, 2, stage, teacher_stage, kind):
        assert losses < 1e-5
        assert gradients < 1e-4
        own = stage if teacher_stage is None else teacher_stage
        assert at_rest <= (whole if own == 0 else 0.6 * whole)
