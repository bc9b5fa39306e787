"""Published steps as rows of a table: what was trained, how, on what, and what it took."""

from __future__ import annotations

import csv
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean

from benchmarks.published.models import Sizes
from zgraph.cost import Hardware, hardware
from zgraph.errors import HardwareError

FOLDER = Path(__file__).parents[1] / "data"
FILES = (FOLDER / "measured_steps.csv", FOLDER / "mpt_fsdp_steps.csv")

OTHER_NAMES = {
    "hidden": ("hidden", "d_model"),
    "inner": ("ffn",),
    "micro": ("ga", "grad_accum"),
    "strategy": ("strategy", "sharding"),
    "step": ("step_s", "step_s_derived"),
    "reported": ("tflops_gpu_reported",),
}
"""Columns by what they hold, where files name it differently."""

LINK_SHARE = 0.9
"""The share of a network's label that large messages reach."""

SHARE_OF_2021 = 0.117
"""The share of a link that the collectives of DeepSpeed's ZeRO-3 of 2021 reach, by the one row of it: the constant
`collectives of 2021` of `--fit`."""

PCIE_BYTES_PER_S = 4.0e10
"""Bus bandwidth of an all-reduce over 8 GPUs without NVLink (stas00/ml-engineering)."""

MPT_NETWORK_GBPS = {"a100": 200.0, "h100": 400.0}
"""A device's share of the network between hosts, where the row says that of a host: 1,600 and 3,200 Gbit/s."""

PADDED_VOCABULARY = 51200
"""GPT-2's vocabulary as Megatron pads it, taken where a GPT's is not published."""


class Inexpressible(ValueError):
    """A row that cannot be predicted; the message is the reason."""


@dataclass(frozen=True)
class Row:
    """One published step.

    Args:
        name: unique in its file.
        system: the software that ran it.
        sizes: of the model.
        num_parameters: as published.
        sequence, batch: of one micro-step of one rank.
        num_micro: micro-steps in a step.
        hardware: of the right shape.
        num_ranks: in all.
        stage: of ZeRO.
        num_copies: ranks that hold the same shard.
        recomputed: "none", "full", "layers" (every other) or "ops" (attention and every second matmul are kept).
        is_fused: whether a compiler fused what is between matmuls.
        attention: the attention kernel.
        reduce_dtype: in which gradients are summed; empty for their own.
        compute: what matmuls run in: empty, or "float8".
        measured_s: seconds of a step.
        memory: bytes of the peak, and their kind: "allocated", "reserved"; 0 where it was not published.
        has_masters: whether weights, gradients and moments are in fp32, or in bf16 alone.
    """

    name: str
    system: str
    sizes: Sizes
    num_parameters: float
    sequence: int
    batch: int
    num_micro: int
    hardware: Hardware
    num_ranks: int
    stage: int
    num_copies: int
    recomputed: str
    is_fused: bool
    attention: str
    reduce_dtype: str
    compute: str
    measured_s: float
    memory: tuple[int, str] = (0, "")
    has_masters: bool = True

    @property
    def family(self) -> str:
        """The system without its version: what is left out at a time."""
        return family(self.system)


@dataclass(frozen=True)
class Unread:
    """A row that cannot be expressed, and why."""

    name: str
    system: str
    measured_s: float
    reason: str

    @property
    def family(self) -> str:
        return family(self.system)


def family(system: str) -> str:
    """The system without its version: `torchtitan` of `torchtitan FSDP2`."""
    return system.split()[0].split("/")[0] if system else "unknown"


def read(path: Path) -> list[Row | Unread]:
    """The rows of a file.

    Raises:
        ValueError: the file has none of the columns, or a cell that must be a number is none.
    """
    with path.open(newline="") as file:
        table = list(csv.DictReader(file))
    if not table or not {"gpu", "gpus", "seq", "mbs", "layers"} <= table[0].keys():
        raise ValueError(f"{path} has no rows with the columns of {FILES[0].name}, or of {FILES[1].name}")
    names = Counter[str]()
    found: list[Row | Unread] = []
    for cells in table:
        name = cells.get("id") or _name(cells)
        names[name] += 1
        found.append(_row(cells, name if names[name] == 1 else f"{name}#{names[name]}"))
    return found


def _name(cells: Mapping[str, str]) -> str:
    marks = "" if cells.get("act_ckpt", "") in ("False", "") else "-again"
    return (
        f"{cells['model']}-{cells['gpus']}x{cells['gpu']}-{cells['seq']}-{cells['mbs']}x{cells.get('grad_accum', '1')}"
        f"-{cells['precision']}{marks}"
    )


def _row(cells: Mapping[str, str], name: str) -> Row | Unread:
    system = cells.get("system", "")
    measured_s = 0.0
    try:
        measured_s = _measured_s(cells, "none")
        recomputed = _recomputed(cells, system)
        measured_s = _measured_s(cells, recomputed)
        return _expressed(cells, name, system, recomputed, measured_s)
    except Inexpressible as why:
        return Unread(name, system, measured_s, str(why))
    except (KeyError, ValueError) as problem:
        return Unread(name, system, measured_s, f"a cell that it takes is missing, or no number: {problem}")


def _expressed(cells: Mapping[str, str], name: str, system: str, recomputed: str, measured_s: float) -> Row:
    strategy = _cell(cells, "strategy")
    ways = re.findall(r"\b(TP|PP|CP|EP|SP)(?![a-z])[ =-]?(\d*)", strategy, re.IGNORECASE)
    if found := [f"{word} {n}".rstrip() for word, n in ways if n != "1"]:
        raise Inexpressible(f"it is parallel in another way than by ZeRO: {', '.join(found)}")
    said = f"{strategy} {system}".lower()
    if "offload" in said and "no offload" not in said:
        raise Inexpressible("the optimizer runs on the host, of whose cores and memory the row says nothing")
    if not measured_s:
        raise Inexpressible("neither seconds, tokens nor FLOP a second were published")
    num_ranks = int(float(cells["gpus"]))
    each = int(float(cells.get("gpus_per_node") or 8))
    stage = _stage(strategy)
    gpu = _gpu(cells)
    precision = cells["precision"].lower()
    num_copies = num_ranks // each if "HSDP" in strategy and num_ranks > each else 1
    row = Row(
        name,
        system,
        _sizes(cells, "full" if recomputed in ("full", "ops") else "none"),
        float(cells["params"]),
        int(cells["seq"]),
        int(float(cells["mbs"])),
        int(float(_cell(cells, "micro") or 1)),
        _hardware(cells, gpu, num_ranks, each),
        num_ranks,
        stage,
        num_copies,
        recomputed,
        _is_fused(cells.get("compile", "")),
        _attention(system),
        "f32" if _reduces_whole(cells, system, strategy) else "",
        "float8" if "fp8" in precision or "float8" in precision else "",
        measured_s,
        _memory(cells, system),
        not system.startswith(IN_BF16),
    )
    if "pcie" in cells["gpu"].lower():
        within = row.hardware.within.model_copy(update={"bytes_per_s": PCIE_BYTES_PER_S})
        row = replace(row, hardware=row.hardware.model_copy(update={"within": within}))
    if "2021" in system:
        row = replace(row, hardware=_slow_collectives(row.hardware))
    if row.sequence % 32:
        raise Inexpressible(f"a sequence of {row.sequence} is no multiple of 32")
    return row


def _cell(cells: Mapping[str, str], what: str) -> str:
    return next((cells[key] for key in OTHER_NAMES[what] if cells.get(key)), "")


def _stage(strategy: str) -> int:
    if strategy == "single" or re.match(r"D?DP\b", strategy):
        return 0
    if "ZeRO-1" in strategy:
        return 1
    return 2 if "ZeRO-2" in strategy or strategy == "SHARD_GRAD_OP" else 3


def _recomputed(cells: Mapping[str, str], system: str) -> str:
    said = cells.get("act_ckpt", "").lower().split(" (")[0].strip()
    if said in ("", "none", "no", "false"):
        return "none"
    if said in ("full", "true", "yes"):
        return "full"
    if "layer" in said:
        return "layers"
    if "op" in said:
        return "ops"
    if "selective" in said or said.startswith("sel"):
        return "layers" if system.startswith("fms") else "ops"
    raise Inexpressible(f"recomputation of {said!r} is not known")


def _measured_s(cells: Mapping[str, str], recomputed: str) -> float:
    """The step as published, or from the tokens or the FLOP a second that were."""
    if step := _cell(cells, "step"):
        return float(step)
    num_tokens = int(cells["seq"]) * float(cells["mbs"] or 0) * float(_cell(cells, "micro") or 1)
    if cells.get("tok_s_gpu"):
        return num_tokens / fmean(map(float, cells["tok_s_gpu"].split("-")))
    if reported := _cell(cells, "reported"):
        flop = (8 if recomputed == "full" else 6) * float(cells["params"]) * num_tokens
        return flop / (float(reported) * 1e12)
    return 0.0


def _gpu(cells: Mapping[str, str]) -> str:
    return re.split(r"[-_ ]", cells["gpu"].lower())[0]


def _hardware(cells: Mapping[str, str], gpu: str, num_ranks: int, each: int) -> Hardware:
    said = cells["gpu"]
    variants = {"a100": "a100-40" if "40" in said else "a100-80", "h100": "h100-96" if "96" in said else "h100"}
    name = variants.get(gpu, gpu)
    try:
        profile = hardware(name)
    except HardwareError:
        raise Inexpressible(f"no profile is that of {cells['gpu']}") from None
    said = cells.get("internode_per_gpu_gbps") or ("" if "id" in cells else str(MPT_NETWORK_GBPS.get(gpu, "")))
    if said:
        between = profile.between.model_copy(update={"bytes_per_s": LINK_SHARE * float(said) * 1e9 / 8})
        profile = profile.model_copy(update={"between": between})
    if num_ranks > each and num_ranks % each:
        raise Inexpressible(f"{num_ranks} ranks do not fill hosts of {each}")
    return profile.shaped(max(num_ranks // each, 1), each)


def _slow_collectives(profile: Hardware) -> Hardware:
    """The profile with collectives as they were before they were sent in large pieces."""
    links = {name: getattr(profile, name).model_copy(update={"share": SHARE_OF_2021}) for name in ("within", "between")}
    return profile.model_copy(update=links)


def _sizes(cells: Mapping[str, str], checkpointed: str) -> Sizes:
    hidden, num_heads = int(_cell(cells, "hidden")), int(cells["heads"])
    is_gated = not re.match(r"(gpt|mpt|opt|bloom)", cells["model"].lower())
    num_layers, vocabulary = int(cells["layers"]), int(float(cells["vocab"] or PADDED_VOCABULARY))
    if hidden % (8 * num_heads):
        raise Inexpressible(f"heads of {hidden / num_heads:g} numbers are no multiple of 8")
    num_kv = int(float(cells.get("kv") or num_heads))
    if num_heads % num_kv:
        raise Inexpressible(f"{num_heads} heads do not share {num_kv} of keys and values evenly")
    inner = int(float(_cell(cells, "inner") or 4 * hidden))
    has_bias = cells["model"].lower().startswith("gpt")
    positions = 0 if is_gated else int(cells["seq"])
    blocks = is_gated, positions, has_bias, not is_gated and _attention(cells["system"]) == "math", checkpointed
    found = Sizes(num_layers, hidden, num_heads, num_kv, inner, vocabulary, *blocks)
    layer = (2 + 2 * num_kv / num_heads) * hidden**2 + (3 if is_gated else 2) * hidden * inner
    count = num_layers * layer + ((2 if is_gated else 1) * vocabulary + positions) * hidden
    if not 0.88 < count / float(cells["params"]) < 1.12:
        raise Inexpressible(f"{float(cells['params']):.3g} parameters are not those of its layers, {count:.3g}")
    return found


IN_BF16 = ("KempnerForge",)
"""Systems that train in bf16 alone: 8 B parameters on one GPU take less than the fp32 states of Adam would."""


def _is_fused(said: str) -> bool:
    said = said.lower()
    return any(word in said for word in ("yes", "true", "thunder", "inductor", "compile")) and "no" not in said.split()


def _attention(system: str) -> str:
    """The kernel: what the system took, by its code of that time; torch's flash attention elsewhere."""
    if system.startswith("llm-foundry"):
        return "triton"
    if "Megatron" in system or "2021" in system:
        return "math"
    return "flash"


def _reduces_whole(cells: Mapping[str, str], system: str, strategy: str) -> bool:
    """Whether gradients are summed in fp32: so it is by default in Composer and torchtitan, and with autocast."""
    if "fp32 RS" in cells["precision"] or cells.get("mp_mode") == "DEFAULT" or system.startswith("torchtitan"):
        return True
    return strategy == "DDP" and "mixed" in cells["precision"]


def _memory(cells: Mapping[str, str], system: str) -> tuple[int, str]:
    """Bytes and their kind: what torchtitan logs as its memory is what is reserved (`max_reserved_gib`)."""
    found = re.match(r"[\d.]+", cells.get("mem") or "")
    if not found:
        return 0, ""
    said = f"{cells['mem']} {cells['mem_kind']}"
    unit = 1 << 30 if "GiB" in said else 10**9
    is_reserved = "reserved" in said or system.startswith("torchtitan")
    return int(float(found[0]) * unit), "reserved" if is_reserved else "allocated"


def at(row: Row, checkpointed: str) -> Sizes:
    """The row's sizes with a model that is checkpointed in another way."""
    return replace(row.sizes, checkpointed=checkpointed)
