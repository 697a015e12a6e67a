"""All instruments of the service, declared in one place, on a registry of their own. docs/metrics.md explains them.

Counters and histograms are plain integers that the event loop's thread bumps: exact, and a tenth of the cost of
prometheus_client's, whose locks a cached answer would pay for a dozen times. A scrape reads them from any thread.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import accumulate

from prometheus_client import CollectorRegistry, Enum, Gauge, Metric, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector

REGISTRY = CollectorRegistry()

_SECONDS = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0)
_LONG_SECONDS = (0.01, 0.1, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 120.0)
_PHRASES = (1, 2, 4, 8, 16, 32, 64, 128, 256)

Labels = tuple[str, ...]


class Count:
    """One counted thing."""

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value = 0

    def inc(self, amount: int = 1) -> None:
        """Count. Only the event loop's thread may call this."""
        self.value += amount


class Counter(Collector):
    """A family of counts. `known` are there from the start at 0, so that the first event is seen as a change."""

    def __init__(
        self, name: str, documentation: str, labels: Sequence[str] = (), *, known: Iterable[Labels] = ()
    ) -> None:
        self._name, self._documentation, self._labels = name, documentation, tuple(labels)
        self._counts: dict[Labels, Count] = {}
        for values in known if labels else ((),):
            self.labels(*values)
        REGISTRY.register(self)

    def labels(self, *values: str) -> Count:
        """The count of these label values; raises ValueError where there are too many or too few."""
        count = self._counts.get(values)
        if count is None:
            _check_labels(self._name, self._labels, values)
            count = self._counts[values] = Count()
        return count

    def inc(self, amount: int = 1) -> None:
        """Count; only of a family without labels."""
        self.labels().inc(amount)

    def describe(self) -> Iterator[Metric]:
        """The names the registry guards against a second owner."""
        yield self._family()

    def collect(self) -> Iterator[Metric]:
        """What Prometheus scrapes."""
        family = self._family()
        for values, count in list(self._counts.items()):
            family.add_metric(values, count.value)
        yield family

    def _family(self) -> CounterMetricFamily:
        return CounterMetricFamily(self._name, self._documentation, labels=self._labels)


class Bins:
    """One histogram."""

    __slots__ = ("_bounds", "counts", "sum")

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float) -> None:
        """Count a value. Only the event loop's thread may call this."""
        self.counts[bisect_left(self._bounds, value)] += 1
        self.sum += value


class Histogram(Collector):
    """A family of histograms with the same bounds; `known` as of Counter."""

    def __init__(
        self,
        name: str,
        documentation: str,
        labels: Sequence[str] = (),
        *,
        bounds: Sequence[float] = _SECONDS,
        known: Iterable[Labels] = (),
    ) -> None:
        self._name, self._documentation, self._labels = name, documentation, tuple(labels)
        self._bounds = tuple(bounds)
        self._bins: dict[Labels, Bins] = {}
        for values in known if labels else ((),):
            self.labels(*values)
        REGISTRY.register(self)

    def labels(self, *values: str) -> Bins:
        """The histogram of these label values; raises ValueError where there are too many or too few."""
        bins = self._bins.get(values)
        if bins is None:
            _check_labels(self._name, self._labels, values)
            bins = self._bins[values] = Bins(self._bounds)
        return bins

    def describe(self) -> Iterator[Metric]:
        """The names the registry guards against a second owner."""
        yield self._family()

    def collect(self) -> Iterator[Metric]:
        """What Prometheus scrapes."""
        family = self._family()
        bounds = [*(str(float(bound)) for bound in self._bounds), "+Inf"]
        for values, bins in list(self._bins.items()):
            buckets = list(zip(bounds, accumulate(list(bins.counts)), strict=True))
            family.add_metric(values, buckets, sum_value=bins.sum)
        yield family

    def _family(self) -> HistogramMetricFamily:
        return HistogramMetricFamily(self._name, self._documentation, labels=self._labels)


class StageTimes(Histogram):
    """Stage times of Understand, which come in nanoseconds."""

    STAGES = ("normalize", "encode", "annotate", "search", "rank", "total")

    def __init__(self) -> None:
        super().__init__(
            "nlu_stage_seconds",
            "Time by stage of Understand.",
            ["stage"],
            known=[(stage,) for stage in self.STAGES],
        )

    def observe(self, stage: str, nanoseconds: int) -> None:
        """Count one duration. Only the event loop's thread may call this."""
        self.labels(stage).observe(nanoseconds * 1e-9)


class Info(Collector):
    """A gauge of value 1 whose labels say what holds now; what held before is gone from the next scrape on."""

    def __init__(self, name: str, documentation: str, labels: Sequence[str]) -> None:
        self._name, self._documentation, self._labels = name, documentation, tuple(labels)
        self._values: Labels | None = None
        REGISTRY.register(self)

    def show(self, *values: str) -> None:
        """What holds from now on; raises ValueError where there are too many or too few labels."""
        _check_labels(self._name, self._labels, values)
        self._values = values

    def hide(self) -> None:
        """Nothing holds."""
        self._values = None

    def describe(self) -> Iterator[Metric]:
        """The names the registry guards against a second owner."""
        yield self._family()

    def collect(self) -> Iterator[Metric]:
        """What Prometheus scrapes."""
        family, values = self._family(), self._values
        if values is not None:
            family.add_metric(values, 1)
        yield family

    def _family(self) -> GaugeMetricFamily:
        return GaugeMetricFamily(self._name, self._documentation, labels=self._labels)


class Heads(Collector):
    """What heads said, by label, and their drift. Both are computed when Prometheus asks, by nlu/drift.py."""

    Read = Callable[[], tuple[Mapping[tuple[str, str], int], Iterable[tuple[str, str, float]]]]

    def __init__(self) -> None:
        self._read: Heads.Read = lambda: ({}, ())
        REGISTRY.register(self)

    def watch(self, read: Read) -> None:
        """`read` gives counts by head and label, and of each head what it is compared with and the drift in bits."""
        self._read = read

    def describe(self) -> Iterator[Metric]:
        """The names the registry guards against a second owner."""
        yield from self._families()

    def collect(self) -> Iterator[Metric]:
        """What Prometheus scrapes."""
        labels, drift = self._families()
        counts, drifts = self._read()
        for values, count in counts.items():
            labels.add_metric(values, count)
        for head, reference, bits in drifts:
            drift.add_metric((head, reference), bits)
        yield labels
        yield drift

    def _families(self) -> tuple[CounterMetricFamily, GaugeMetricFamily]:
        return (
            CounterMetricFamily(
                "nlu_head_labels",
                "What heads said by label, answers given again included; none: nothing was accepted or marked.",
                labels=["head", "label"],
            ),
            GaugeMetricFamily(
                "nlu_head_drift",
                "Jensen-Shannon divergence in bits, 0 to 1, of what a head says lately from what it said of its training data, "
                "or from what it said here first where it does not know that.",
                labels=["head", "reference"],
            ),
        )


def _check_labels(name: str, labels: Labels, values: Labels) -> None:
    if len(values) != len(labels):
        raise ValueError(
            f"{name}: found {len(values)} label values, expected {len(labels)}: {', '.join(labels)}"
        )


_METHODS = ("Understand", "UnderstandBatch", "UnderstandStream", "Encode", "Describe")
_SOURCES = ("answer", "cold", "lru", "redis", "model")

# Calls, by nlu/desk.py.
CALLS = Counter(
    "nlu_calls",
    "Finished calls by method and status code, whatever the transport.",
    ["method", "code"],
    known=[(method, "OK") for method in _METHODS],
)
CALL_SECONDS = Histogram(
    "nlu_call_seconds", "Time in the handler.", ["method"], known=[(m,) for m in _METHODS]
)
CALLERS = Counter(
    "nlu_caller_calls", "Finished calls by caller, where callers have names.", ["caller", "code"]
)
IN_FLIGHT = Gauge("nlu_in_flight", "Calls being handled.", registry=REGISTRY)
SHED = Counter(
    "nlu_shed",
    "Calls refused before any work: in_flight, queue, deadline, rate, lag, draining or holding.",
    ["reason"],
    known=[(r,) for r in ("in_flight", "queue", "deadline", "rate", "lag", "draining", "holding")],
)
SKIPPED = Counter(
    "nlu_skipped",
    "Answers from which a stage was left out for want of time.",
    ["stage"],
    known=[(stage,) for stage in ("replies", "boosted", "context", "token")],
)
KNOWN = Counter("nlu_known_answers", "Answers given again, without any computation.")
HTTP = Counter("nlu_http_requests", "Finished requests to the HTTP gateway.", ["path", "status"])

# Stages of one utterance, by nlu/pipeline.py.
STAGES = StageTimes()
ENCODINGS = Counter(
    "nlu_encodings", "Encodings by where they came from.", ["source"], known=[(s,) for s in _SOURCES]
)
SEARCHES_FAILED = Counter(
    "nlu_searches_failed", "Answers without replies, because these could not be reached."
)
HEADS = Heads()
ANNOTATIONS = Counter("nlu_annotations_not_ok", "Annotations that were not ok.", ["head", "status"])
SHADOW_ANSWERS = Counter(
    "nlu_shadow_answers",
    "Answers of shadow heads by how they compare with the live ones.",
    ["head", "verdict"],
)
SHADOW_FLIPS = Counter(
    "nlu_shadow_flips",
    "Answers of shadow heads that differ, by the label only the live head accepts and the one only the candidate does.",
    ["head", "live", "candidate"],
)

# The queue and the vectorizer, by nlu/batcher.py, nlu/admission.py and nlu/watchdog.py.
QUEUE = Gauge("nlu_queue", "Phrases waiting for the vectorizer.", registry=REGISTRY)
QUEUE_SECONDS = Histogram("nlu_queue_seconds", "Time a phrase waited for the vectorizer.")
BATCH_PHRASES = Histogram("nlu_batch_phrases", "Phrases in one run of the vectorizer.", bounds=_PHRASES)
ENCODE_SECONDS = Histogram("nlu_encode_seconds", "Time of one run of the vectorizer.")
SERVICE_SECONDS = Gauge(
    "nlu_service_seconds", "Time of one phrase in the vectorizer, as admission expects it.", registry=REGISTRY
)
PHRASES = Counter(
    "nlu_phrases",
    "Phrases that reached the vectorizer (computed), made it raise (failed), or were dropped before it (dropped).",
    ["fate"],
    known=[("computed",), ("failed",), ("dropped",)],
)
BATCHER_RESTARTS = Counter(
    "nlu_batcher_restarts",
    "Threads and loops of the batcher that were replaced: stuck in the model, or died.",
    ["reason"],
    known=[("stuck",), ("died",)],
)
LOOP_LAG = Gauge("nlu_loop_lag_seconds", "How late the event loop comes to what is due.", registry=REGISTRY)
HEALTHY = Gauge("nlu_healthy", "1 while the watchdog sees the process alive, else 0.", registry=REGISTRY)

# Caches, by nlu/serve.py and nlu/redis_tier.py.
LRU_BYTES = Gauge("nlu_lru_bytes", "Bytes of Encodings in the in-process cache.", registry=REGISTRY)
ANSWERS_BYTES = Gauge("nlu_answers_bytes", "Bytes of whole answers kept.", registry=REGISTRY)
REDIS_ERRORS = Counter(
    "nlu_redis_errors",
    "Redis calls that failed, by reason; full: a write Redis had no memory for.",
    ["reason"],
    known=[(reason,) for reason in ("timeout", "connection", "auth", "full", "other")],
)
REDIS_REJECTED = Counter("nlu_redis_rejected", "Values read from Redis that were not what their key says.")
REDIS_DROPPED = Counter("nlu_redis_dropped", "Writes to Redis not made: too many under way, or it is gone.")
REDIS_OPEN = Gauge(
    "nlu_redis_breaker_open", "1 while Redis is not asked because it failed.", registry=REGISTRY
)

# The release, by nlu/steward.py and nlu/serve.py.
SERVING = Info(
    "nlu_serving_info", "Always 1; the labels say what is served.", ["bundle", "vectorizer", "service"]
)
RELEASE_STATE = Enum(
    "nlu_release_state",
    "What the process is doing.",
    states=["HOLDING", "SERVING", "DRAINING"],
    registry=REGISTRY,
)
RELEASE_SEQ = Gauge("nlu_release_seq", "Number of the release that is served.", registry=REGISTRY)
RELEASE_SINCE = Gauge(
    "nlu_release_since_timestamp_seconds",
    "When the served release was taken into service.",
    registry=REGISTRY,
)
BUNDLE_CREATED = Gauge(
    "nlu_bundle_created_timestamp_seconds", "When the served bundle was built.", registry=REGISTRY
)
BUNDLE_EXPIRES = Gauge(
    "nlu_bundle_expires_timestamp_seconds", "When the served bundle expires; 0: never.", registry=REGISTRY
)
SWAPS = Counter(
    "nlu_swaps", "Swaps by result: ok, or the code of what refused it.", ["result"], known=[("ok",)]
)
SWAP_SECONDS = Histogram(
    "nlu_swap_seconds",
    "Time by phase of a swap: fetch, trial, prepare, flip.",
    ["phase"],
    bounds=_LONG_SECONDS,
    known=[(phase,) for phase in ("fetch", "trial", "prepare", "flip")],
)
REFUSED = Info("nlu_swap_refused_info", "Always 1 while a release stands refused.", ["bundle", "code"])
LOOKS = Counter(
    "nlu_channel_looks",
    "Looks at the channel by result: ok, or the code of what failed.",
    ["result"],
    known=[("ok",)],
)
LOOKED = Gauge(
    "nlu_channel_looked_timestamp_seconds", "When the channel was last seen; 0: never.", registry=REGISTRY
)

# Processes and doors, by nlu/crew.py, nlu/control.py, nlu/memory.py, nlu/tls.py and nlu/callers.py.
ProcessCollector(
    registry=REGISTRY
)  # process_resident_memory_bytes, process_cpu_seconds_total, process_open_fds
MEMORY_LIMIT = Gauge("nlu_memory_limit_bytes", "Memory this process may use.", registry=REGISTRY)
WORKERS = Gauge("nlu_workers", "Worker processes that serve.", registry=REGISTRY)
WORKER_RESTARTS = Counter("nlu_worker_restarts", "Worker processes that died and were replaced.")
CONTROL_CALLS = Counter("nlu_control_calls", "Finished calls to the control service.", ["method", "code"])
TLS_EXPIRES = Gauge(
    "nlu_tls_expires_timestamp_seconds",
    "When the server's certificate expires; 0: no TLS.",
    registry=REGISTRY,
)
RELOADS = Counter(
    "nlu_reloads",
    "Files of the deployment that were read again because they changed.",
    ["file", "result"],
    known=[(file, result) for file in ("tls", "callers") for result in ("ok", "refused")],
)
