"""A pretended GPU: a stream in which launches take the device's time while the host runs ahead."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from zgraph.runtime import clock


@dataclass
class Gpu:
    """A host and a stream, each with its own time in seconds.

    Args:
        launch_s: of the host, for each launch.
        cooling_s: of the device, to write over its cold memory.
        event_s: of the host, to make an event and to record it for the first time.
    """

    launch_s: float = 20e-6
    cooling_s: float = 180e-6
    event_s: float = 0.0
    host_s: float = 0.0
    stream_s: float = 0.0
    launches: list[float] = field(default_factory=list)

    def launch(self, seconds: float) -> None:
        """Work that takes the device so many seconds."""
        self.host_s += self.launch_s
        self.stream_s = max(self.stream_s, self.host_s) + seconds
        self.launches.append(seconds)

    def synchronize(self, device: torch.device | None = None) -> None:
        self.host_s = max(self.host_s, self.stream_s)

    def install(self, monkeypatch: pytest.MonkeyPatch) -> torch.device:
        """Pretend, in `zgraph.runtime.clock`, `recorder` and what they are used by; the device."""
        gpu = self

        class Event:
            def __init__(self, device: object, enable_timing: bool) -> None:
                self.at: float | None = None

            def record(self, stream: object) -> None:
                if self.at is None:
                    gpu.host_s += gpu.event_s
                self.at = max(gpu.stream_s, gpu.host_s)

            def elapsed_time(self, other: Any) -> float:
                return 1e3 * (other.at - self.at)

        monkeypatch.setattr(torch, "Event", Event)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
        monkeypatch.setattr(torch.cuda, "synchronize", self.synchronize)
        monkeypatch.setattr(clock, "_room", lambda device: SimpleNamespace(zero_=lambda: self.launch(self.cooling_s)))
        monkeypatch.setattr(clock, "time", SimpleNamespace(perf_counter=lambda: self.host_s))
        return torch.device("cuda", 0)
