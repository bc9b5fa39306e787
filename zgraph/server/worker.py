"""The thread that steps a batch, and through which others reach it."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress

from zgraph.errors import InferenceError, OverloadError, ZgraphError
from zgraph.inference.continuous import ContinuousBatch, Made, Request
from zgraph.inference.generation import Generator

logger = logging.getLogger("zgraph.server")

LOOK_SECONDS = 1.0
"""How often a worker without requests looks whether the other ranks are there."""

Heard = Callable[[Made], None]
"""Told of each token of a request, in the worker's thread."""


class Ticket:
    """A request that was handed over; `cancel` takes it.

    Args:
        request: what was asked.
        heard: told of each token.
    """

    def __init__(self, request: Request, heard: Heard) -> None:
        self.request, self.heard = request, heard
        self.number: int | None = None
        self.is_over = False


class Worker:
    """A thread that generates for whoever asks, from any thread.

    Args:
        generator: a model of `zgraph.infer`, which nothing else may use meanwhile.
        max_waiting: requests that may wait for a row; more are refused.

    Attributes:
        num_running, num_waiting: requests with a row, and without one.
        step_seconds: told how long each step took.
        error: what ended the worker, where ranks compute together: they have no next step in common. None if nothing.
    """

    def __init__(self, generator: Generator, max_waiting: int = 256) -> None:
        self.generator, self.max_waiting = generator, max_waiting
        self.num_running = 0
        self.step_seconds: Callable[[float], None] = lambda _: None
        self.error: ZgraphError | None = None
        self._failed: Callable[[], None] = lambda: None
        self._batch = ContinuousBatch(generator)
        self._tickets: dict[int, Ticket] = {}
        self._new: deque[Ticket] = deque()
        self._dropped: deque[Ticket] = deque()
        self._wake = threading.Condition()
        self._is_closing = self._is_cut = False
        self._num_pending = 0
        self._thread = threading.Thread(target=self._run, name="zgraph.server", daemon=True)
        self._thread.start()

    @property
    def num_waiting(self) -> int:
        """Requests that wait for a row."""
        return max(0, self._num_pending - self.num_running)

    @property
    def is_alive(self) -> bool:
        """Whether requests are taken."""
        return self._thread.is_alive() and not self._is_closing

    def submit(self, requests: list[Request], heard: list[Heard]) -> list[Ticket]:
        """Hand requests over, all or none.

        Raises:
            UsageError, ContextLengthError: one of them cannot be generated.
            OverloadError: too many wait already, or the worker is closing.
        """
        for request in requests:
            self._batch.check(request)
        tickets = [Ticket(request, told) for request, told in zip(requests, heard, strict=True)]
        with self._wake:
            if not self.is_alive:
                raise OverloadError("the server is stopping; ask another, or again when it is back")
            if self._num_pending + len(tickets) > self.max_waiting + self.generator.max_batch:
                raise OverloadError(f"{self.num_waiting} requests wait already; ask again later")
            self._num_pending += len(tickets)
            self._new.extend(tickets)
            self._wake.notify()
        return tickets

    def cancel(self, tickets: list[Ticket]) -> None:
        """Forget requests that are not over: their rows are free before the next step."""
        with self._wake:
            self._dropped.extend(ticket for ticket in tickets if not ticket.is_over)
            self._wake.notify()

    def close(self, timeout_s: float | None = None) -> None:
        """Take no more requests, and wait until those that were taken are over, or for so long."""
        with self._wake:
            self._is_closing = True
            self._wake.notify()
        self._thread.join(timeout_s)
        self._is_cut = True
        self._thread.join()

    def when_failed(self, call: Callable[[], None]) -> None:
        """Call this once the worker has ended with an error: in its thread, or here if it has already."""
        with self._wake:
            self._failed = call
        if self.error is not None:
            call()

    def _run(self) -> None:
        try:
            while self._turn():
                pass
            self._batch.close()
        except Exception as error:
            if self._batch.leader is None:
                raise
            self._batch.leader.fail(error)
            self.error = _typed(error, self.generator.calls.num_ranks)
            if self.error is not error:
                logger.exception("a step failed, and with it all requests under way")
        finally:
            self._abandon()
            if self.error is not None:
                self._failed()

    def _abandon(self) -> None:
        """Tell whoever still waits when the thread ends that there will be no answer."""
        with self._wake:
            self._is_closing = True
            left = [*self._tickets.values(), *self._new]
            self._tickets.clear()
            self._new.clear()
            self._num_pending = 0
        for ticket in left:
            ticket.is_over = True
            self._hear(ticket, Made(ticket.number or 0, None, "error"))

    def _turn(self) -> bool:
        """Hear what is new, and step; whether there is more to come."""
        leader = self._batch.leader
        with self._wake:
            is_due = self._wake.wait_for(
                lambda: self._new or self._dropped or self._batch.is_busy or self._is_closing,
                LOOK_SECONDS if leader is not None else None,
            )
            new, dropped = [*self._new], [*self._dropped]
            self._new.clear()
            self._dropped.clear()
        if leader is not None and not is_due:
            leader.check()
        for ticket in new:
            ticket.number = self._batch.submit(ticket.request)
            self._tickets[ticket.number] = ticket
        for ticket in dropped:
            if ticket.number is not None and not ticket.is_over:
                self._batch.cancel(ticket.number)
                self._end(ticket)
        if self._is_cut:
            self._fail("the server stopped")
        if self._batch.is_busy:
            self._step()
        self.num_running = self._batch.num_running
        with self._wake:
            return not (self._is_closing and not self._tickets and not self._new)

    def _step(self) -> None:
        begin = time.perf_counter()
        try:
            found = self._batch.step()
        except Exception:
            if self._batch.leader is not None:
                raise
            logger.exception("a step failed, and with it all requests under way")
            self._fail("a step failed")
            return
        self.step_seconds(time.perf_counter() - begin)
        for made in found:
            self._tell(self._tickets[made.number], made)

    def _fail(self, why: str) -> None:
        """End all requests under way."""
        for number, ticket in [*self._tickets.items()]:
            self._batch.cancel(number)
            self._tell(ticket, Made(number, None, "error"))
        self._batch.clear()
        logger.warning("%s: requests under way have ended without an answer", why)

    def _tell(self, ticket: Ticket, made: Made) -> None:
        if made.ended:
            self._end(ticket)
        self._hear(ticket, made)

    def _hear(self, ticket: Ticket, made: Made) -> None:
        with suppress(RuntimeError):  # the loop that listens is closed
            ticket.heard(made)

    def _end(self, ticket: Ticket) -> None:
        assert ticket.number is not None
        ticket.is_over = True
        del self._tickets[ticket.number]
        with self._wake:
            self._num_pending -= 1


def _typed(error: Exception, num_ranks: int) -> ZgraphError:
    """The error that ends a server of several ranks."""
    if isinstance(error, ZgraphError):
        return error
    found = InferenceError(
        f"a step failed, after which {num_ranks} ranks have no next one in common ({type(error).__name__}: {error}); "
        "look into the log, and start the server again"
    )
    found.__cause__ = error
    return found
