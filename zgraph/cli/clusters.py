"""Jobs of several hosts as what a cluster takes: a batch script of SLURM, a JobSet or a PyTorchJob of Kubernetes.

Each host runs torchrun with the place of the first, which numbers the ranks. Names and arguments come from the user and
are quoted, for the shell and for YAML.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml  # type: ignore[import-untyped]

from zgraph.errors import UsageError

PORT = 29500

_LABEL = re.compile(r"[a-z0-9]([-a-z0-9]{0,50}[a-z0-9])?", re.ASCII)
_DURATION = re.compile(r"(\d+-)?\d{1,3}(:\d{2}){0,2}", re.ASCII)


@dataclass(frozen=True)
class Job:
    """A script on several hosts.

    Args:
        command: the script and its arguments.
        num_hosts: hosts.
        num_ranks: ranks on each.
        name: of the job: lower-case letters, digits and dashes.
        gpus: whether each rank has a GPU.
        time: of SLURM, as `12:00:00`; empty takes the partition's.
        partition, account: of SLURM; empty takes the user's own.
        image: of the container, on Kubernetes.
        rest: other options of torchrun.

    Raises:
        UsageError: a name, a time or a number means nothing.
    """

    command: Sequence[str]
    num_hosts: int
    num_ranks: int
    name: str = "zgraph"
    gpus: bool = True
    time: str = ""
    partition: str = ""
    account: str = ""
    image: str = ""
    rest: Sequence[str] = ()

    def __post_init__(self) -> None:
        if self.num_hosts < 1 or self.num_ranks < 1:
            raise UsageError(f"a job has at least one host and one rank, not {self.num_hosts} x {self.num_ranks}")
        if not _LABEL.fullmatch(self.name):
            raise UsageError(f"--job-name must be lower-case letters, digits and dashes, not {self.name[:60]!r}")
        if self.time and not _DURATION.fullmatch(self.time):
            raise UsageError(f"--time must be as 12:00:00 or 2-12:00:00, not {self.time[:60]!r}")
        for option, word in (("--partition", self.partition), ("--account", self.account)):
            if word and not re.fullmatch(r"[\w.,+-]{1,100}", word, re.ASCII):
                raise UsageError(f"{option} must be a name, not {word[:60]!r}")

    def torchrun(self, *place: str) -> str:
        """The command of one host, for a shell; `place` is text of the shell and not quoted again."""
        sizes = f"torchrun --nnodes {self.num_hosts} --nproc-per-node {self.num_ranks}"
        return " ".join((sizes, *place, shlex.join([*self.rest, *self.command])))


def sbatch(job: Job) -> str:
    """A batch script of SLURM: one torchrun a node, which meet at the first node of the job.

    `SLURM_GPUS_PER_NODE` and the like are SLURM's own; see sbatch(1).
    """
    options = {
        "job-name": job.name,
        "nodes": str(job.num_hosts),
        "ntasks-per-node": "1",
        "gpus-per-node": str(job.num_ranks) if job.gpus else "",
        "exclusive": None,
        "time": job.time,
        "partition": job.partition,
        "account": job.account,
    }
    given = [f"#SBATCH --{name}" + (f"={text}" if text else "") for name, text in options.items() if text != ""]
    place = ("--rdzv-backend c10d", f'--rdzv-endpoint "$first_host:{PORT}"', '--rdzv-id "$SLURM_JOB_ID"')
    lines = [
        "#!/usr/bin/env bash",
        *given,
        "set -euo pipefail",
        'first_host=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)',
        f"srun --kill-on-bad-exit=1 {job.torchrun(*place)}",
    ]
    return "\n".join(lines) + "\n"


def job_set(job: Job) -> str:
    """A JobSet of Kubernetes (`jobset.x-k8s.io/v1alpha2`): one Indexed Job, a pod for each host."""
    place = (
        '--node-rank "$JOB_COMPLETION_INDEX"',
        f"--master-addr {job.name}-hosts-0-0.{job.name} --master-port {PORT}",
    )
    pod = {"restartPolicy": "Never", **_containers(job, "train", place)}
    spec = {
        "parallelism": job.num_hosts,
        "completions": job.num_hosts,
        "completionMode": "Indexed",
        "backoffLimit": 0,
        "template": {"spec": pod},
    }
    return _yaml(
        {
            "apiVersion": "jobset.x-k8s.io/v1alpha2",
            "kind": "JobSet",
            "metadata": {"name": job.name},
            "spec": {
                "network": {"enableDNSHostnames": True, "publishNotReadyAddresses": True, "subdomain": job.name},
                "failurePolicy": {"maxRestarts": 0},
                "replicatedJobs": [{"name": "hosts", "replicas": 1, "template": {"spec": spec}}],
            },
        }
    )


def pytorch_job(job: Job) -> str:
    """A PyTorchJob of Kubeflow (`kubeflow.org/v1`): a master and the other hosts, which it numbers."""
    place = ('--node-rank "$RANK"', '--master-addr "$MASTER_ADDR" --master-port "$MASTER_PORT"')
    pod = {"template": {"spec": _containers(job, "pytorch", place)}, "restartPolicy": "Never"}
    replicas = {"Master": {"replicas": 1, **pod}}
    if job.num_hosts > 1:
        replicas["Worker"] = {"replicas": job.num_hosts - 1, **pod}
    return _yaml(
        {
            "apiVersion": "kubeflow.org/v1",
            "kind": "PyTorchJob",
            "metadata": {"name": job.name},
            "spec": {"runPolicy": {"backoffLimit": 0}, "pytorchReplicaSpecs": replicas},
        }
    )


def _containers(job: Job, name: str, place: Sequence[str]) -> dict[str, Any]:
    if not job.image:
        raise UsageError("Kubernetes runs containers: give --image, one that has zgraph and the script")
    memory = {"name": "memory", "mountPath": "/dev/shm"}  # where NCCL and loaders share memory
    container: dict[str, Any] = {
        "name": name,
        "image": job.image,
        "command": ["bash", "-c", f"exec {job.torchrun(*place)}"],
        "volumeMounts": [memory],
    }
    if job.gpus:
        container["resources"] = {"limits": {"nvidia.com/gpu": job.num_ranks}}
    return {"containers": [container], "volumes": [{"name": "memory", "emptyDir": {"medium": "Memory"}}]}


def _yaml(found: Mapping[str, Any]) -> str:
    text: str = yaml.dump(found, Dumper=_Written, sort_keys=False, width=1000)
    return text


class _Written(yaml.SafeDumper):  # type: ignore[misc]
    """YAML without references, which what appears twice would become."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


WRITERS = {"slurm": sbatch, "jobset": job_set, "pytorchjob": pytorch_job}
"""Writers of `zgraph launch --print`, by its words."""
