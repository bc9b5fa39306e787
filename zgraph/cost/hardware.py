"""Hardware profiles: what a device computes, remembers and sends. They are files that a user can read and write.

A name says how many hosts of how many devices: `8x8-h100` is 8 hosts of 8 H100s, `h100` one host as the file has it.
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from zgraph.cost.accuracy import PROCESSOR, UNKNOWN, Accuracy
from zgraph.environment import cache_folder
from zgraph.errors import HardwareError, did_you_mean

FOLDER = Path(__file__).parent / "profiles"
THIS_MACHINE = "this-machine"
MAX_BYTES = 1 << 20
"""Of a profile's file."""

_NAME = re.compile(r"(?:(?P<hosts>[0-9]{1,7})x(?P<devices>[0-9]{1,7})-)?(?P<name>[a-z0-9][a-z0-9.-]{0,99})")

VARIANTS = {"pcie", "nvl", "mig", "laptop", "mobile", "max", "d", "super"}
"""Words by which makers call what has a device's name and other figures."""

MEMORY_TOLERANCE = 0.15
"""How far the memory that a driver tells may be from the profile's: makers count in units of 1000 or of 1024."""

Rate = Annotated[float, Field(gt=0)]


ALIKE: Mapping[str, tuple[str, ...]] = {
    "f16": ("bf16",),
    "f8e5m2": ("f8e4m3", "bf16"),
    "f8e4m3": ("bf16",),
    "i8": ("f8e4m3", "bf16"),
    "u8": ("f8e4m3", "bf16"),
}
"""Dtypes whose matmuls run as fast as those of another, or at least as fast, by GPUs' data sheets."""


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Link(_Frozen):
    """A way between devices, seen from one of them, in one direction."""

    bytes_per_s: float = Field(gt=0, description="what large messages reach, not the label on the cable")
    latency_us: float = Field(ge=0, description="one message of no size, software included")
    share: float = Field(1.0, gt=0, le=1, description="the share of it that collectives of a training step reach")

    @property
    def rate(self) -> float:
        """Bytes a second that collectives of a training step reach."""
        return self.bytes_per_s * self.share


class AttentionRate(_Frozen):
    """How fast a kernel of attention is, as shares of the best matmul rate of its dtype.

    A sequence of `half_sequence` keys reaches half of them, one of n keys n / (n + half_sequence).
    """

    forward: float = Field(gt=0, le=1)
    backward: float = Field(gt=0, le=1)
    half_sequence: float = Field(0.0, ge=0)


ATTENTION_ALIKE: Mapping[str, tuple[str, ...]] = {
    "flash3": ("cudnn", "flash"),
    "cudnn": ("flash3", "flash"),
    "flash": ("cudnn",),
    "efficient": ("triton", "flash"),
    "triton": ("efficient", "flash"),
    "flex": ("triton", "flash"),
}
"""Kernels of attention whose rates stand for one that a profile does not have, nearest first."""


class Device(_Frozen):
    """One accelerator, or the cores that one rank has."""

    memory_bytes: int = Field(gt=0)
    memory_bytes_per_s: float = Field(gt=0, description="what a large copy reaches, reads and writes counted")
    peak_flops: Mapping[str, Rate] = Field(description="the data sheet's dense matmul rate by dtype")
    matmul_flops: Mapping[str, Rate] = Field(description="the best rate that matmuls were measured at, by dtype")
    matmul_half_flop: float = Field(ge=0, description="a matmul of this many FLOP reaches half of that rate")
    launch_us: float = Field(ge=0, description="what the smallest op takes")
    generated_matmul_rate: float = Field(
        0.75,
        ge=0,
        le=1,
        description="the share of the best matmul rate that generated matmuls reach; 0: none run there",
    )
    sustained: float = Field(
        1.0, gt=0, le=1, description="the share of the best matmul rate that large matmuls hold through a training step"
    )
    matmul_half_dim: float = Field(
        0.0, ge=0, description="a matmul whose smallest size is this one reaches half of its rate"
    )
    memory_share: float = Field(
        1.0, gt=0, le=1, description="the share of a large copy's bandwidth that torch's ops reach one by one"
    )
    fused_share: float = Field(1.0, gt=0, le=1, description="the same of generated kernels")
    update_share: float = Field(1.0, gt=0, le=1, description="the same of an optimizer's step")
    attention: Mapping[str, AttentionRate] = Field({}, description="by kernel; without, it is as fast as matmuls")

    @field_validator("matmul_flops")
    @classmethod
    def _has_the_rate_of_others(cls, rates: Mapping[str, float]) -> Mapping[str, float]:
        if "f32" not in rates:
            raise ValueError("f32 is missing, whose rate stands for dtypes that have none")
        return rates

    def rate(self, dtype: str) -> float:
        """The matmul rate of a dtype; that of its like, or of fp32, where the profile has none."""
        names = dtype, *ALIKE.get(dtype, ()), "f32"
        return next(self.matmul_flops[name] for name in names if name in self.matmul_flops)

    def attention_rate(self, kernel: str) -> AttentionRate | None:
        """The rate of a kernel of attention, or of its like; None where the profile knows of none."""
        names = kernel, *ATTENTION_ALIKE.get(kernel, ())
        return next((self.attention[name] for name in names if name in self.attention), None)


class Hardware(_Frozen):
    """A cluster: hosts of equal devices, links within a host and between hosts.

    `between` is each device's share of its host's network. `host_link` is the way to the host's memory, of which a host
    has `host_memory_bytes`: 0 where it is not known, or where devices compute in the host's memory itself.
    `overlap_slowdown` is how much longer computing takes while a transfer is under way: on GPUs the collectives take
    multiprocessors and memory bandwidth, on CPUs they take the cores.
    """

    name: str
    source: str = ""
    device: Device
    devices_per_host: int = Field(8, gt=0)
    num_hosts: int = Field(1, gt=0)
    within: Link
    between: Link
    host_link: Link
    host_memory_bytes: int = Field(0, ge=0)
    overlap_slowdown: float = Field(1.0, ge=1.0)
    accuracy: Accuracy | None = Field(None, description="how true predictions are, if anybody has looked")

    @property
    def num_devices(self) -> int:
        return self.num_hosts * self.devices_per_host

    @property
    def error(self) -> Accuracy:
        """How true its predictions are."""
        return self.accuracy or (UNKNOWN if self.has_host else PROCESSOR)

    @property
    def has_host(self) -> bool:
        """Whether hosts have a memory that is not their devices'."""
        return self.host_memory_bytes > 0

    def shaped(self, num_hosts: int, devices_per_host: int) -> Hardware:
        """The same devices and links in another number."""
        return self.model_copy(update={"num_hosts": num_hosts, "devices_per_host": devices_per_host})

    def spread(self, num_ranks: int) -> tuple[int, int]:
        """How many hosts, and ranks on each, `num_ranks` take: full hosts first.

        Raises:
            HardwareError: they do not fill hosts evenly.
        """
        each = min(num_ranks, self.devices_per_host)
        if num_ranks % each:
            raise HardwareError(
                f"{num_ranks} ranks do not fill hosts of {self.devices_per_host} devices; take a multiple of "
                f"{self.devices_per_host}, or say how they lie: 'HOSTSxDEVICES-{self.name}'"
            )
        return num_ranks // each, each


def known() -> tuple[str, ...]:
    """The names of the built-in profiles."""
    return tuple(sorted(p.stem for p in FOLDER.glob("*.toml")))


def recognised(title: str, memory_bytes: int) -> tuple[str | None, bool]:
    """The name of the profile that is nearest to a device, and whether it is the device's own.

    Args:
        title: what the driver calls the device, such as `NVIDIA A100-SXM4-80GB`.
        memory_bytes: of the device.
    """
    words = set(re.findall(r"[a-z0-9]+", title.lower()))
    named = {name: _words(name) for name in known() if _words(name) <= words}
    if not named:
        return None, False
    sizes = {name: abs(load(FOLDER / f"{name}.toml").device.memory_bytes / memory_bytes - 1) for name in named}
    best = min(named, key=lambda name: (-len(named[name]), sizes[name]))
    return best, sizes[best] < MEMORY_TOLERANCE and not VARIANTS & (words - named[best])


def _words(name: str) -> set[str]:
    """Words in the name of a device with this profile; the number of `a100-40`, its memory, is left out."""
    return set(re.sub(r"-[0-9]{1,3}$", "", name).split("-"))


def hardware(name: str) -> Hardware:
    """The profile of a name like `h100` or `16x8-a100-80`, or of a file.

    Raises:
        HardwareError: there is no such profile, or the file is none.
    """
    if name.endswith(".toml"):
        return load(Path(name))
    match = _NAME.fullmatch(name)
    if match is None:
        raise HardwareError(_unknown(name, name))
    stem = match["name"]
    path = this_machine_path() if stem == THIS_MACHINE else FOLDER / f"{stem}.toml"
    if not path.exists():
        raise HardwareError(_unknown(name, stem))
    found = load(path)
    if match["hosts"] is None:
        return found
    num_hosts, devices = int(match["hosts"]), int(match["devices"])
    if not num_hosts or not devices:
        raise HardwareError(f"{name!r} has no devices; write HOSTSxDEVICES-NAME, as in 2x8-h100")
    return found.shaped(num_hosts, devices)


def load(path: Path) -> Hardware:
    """Read a profile.

    Raises:
        HardwareError: the file is missing or no profile; every problem is named.
    """
    try:
        return Hardware.model_validate(tomllib.loads(read_text(path, MAX_BYTES)))
    except OSError as error:
        raise HardwareError(f"cannot read the hardware profile {shown(path)}: {error.strerror}") from None
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()[:5])
        raise HardwareError(f"{shown(path)} is no hardware profile: {problems}") from None
    except (ValueError, RecursionError) as error:
        raise HardwareError(f"{shown(path)} is no TOML: {error}; zgraph.profile_machine writes one") from None


def read_text(path: Path, max_bytes: int) -> str:
    """The text of a file.

    Raises:
        OSError: it cannot be read.
        ValueError: its name or its text is none, or it has more bytes.
    """
    with path.open("rb") as stream:
        found = stream.read(max_bytes + 1)
    if len(found) > max_bytes:
        raise ValueError(f"it has more than {max_bytes >> 20} MiB")
    return found.decode()


def shown(path: Path) -> str:
    """A path as an error has it."""
    text = str(path)
    return text if len(text) <= 200 else f"{text[:100]}...{text[-60:]}"


def save(profile: Hardware, path: Path) -> None:
    """Write a profile that `load` reads back."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(as_toml(profile))


def as_toml(profile: Hardware) -> str:
    """The text of a profile's file."""
    return "\n".join(_lines(profile.model_dump(), "")) + "\n"


def this_machine_path() -> Path:
    """Where the profile of this machine lies once it has been measured."""
    return cache_folder() / f"{THIS_MACHINE}.toml"


def _lines(fields: Mapping[str, object], table: str) -> Iterator[str]:
    """TOML: plain fields first, then the tables."""
    if table:
        yield f"\n[{table}]"
    for key, value in fields.items():
        if isinstance(value, str):
            yield f"{key} = {json.dumps(value, ensure_ascii=False)}"  # TOML writes plain texts as JSON does
        elif value is not None and not isinstance(value, Mapping):
            yield f"{key} = {value!r}"
    for key, value in fields.items():
        if isinstance(value, Mapping):
            yield from _lines(value, f"{table}.{key}" if table else key)


def _unknown(name: str, stem: str) -> str:
    if stem == THIS_MACHINE:
        return f"this machine has not been measured; call zgraph.profile_machine(), which writes {this_machine_path()}"
    name, stem = name[:60], stem[:60]
    hint = did_you_mean(stem, known(), "")
    return (
        f"no hardware is called {name!r}; {hint}{' ' if hint else ''}the profiles are {', '.join(known())} and "
        f"{THIS_MACHINE}, alone or as HOSTSxDEVICES-NAME (16x8-a100-80); or give the path of a .toml file, which "
        "zgraph hardware new begins"
    )
