"""The section `checkpoint` of a configuration."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from zgraph.bridge.target import num_bytes
from zgraph.engine.config.sections import Section
from zgraph.errors import UsageError

RESUMES = "every checkpoint can be resumed at another world size and stage"
_WRITER = "zgraph writes safetensors"
LEAST_BYTES = 1 << 16
"""Of a limit of memory."""


def _lower(name: Any) -> Any:
    return name.lower() if isinstance(name, str) else name


def _size(size: int | str) -> int:
    try:
        found = num_bytes(size)
    except UsageError:
        found = 0
    if found < LEAST_BYTES:
        raise ValueError(f'give at least {LEAST_BYTES} bytes, or a size such as "4GiB"')
    return found


Size = Annotated[int | str, AfterValidator(_size)]
"""Bytes, or a size such as "4GiB"."""


class WriterKeys(Section):
    """`checkpoint.writer`."""

    ignored: ClassVar[Mapping[str, str]] = dict.fromkeys(
        ("type", "io_buffer_size", "io_buffer_double", "io_multiplier", "data_parallel", "show_statistics"), _WRITER
    )

    decoupled: bool | None = None


class MemoryKeys(Section):
    """`checkpoint.memory`: copies of each rank's shards in the memory of its host, and of the next.

    Keys:
        every: steps from one copy to the next; 0 makes none.
        folder: where hosts keep them.
        job: a name that the job keeps when its processes start again; by default what the launcher says.
        limit: of the memory that a rank's copies, and those that it keeps for another, may take.
    """

    every: Annotated[int, Field(ge=0)] = 0
    folder: Path = Path("/dev/shm")
    job: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,99}$")] | None = None
    limit: Size | None = None


class CheckpointKeys(Section):
    """`checkpoint`."""

    ignored: ClassVar[Mapping[str, str]] = {
        "load_universal": RESUMES,
        "parallel_write": "every rank writes its own shards",
    }
    unsupported: ClassVar[Mapping[str, str]] = {
        "use_node_local_storage": "give a folder that all hosts see",
    }

    tag_validation: Annotated[Literal["ignore", "warn", "fail"], BeforeValidator(_lower)] = "warn"
    asynchronous: bool | None = None
    memory_limit: Size | None = None
    writer: WriterKeys = WriterKeys()
    memory: MemoryKeys = MemoryKeys()

    @property
    def is_asynchronous(self) -> bool:
        """Whether files are written while training goes on: unless the configuration says otherwise."""
        said = self.asynchronous if self.asynchronous is not None else self.writer.decoupled
        return said is None or said

    @property
    def memory_bytes(self) -> int | None:
        """The limit of memory, if there is one."""
        return None if self.memory_limit is None else int(self.memory_limit)
