"""Jobs of clusters against what the clusters take: fields and types of Kubernetes' kinds, and options of sbatch."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from zgraph.cli.clusters import Job, job_set, pytorch_job, sbatch

KINDS = yaml.safe_load(Path(__file__).with_name("kinds.yaml").read_text())
TYPES = {"string": str, "integer": int, "boolean": bool, "object": dict, "array": list}

SBATCH = {
    **dict.fromkeys(
        ("account", "chdir", "constraint", "cpus-per-task", "error", "gpus-per-node", "job-name", "mem", "nodes"), True
    ),
    **dict.fromkeys(("ntasks-per-node", "output", "partition", "qos", "reservation", "time"), True),
    **dict.fromkeys(("exclusive", "nice"), None),
    **dict.fromkeys(("requeue", "no-requeue", "overcommit"), False),
}
"""Options of sbatch, and whether each takes a value; None where it may. Source: sbatch(1) of SLURM 24.05."""

JOBS = [
    Job(["train.py", "--x", "it's"], 4, 8, image="repo/image:1"),
    Job(["train.py"], 1, 1, gpus=False, image="i", time="2-12:00:00", partition="big", account="a.b"),
    Job(["-m", "train"], 128, 8, name="long-name", image="i", rest=["--log-dir", "logs"]),
]


def problems(kind: Any, found: Any, place: str = "") -> Iterator[str]:
    """Parts of a document that its kind does not have."""
    if isinstance(kind, str):
        wanted = tuple(TYPES[name] for name in kind.split(" or "))
        if not isinstance(found, wanted) or (isinstance(found, bool) and "boolean" not in kind):
            yield f"{place} is {found!r}, not {kind}"
    elif isinstance(kind, list):
        if not isinstance(found, list):
            yield f"{place} is no list"
            return
        for number, item in enumerate(found):
            yield from problems(kind[0], item, f"{place}[{number}]")
    elif not isinstance(found, dict):
        yield f"{place} is {found!r}, not an object"
    else:
        fields = {name.rstrip("!"): field for name, field in kind.items()}
        yield from (f"{place} has no {n[:-1]}" for n in kind if n.endswith("!") and n[:-1] not in found)
        for name, value in found.items():
            field = fields.get(name, fields.get("*"))
            if field is None:
                yield f"{place} has a field {name}, which nobody knows"
            else:
                yield from problems(field, value, f"{place}.{name}")


@pytest.mark.parametrize("job", JOBS)
@pytest.mark.parametrize(("kind", "written"), [("JobSet", job_set), ("PyTorchJob", pytorch_job)])
def test_kubernetes_takes_it(kind: str, written: Any, job: Job) -> None:
    found = yaml.safe_load(written(job))
    assert found["kind"] == kind
    assert [*problems(KINDS[kind], found)] == []


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda found: found["spec"].update(replicas=1), ".spec has a field replicas"),
        (lambda found: found["spec"]["replicatedJobs"][0].pop("name"), ".spec.replicatedJobs[0] has no name"),
        (lambda found: found["spec"]["failurePolicy"].update(maxRestarts="0"), "maxRestarts is '0', not integer"),
        (lambda found: found["spec"]["failurePolicy"].update(maxRestarts=True), "maxRestarts is True, not integer"),
        (lambda found: found["spec"].update(replicatedJobs={}), ".spec.replicatedJobs is no list"),
        (lambda found: found.update(spec="x"), ".spec is 'x', not an object"),
    ],
)
def test_what_kubernetes_would_refuse_is_found(change: Any, said: str) -> None:
    found = yaml.safe_load(job_set(JOBS[0]))
    change(found)
    assert said in "; ".join(problems(KINDS["JobSet"], found))


@pytest.mark.parametrize("job", JOBS)
def test_sbatch_takes_it(job: Job) -> None:
    lines = sbatch(job).splitlines()
    given = [line for line in lines if line.startswith("#SBATCH")]
    assert lines[0].startswith("#!"), "sbatch refuses a script without an interpreter"
    assert given == lines[1 : 1 + len(given)], "options behind the first command are ignored"
    for line in given:
        found = re.fullmatch(r"#SBATCH --([a-z-]+)(=\S+)?", line)
        assert found is not None, line
        assert SBATCH[found[1]] in (None, found[2] is not None), line
    names = [line.split("--")[1].split("=")[0] for line in given]
    assert len(set(names)) == len(names)
