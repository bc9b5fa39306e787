"""Training that is recorded on several ranks, and a profile from it."""

from pathlib import Path

from torch.distributed.device_mesh import DeviceMesh

import zgraph
from zgraph.runfile.records import read_record

from . import zoo
from .pool import Pool


def losses(mesh: DeviceMesh, record: str | None) -> list[float]:
    """Losses of a few steps on this rank."""
    recipe = zgraph.recipe(3).replace("bucket", "bucket(max_bytes=64KiB)")
    model = zgraph.compile(zoo.builder("llama")(), mesh=mesh, passes=recipe, record=record)
    found = []
    for step in range(7):
        loss = model(**zoo.batch("llama", 10 * step + mesh.get_rank())).loss
        loss.backward()
        found.append(loss.item())
    return found


def test_each_rank_keeps_its_own(pool: Pool, tmp_path: Path) -> None:
    assert pool.run(losses, 2, str(tmp_path)) == pool.run(losses, 2, None)
    assert {p.name for p in tmp_path.iterdir()} == {"run.zg"} | {
        f"rank-{r}.{kind}" for r in (0, 1) for kind in ("json", "steps")
    }
    found = read_record(tmp_path)
    assert [r.num_steps for r in found.ranks] == [1, 1]
    assert found.num_steps == 4
    graph = found.run.graph()
    starts = {n.name for n in graph.nodes if n.op.endswith("_start")}
    assert found.transfers_us.keys() == starts, "the lane knows of each when it was over"
    assert all(us > 0 for us in found.transfers_us.values())
    calibrated = zgraph.calibrate(tmp_path)
    assert 0.2 < calibrated.runs[0].measured_us / calibrated.runs[0].after_us < 5
