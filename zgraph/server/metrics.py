"""Counters of a server, for Prometheus."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from zgraph.server.worker import Worker

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


class Metrics:
    """Counters of one server, in a registry of their own.

    Args:
        worker: whose rows and queue are shown.
    """

    def __init__(self, worker: Worker) -> None:
        self.registry = CollectorRegistry()
        self.answers = Counter("zgraph_answers", "Answers over HTTP.", ["path", "status"], registry=self.registry)
        self.prompt_tokens = Counter("zgraph_prompt_tokens", "Tokens of prompts.", registry=self.registry)
        self.made_tokens = Counter("zgraph_made_tokens", "Tokens that were made.", registry=self.registry)
        self.dropped = Counter("zgraph_dropped", "Requests whose client went away.", registry=self.registry)
        self.first_token = Histogram(
            "zgraph_first_token_seconds", "From a request to its first token.", buckets=SECONDS, registry=self.registry
        )
        self.step = Histogram("zgraph_step_seconds", "One step of the batch.", buckets=SECONDS, registry=self.registry)
        self._gauge("zgraph_running", "Requests with a row of the cache.", lambda: worker.num_running)
        self._gauge("zgraph_waiting", "Requests that wait for a row.", lambda: worker.num_waiting)
        self._gauge("zgraph_rows", "Rows of the cache.", lambda: worker.generator.max_batch)
        self._gauge("zgraph_ranks", "Ranks that compute together.", lambda: worker.generator.calls.num_ranks)
        worker.step_seconds = self.step.observe

    def _gauge(self, name: str, about: str, value: object) -> None:
        Gauge(name, about, registry=self.registry).set_function(value)  # type: ignore[arg-type]

    def text(self) -> bytes:
        """All of them, in Prometheus's text format."""
        return generate_latest(self.registry)
