"""A run that one job saved, replayed by another on as many ranks."""

from pathlib import Path

from torch.distributed.device_mesh import DeviceMesh

import zgraph

from . import zoo
from .pool import Pool


def losses(mesh: DeviceMesh, path: str, saves: bool) -> tuple[list[float], str]:
    """A few steps on this rank, and the plan that they ran."""
    options = {"save": path} if saves else {"passes": path}
    model = zgraph.compile(zoo.builder("vit")(), mesh=mesh, stage=3, **options)
    found = []
    for step in range(2):
        loss = model(**zoo.batch("vit", 10 * step + mesh.get_rank())).loss
        loss.backward()
        found.append(loss.item())
    (entry,) = zgraph.report(model).entries
    return found, entry.plan.fingerprint


def test_a_saved_run_is_replayed_on_all_ranks(pool: Pool, tmp_path: Path) -> None:
    path = str(tmp_path / "run.zg")
    saved = pool.run(losses, 2, path, True)
    assert [p.name for p in tmp_path.iterdir()] == ["run.zg"]
    assert pool.run(losses, 2, path, False) == saved
