"""Hosts to run ranks on: this machine as it is, or emulated hosts with a real bandwidth limit between them.

An emulated host is a network namespace. Each is cabled (a veth pair) to one switch (a bridge in a namespace
of its own), and a token bucket on both ends of the cable holds either direction to the link rate:

    host 0 [eth0]--tbf----tbf--[port0]  switch  [port1]--tbf----tbf--[eth0] host 1

All hosts share this machine's cores, memory and files; only the network between them is limited. The queue of
the token bucket is long (64 MB) on purpose: with a short one, packets drop and TCP's timings scatter.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks.errors import HostsUnavailable

BURST = "512k"
QUEUE_LIMIT = "64m"
PAYLOAD_SHARE = 0.956
SUBNET = "10.66.0"
INTERFACE = "eth0"


@dataclass(frozen=True)
class Host:
    """Where a rank runs.

    prefix: what to put before a command so that it runs there.
    interface: the network device that the collectives use.
    counts_bytes: whether what leaves `interface` is this host's traffic and nobody else's.
    """

    prefix: tuple[str, ...]
    interface: str
    counts_bytes: bool


@contextmanager
def loopback(num_hosts: int) -> Iterator[list[Host]]:
    """This machine, `num_hosts` times: no limit on the wire, and nothing that counts one rank's bytes."""
    yield [Host(prefix=(), interface="lo", counts_bytes=False)] * num_hosts


@contextmanager
def emulated(num_hosts: int, rate: str) -> Iterator[list[Host]]:
    """`num_hosts` namespaces behind links of `rate` (as tc spells it: "1gbit", "250mbit") in each direction.

    Everything is taken down when the block is left, by whatever way. Names are unique, so that two benchmarks
    may run at once.

    Raises HostsUnavailable if this machine cannot do it.
    """
    _require_tools()
    tag = f"zbench-{os.getpid()}-{secrets.token_hex(2)}"
    with ExitStack() as cleanup:
        switch = _add_namespace(f"{tag}-switch", cleanup)
        _run("ip", "-n", switch, "link", "add", "bridge", "type", "bridge")
        _run("ip", "-n", switch, "link", "set", "bridge", "up")
        hosts = []
        for index in range(num_hosts):
            name = _add_namespace(f"{tag}-host{index}", cleanup)
            _plug(name, switch, port=f"port{index}", address=f"{SUBNET}.{index + 1}/24", rate=rate)
            hosts.append(Host(("ip", "netns", "exec", name), INTERFACE, counts_bytes=True))
        yield hosts


def link_bytes_per_s(rate: str) -> float:
    """Payload that a link of this rate (as tc spells it) carries in a second: the limit counts headers too.

    >>> round(link_bytes_per_s("1gbit") / 1e6, 1)
    119.5

    Raises HostsUnavailable for what is no rate.
    """
    found = re.fullmatch(r"([\d.]+)(k|m|g)bit", rate)
    if found is None:
        raise HostsUnavailable(f"{rate!r} is no rate", "Write it as tc does: 300mbit, 1gbit, 10gbit")
    return float(found[1]) * {"k": 1e3, "m": 1e6, "g": 1e9}[found[2]] / 8 * PAYLOAD_SHARE


def sent_bytes(interface: str) -> int:
    """Bytes that left `interface` so far, headers included, as seen from the namespace of this process."""
    return int(Path(f"/sys/class/net/{interface}/statistics/tx_bytes").read_text())


def _add_namespace(name: str, cleanup: ExitStack) -> str:
    """Make a namespace with its loopback up; deleting it later deletes the devices inside it."""
    cleanup.callback(subprocess.run, ["ip", "netns", "delete", name], check=False, capture_output=True)
    _run("ip", "netns", "add", name)
    _run("ip", "-n", name, "link", "set", "lo", "up")
    return name


def _plug(host: str, switch: str, *, port: str, address: str, rate: str) -> None:
    """Cable a host to the switch and limit both ends of the cable."""
    _run("ip", "-n", host, "link", "add", INTERFACE, "type", "veth", "peer", "name", port, "netns", switch)
    _run("ip", "-n", switch, "link", "set", port, "master", "bridge", "up")
    _run("ip", "-n", host, "addr", "add", address, "dev", INTERFACE)
    _run("ip", "-n", host, "link", "set", INTERFACE, "up")
    for namespace, device in ((host, INTERFACE), (switch, port)):
        limits: Sequence[str] = ("rate", rate, "burst", BURST, "limit", QUEUE_LIMIT)
        _run("tc", "-n", namespace, "qdisc", "add", "dev", device, "root", "tbf", *limits)


def _require_tools() -> None:
    remedy = "Install iproute2 (Debian: apt-get install iproute2), or use --hosts loopback"
    for tool in ("ip", "tc"):
        if shutil.which(tool) is None:
            raise HostsUnavailable(f"emulated hosts need `{tool}`, which is not on the PATH", remedy)
    if os.geteuid() != 0:
        raise HostsUnavailable(
            "emulated hosts need root, to make network namespaces",
            "Run the benchmark as root, or use --hosts loopback",
        )


def _run(*command: str) -> None:
    outcome = subprocess.run(command, check=False, capture_output=True, text=True)
    if outcome.returncode != 0:
        raise HostsUnavailable(
            f"`{' '.join(command)}` failed: {outcome.stderr.strip()}",
            "Check --rate, and that the kernel has veth, bridge and tbf; or use --hosts loopback",
        )
