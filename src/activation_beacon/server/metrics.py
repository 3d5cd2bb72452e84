"""What is counted, for Prometheus. Each server has a registry of its own."""

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

SECONDS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0)


class Metrics:
    """Counters of one server; the engine's observer."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self._requests = self._counter("requests", "Requests answered.", "route", "status")
        self._request_s = self._histogram("request_seconds", "Seconds that requests took.", "route")
        self._first_token_s = self._histogram("first_token_seconds", "Seconds from a request to its first token.")
        self._piece_s = self._histogram("piece_seconds", "Seconds that a chunk or a prompt took to be read.")
        self._step_s = self._histogram("step_seconds", "Seconds that a token of all answers took.")
        self._read = self._counter("tokens_read", "Tokens read into caches.")
        self._written = self._counter("tokens_written", "Tokens of answers.")
        self._spared = self._counter("tokens_spared", "Tokens of prompts that need not be read: compressed before.")
        self._prompted = self._counter("tokens_prompted", "Tokens of prompts that were read.")

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"beacon_{name}", text, labels, registry=self.registry)

    def _histogram(self, name: str, text: str, *labels: str) -> Histogram:
        return Histogram(f"beacon_{name}", text, labels, buckets=SECONDS, registry=self.registry)

    def watch(self, name: str, text: str, read: Callable[[], float]) -> None:
        """Add a gauge that is read when it is asked for."""
        Gauge(f"beacon_{name}", text, registry=self.registry).set_function(read)

    def piece_read(self, seconds: float, num_tokens: int) -> None:
        """A chunk, or the rest of a text, has been read."""
        self._piece_s.observe(seconds)
        self._read.inc(max(0, num_tokens))

    def step_decoded(self, seconds: float) -> None:
        """A token of all answers that are decoded together has been decoded."""
        self._step_s.observe(seconds)

    def token_written(self) -> None:
        """An answer has got a token."""
        self._written.inc()

    def first_token(self, seconds: float) -> None:
        """A request has got its first token."""
        self._first_token_s.observe(seconds)

    def answered(self, num_read: int, num_spared: int) -> None:
        """A prompt has been answered."""
        self._prompted.inc(num_read)
        self._spared.inc(num_spared)

    def requested(self, route: str, status: int, seconds: float) -> None:
        """A request has been answered, or given up."""
        self._requests.labels(route, str(status)).inc()
        self._request_s.labels(route).observe(seconds)

    def text(self) -> bytes:
        """All of it, in Prometheus' format."""
        return generate_latest(self.registry)
