"""Errors of benchmarks. Every message ends with its remedy."""

from __future__ import annotations


class BenchmarkError(RuntimeError):
    """Base of all errors here; `reason` says what happened, `remedy` what to do about it."""

    def __init__(self, reason: str, remedy: str) -> None:
        super().__init__(f"{reason}. {remedy}.")
        self.reason = reason
        self.remedy = remedy


class HostsUnavailable(BenchmarkError):
    """The machine cannot emulate hosts: not root, no `ip` or `tc`, or a kernel that lacks a part."""


class CannotCount(BenchmarkError):
    """The allocator of this torch does not say how many bytes are live."""


class NotInstalled(BenchmarkError):
    """A system under measurement is not importable."""


class RankFailed(BenchmarkError):
    """A rank ended with an error; the reason is the last line it wrote."""


class RankTimedOut(BenchmarkError):
    """The ranks of one launch did not end within the time they were given."""


class UnknownName(BenchmarkError):
    """No preset or system has this name."""


class NoGpu(BenchmarkError):
    """torch finds no GPU here."""


def last_line(error: BaseException) -> str:
    """The last line of an exception's words, behind its type."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[-1].strip()}"
