"""The command `launch`: ranks on this host, on others by ssh, or as a job of a cluster."""

from __future__ import annotations

import dataclasses
import logging
import os
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from zgraph.cli.app import FAILED, AsJson, app, console, ended_by, print_json
from zgraph.cli.clusters import PORT, WRITERS, Job
from zgraph.cli.ending import END_S, ended_within
from zgraph.cli.environment_report import cores
from zgraph.errors import UsageError

MAX_PROCESSOR_RANKS = 4
"""Ranks that are started on a host without GPUs, where nothing else is said: other cores are threads of theirs."""

FORWARDED = ("ZGRAPH_", "NCCL_", "GLOO_", "TORCH_", "OMP_", "CUDA_", "HIP_", "HF_")
"""Beginnings of the names of variables that hosts reached by ssh get; PYTHONPATH and PATH beside them."""

SECRET = ("TOKEN", "KEY", "SECRET", "PASSWORD", "PASSWD", "CREDENTIAL")
"""Parts of the names of those that they do not get: a command line is there for all to read."""

GRACE_S = 10.0
"""How long what runs on a host has to end by itself, once another has failed."""

MOST_BYTES = 1 << 20
"""Of a hostfile."""

SSH = ("ssh", "-tt", "-o", "BatchMode=yes", "-o", "ServerAliveInterval=15", "-o", "ServerAliveCountMax=4")
UNREACHED = 255
"""A terminal for each, so that what runs there ends when this end is closed; no question is asked. Its own exit code
where it reaches no host."""


@app.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
def launch(
    arguments: Annotated[
        list[str], typer.Argument(help="Options of torchrun, then the script, then what is passed to the script.")
    ],
) -> None:
    """Start a script on several ranks, as torchrun does: here, on hosts by ssh, or as a job of a cluster.

    Takes every option of torchrun. Without `--nproc-per-node` there is one rank for each GPU; without GPUs one for each
    core, at most 4. OMP_NUM_THREADS, where it is not set, shares the cores among them. The exit code is the script's.

    `--hostfile FILE` starts it on every host of the file, a line each (`gpu-3 slots=8`), over ssh; the first is where
    they meet. `--elastic MIN:MAX` starts replicas of `--ranks` ranks each, or one on each host, for a script that calls
    `zgraph.elastic`; one that dies is started again. `--print slurm`, `jobset` or `pytorchjob` prints what a cluster
    takes, for `--nnodes` hosts; `--submit` hands SLURM's to sbatch. These know `--job-name`, `--time`, `--partition`,
    `--account`, `--image`, `--cpus-only`.

    Example: `zgraph launch --nproc-per-node 2 train.py --steps 3`
    """
    options = _options(arguments)
    _check_together(options)
    if options.elastic:
        sys.exit(_elastic(options))
    if options.print or options.submit:
        _to_a_cluster(options)
    elif options.hostfile:
        sys.exit(_over_ssh(options, hosts_of(Path(options.hostfile))))
    else:
        _here(options)


def _options(arguments: list[str]) -> Namespace:
    """Parse arguments as torchrun does, with those of zgraph and another number of ranks where none is given."""
    from torch.distributed.run import get_args_parser

    parser: ArgumentParser = get_args_parser()
    parser.prog = "zgraph launch"
    parser.add_argument("--hostfile", default="")
    parser.add_argument("--print", default="", choices=[*WRITERS])
    for name in ("--submit", "--cpus-only"):
        parser.add_argument(name, action="store_true")
    for name in ("--time", "--partition", "--account", "--image"):
        parser.add_argument(name, default="")
    parser.add_argument("--job-name", default="zgraph")
    parser.add_argument("--elastic", default="")
    parser.add_argument("--ranks", dest="nproc_per_node")
    parser.set_defaults(master_addr="")
    if "PET_NPROC_PER_NODE" not in os.environ:
        parser.set_defaults(nproc_per_node="")
    return parser.parse_args(arguments)


ELSEWHERE = frozenset(
    ("nnodes", "nproc_per_node", "master_addr", "master_port", "module", "no_python", "max_restarts")
) | {"training_script", "training_script_args"}
"""Options that ranks on other hosts are started with; those of torchrun beside them are for this host alone."""

OF_CLUSTERS = ("submit", "cpus_only", "time", "partition", "account", "image")


def _check_together(options: Namespace) -> None:
    """Refuse options that would have no effect.

    Raises:
        UsageError: so one would.
    """
    to_cluster, over_ssh = bool(options.print or options.submit), bool(options.hostfile)
    if options.elastic and to_cluster:
        raise UsageError(
            "--elastic starts replicas now: leave --print and --submit out, or call it in the job's script"
        )
    if to_cluster and over_ssh:
        raise UsageError("--hostfile starts the script now, and --print and --submit make a job: give one of them")
    if not to_cluster and (given := [name for name in OF_CLUSTERS if getattr(options, name)]):
        raise UsageError(f"--{given[0].replace('_', '-')} is for a job of a cluster: give --print or --submit too")
    if not to_cluster and not over_ssh and not options.elastic:
        return
    usual = vars(_options(["script.py"]))
    known = ELSEWHERE | {"hostfile", "print", "job_name", "elastic", *OF_CLUSTERS}
    for name, value in vars(options).items():
        if name not in known and value != usual[name]:
            raise UsageError(
                f"--{name.replace('_', '-')} is for ranks that torchrun starts here; leave it out, or run torchrun on "
                "each host"
            )
    if (over_ssh or options.elastic) and options.nnodes != usual["nnodes"]:
        raise UsageError("--nnodes is the number of hosts in --hostfile, and of replicas in --elastic: leave it out")
    if to_cluster and (options.master_addr or options.master_port != usual["master_port"]):
        raise UsageError("the job's first host is where ranks meet: leave --master-addr and --master-port out")


def _ranks_by_default() -> int:
    import torch

    if torch.accelerator.is_available():
        return torch.accelerator.device_count()
    return min(cores(), MAX_PROCESSOR_RANKS)


def _num_ranks(options: Namespace) -> int:
    """Ranks on this host. Raises UsageError for what is no number of ranks."""
    from torch.distributed.run import determine_local_world_size

    options.nproc_per_node = options.nproc_per_node or str(_ranks_by_default())

    try:
        found: int = determine_local_world_size(options.nproc_per_node)
    except ValueError as error:
        raise UsageError(f"--nproc-per-node {options.nproc_per_node}: {error}") from None
    if found < 1:
        raise UsageError(f"--nproc-per-node must be 1 or more, not {found}")
    return found


# --- this host -------------------------------------------------------------------------------------------------------


def _here(options: Namespace) -> None:
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import run

    os.environ.setdefault("OMP_NUM_THREADS", str(max(cores() // _num_ranks(options), 1)))
    options.master_addr = options.master_addr or os.environ.get("PET_MASTER_ADDR", "127.0.0.1")
    for name in ("agent.server.api", "multiprocessing.api"):  # which tell of every signal that is handed on
        logging.getLogger(f"torch.distributed.elastic.{name}").setLevel(logging.ERROR)
    try:
        with ended_within(END_S):
            run(options)  # type: ignore[no-untyped-call]
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        sys.stderr.write(f"{error}\n")
        sys.exit(failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode)
    except SignalException as error:
        sys.exit(128 + error.sigval)


# --- a cluster -------------------------------------------------------------------------------------------------------


def _to_a_cluster(options: Namespace) -> None:
    """Print the job, or hand it to SLURM."""
    if options.submit and options.print not in ("", "slurm"):
        raise UsageError(f"--submit hands a job to SLURM: print {options.print}, and give it to kubectl apply -f -")
    least, _, most = options.nnodes.partition(":")
    if not least.isdigit() or most not in ("", least):
        raise UsageError(f"--nnodes must be a number of hosts here, not {options.nnodes}")
    if not options.nproc_per_node:
        raise UsageError("say how many ranks, and GPUs, each host of the job has: --nproc-per-node 8")
    text = WRITERS[options.print or "slurm"](
        Job(
            (options.training_script, *options.training_script_args),
            int(least),
            _num_ranks(options),
            options.job_name,
            gpus=not options.cpus_only,
            time=options.time,
            partition=options.partition,
            account=options.account,
            image=options.image,
            rest=_rest(options),
        )
    )
    if not options.submit:
        sys.stdout.write(text)
        return
    try:
        ended = subprocess.run(["sbatch"], input=text, text=True, check=False)
    except FileNotFoundError:
        raise UsageError("--submit needs sbatch, which is not here; leave it out, and the job is printed") from None
    sys.exit(ended.returncode)


def _rest(options: Namespace) -> list[str]:
    """Options of torchrun that any way of starting passes on."""
    found = [*(["-m"] if options.module else []), *(["--no-python"] if options.no_python else [])]
    return [*found, *([f"--max-restarts={options.max_restarts}"] if options.max_restarts else [])]


# --- hosts by ssh ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Host:
    """A host of a hostfile.

    Args:
        name: as ssh takes it.
        slots: ranks on it; 0 leaves it to `--nproc-per-node`, or else to that host.
    """

    name: str
    slots: int = 0


def hosts_of(path: Path) -> list[Host]:
    """The hosts of a hostfile, as MPI and DeepSpeed have it: `name slots=8` a line; behind # is a remark.

    Raises:
        UsageError: there is no such file, a line means nothing, or a host is there twice.
    """
    try:
        with path.open("rb") as file:
            text = file.read(MOST_BYTES + 1).decode()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--hostfile {path}: {error}") from None
    if len(text) > MOST_BYTES:
        raise UsageError(f"--hostfile {path} has more than {MOST_BYTES:,} bytes")
    found: list[Host] = []
    for number, line in enumerate(text.splitlines(), 1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        name, slots = words[0], words[1].removeprefix("slots=") if len(words) > 1 else "0"
        is_number = slots.isascii() and slots.isdigit() and len(slots) < 6
        if len(words) > 2 or not is_number or name.startswith("-"):
            raise UsageError(f'{path}, line {number}: "{line.strip()[:80]}" is no host; write "gpu-3 slots=8"')
        if name in {host.name for host in found}:
            raise UsageError(f"{path}, line {number}: {name[:80]} is there twice")
        found.append(Host(name, int(slots)))
    if not found:
        raise UsageError(f"{path} names no host")
    return found


def command_on(
    host: Host, number: int, hosts: Sequence[Host], options: Namespace, more: Mapping[str, str] | None = None
) -> str:
    """The command of one host, for its shell; `more` are variables that are set there."""
    names = (n for n in os.environ if n.startswith(FORWARDED) or n in ("PYTHONPATH", "PATH"))
    kept = {n: os.environ[n] for n in names if not any(part in n.upper() for part in SECRET)}
    place = hosts[0].name.rpartition("@")[2]
    port, slots = options.master_port or PORT, host.slots or options.nproc_per_node
    arguments = [
        *("--nnodes", str(len(hosts)), "--node-rank", str(number)),
        *(("--nproc-per-node", str(slots)) if slots else ()),
        *("--master-addr", options.master_addr or place, "--master-port", str(port)),
        *_rest(options),
        *(options.training_script, *options.training_script_args),
    ]
    variables = [f"{name}={value}" for name, value in sorted({**kept, **(more or {})}.items())]
    command = shlex.join(["env", *variables, sys.executable, "-m", "zgraph", "launch", *arguments])
    return f"cd {shlex.quote(os.getcwd())} && exec {command}"


def _over_ssh(options: Namespace, hosts: Sequence[Host]) -> int:
    """Run on all hosts; the exit code of the first that fails, when the others are ended."""
    running: list[subprocess.Popen[bytes]] = []
    ended, first = threading.Event(), list[tuple[str, int]]()
    signal.signal(signal.SIGTERM, ended_by)
    signal.signal(signal.SIGHUP, ended_by)

    def follow(host: Host, process: subprocess.Popen[bytes]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            sys.stdout.write(f"{host.name}: {line.decode(errors='replace').rstrip()}\n")
            sys.stdout.flush()
        if (code := process.wait()) and not first:
            first.append((host.name, code))
            ended.set()
        if all(other.poll() is not None for other in running):
            ended.set()

    try:
        for number, host in enumerate(hosts):
            command = [*SSH, "--", host.name, command_on(host, number, hosts, options)]
            pipes: Any = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
            running.append(subprocess.Popen(command, **pipes))
        threads = [threading.Thread(target=follow, args=pair) for pair in zip(hosts, running, strict=True)]
        for thread in threads:
            thread.start()
        ended.wait()
    except FileNotFoundError:
        raise UsageError("--hostfile needs ssh, which is not here") from None
    finally:
        _end(running)
    for thread in threads:
        thread.join()
    if not first:
        return 0
    name, code = first[0]
    sys.stderr.write(f"zgraph: {name} ended with exit code {code}; the others were ended\n")
    if code == UNREACHED:
        sys.stderr.write(f"zgraph: ssh may not reach it without a password: try `ssh -o BatchMode=yes {name} true`\n")
    return code if code > 0 else 128 - code


def _elastic(options: Namespace) -> int:
    """Run replicas of an elastic job; the exit code."""
    import torch

    from zgraph.cli import elastic_launching as elastic
    from zgraph.environment import read_range

    least, most = read_range(options.elastic, "--elastic")
    host = options.master_addr or "127.0.0.1"
    if options.hostfile:
        hosts = hosts_of(Path(options.hostfile))
        if len(hosts) < most:
            raise UsageError(f"--elastic {options.elastic} takes {most} hosts, one for each replica, not {len(hosts)}")
        host = options.master_addr or socket.gethostname()
        inner = Namespace(**{**vars(options), "master_addr": "", "master_port": None})  # those are the store's
        start = elastic.over_ssh(
            SSH, [one.name for one in hosts], lambda at, more: command_on(hosts[at], 0, [hosts[at]], inner, more)
        )
    else:
        num_ranks = _num_ranks(options)
        gpus = torch.cuda.device_count() if torch.accelerator.is_available() else 0
        devices = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(gpus)))).split(",") if gpus else []
        if devices and len(devices) < most * num_ranks:
            raise UsageError(f"{most} replicas of {num_ranks} ranks take more than the {len(devices)} GPUs here")
        os.environ.setdefault("OMP_NUM_THREADS", str(max(cores() // (most * num_ranks), 1)))
        python = [] if options.no_python else [sys.executable, *(["-m"] if options.module else [])]
        command = [*python, options.training_script, *options.training_script_args]
        start = elastic.ranks_here(command, num_ranks, devices)
    signal.signal(signal.SIGTERM, ended_by)
    signal.signal(signal.SIGHUP, ended_by)
    again = shlex.join(["zgraph", *sys.argv[1:]])
    restarts = options.max_restarts or elastic.MOST_RESTARTS
    return elastic.Launcher(start, host, least, most, restarts, again, options.master_port or 0).run()


def _end(running: Sequence[subprocess.Popen[bytes]]) -> None:
    """End what still runs; what does not end by itself is killed."""
    for process in running:
        if process.poll() is None:
            process.terminate()
    until = time.monotonic() + GRACE_S
    for process in running:
        try:
            process.wait(max(until - time.monotonic(), 0.0))
        except subprocess.TimeoutExpired:
            process.kill()


@app.command()
def doctor(
    folder: Annotated[Path, typer.Option(help="Where checkpoints are to go: its disk is timed.")] = Path("."),
    as_json: AsJson = False,
) -> None:
    """Check all ranks before training: versions, clocks, speed of each device, disk and link.

    Alone it checks this machine. Started by a launcher (`zgraph launch --hostfile hosts -m zgraph doctor`), all of its
    ranks. The exit code is 1 if something is wrong.

    Example: `zgraph doctor --folder .`
    """
    import torch

    from zgraph.compiler.checkup import check_ranks
    from zgraph.runtime.rendezvous import join_ranks

    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        join_ranks("nccl" if torch.cuda.is_available() else "gloo")
    found = check_ranks(folder)
    is_first = os.environ.get("RANK", "0") == "0"
    if is_first:
        if as_json:
            print_json({"ranks": [dataclasses.asdict(one) for one in found.ranks], "problems": found.problems})
        else:
            console().print(found.table())
            for problem in found.problems or (f"{len(found.ranks)} ranks are alike, and none is slow",):
                console().print(problem, highlight=False)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    if is_first and found.problems:
        raise typer.Exit(FAILED)
