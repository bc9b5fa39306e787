"""AdamW in few bytes over shards: to the last bit what one rank does, whatever the number of ranks and the stage."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import DeviceMesh

import zgraph
from zgraph.engine.checkpoint.tensors import whole
from zgraph.optim import CompactAdamW

from .nets import Decoder, built
from .pool import Pool
from .test_flat_updates import give_gradients


class Wide(nn.Module):
    """Matrices with rows that no number of ranks divides, of one block and of several, and a vector."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(300, 65)
        self.last = nn.Linear(65, 67)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.first(x)).square().mean()


def updated(mesh: DeviceMesh, stage: int, dtype: torch.dtype, bits: int, offload: str | None = None) -> str:
    """A digest of all parameters and states after steps, in half of which another optimizer has taken the state."""
    model = zgraph.compile(built(Wide)().to(dtype), stage=stage, mesh=mesh, offload=offload)
    optimizer = CompactAdamW(model.parameters(), lr=1e-2, state_bits=bits, seed=3)
    for step in range(6):
        if step == 3:
            state = get_optimizer_state_dict(model, optimizer)
            optimizer = CompactAdamW(model.parameters(), lr=1e-2, state_bits=bits, seed=3)
            set_optimizer_state_dict(model, optimizer, state)
        give_gradients(model, step)
        optimizer.step()
    found = hashlib.sha256()
    for parameter in model.parameters():
        for tensor in (parameter, *(optimizer.state[parameter][key] for key in sorted(optimizer.state[parameter]))):
            found.update(whole(tensor).contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def test_any_number_of_ranks_does_the_same_to_the_last_bit(pool: Pool) -> None:
    for dtype, bits in ((torch.bfloat16, 8), (torch.bfloat16, 32), (torch.float32, 8)):
        (alone,) = pool.run(updated, 1, 0, dtype, bits)
        for num_ranks, stage in ((2, 3), (3, 3), (3, 1), (2, 0)):
            assert pool.run(updated, num_ranks, stage, dtype, bits) == [alone] * num_ranks, (dtype, bits, stage)
        assert pool.run(updated, 2, 3, dtype, bits, "optimizer") == [alone] * 2, (dtype, bits, "on the host")


def at_rest(mesh: DeviceMesh, state_bits: int) -> float:
    """Bytes of parameters, gradients and states on this rank, over its share of the parameters."""
    model = zgraph.compile(built(Decoder)().bfloat16(), stage=3, mesh=mesh)
    optimizer = CompactAdamW(model.parameters(), state_bits=state_bits)
    give_gradients(model, 0)
    optimizer.step()
    states = [s for state in optimizer.state.values() for key, s in state.items() if key != "step"]
    tensors = [*model.parameters(), *(p.grad for p in model.parameters()), *states]
    return sum(t.to_local().nbytes for t in tensors) * mesh.size() / sum(p.numel() for p in model.parameters())


def test_at_rest_a_rank_holds_six_bytes_of_each_parameter_it_has(pool: Pool) -> None:
    assert max(pool.run(at_rest, 2, 8)) <= 6.2
    assert min(pool.run(at_rest, 2, 32)) > 11.9


CONFIG = {"train_batch_size": 12, "gradient_clipping": 0.0}


def resumed(mesh: DeviceMesh, folder: str, stage: int, num_steps: int) -> str:
    """A digest of the parameters after steps with given gradients, from a checkpoint if there is one."""
    config = CONFIG | {"zero_optimization": {"stage": stage}}
    engine, optimizer, _, _ = zgraph.initialize_engine(
        model=built(Wide)().bfloat16(), optimizer=lambda p: CompactAdamW(p, lr=1e-2, seed=5), config=config, mesh=mesh
    )
    assert optimizer is not None
    begun = engine.load_checkpoint(folder)[0] is not None
    for step in range(3, 3 + num_steps) if begun else range(3):
        give_gradients(engine.module, step)
        optimizer.step()
    if not begun:
        engine.save_checkpoint(folder)
    values = [whole(p, torch.float32).numpy().tobytes() for p in engine.module.parameters()]
    return hashlib.sha256(b"".join(values)).hexdigest()


def test_codes_are_loaded_by_another_number_of_ranks(pool: Pool, tmp_path: Path) -> None:
    pool.run(resumed, 2, str(tmp_path), 3, 3)
    (alone,) = pool.run(resumed, 1, str(tmp_path), 0, 3)
    for num_ranks, stage in ((3, 3), (4, 1)):
        assert pool.run(resumed, num_ranks, str(tmp_path), stage, 3) == [alone] * num_ranks
