"""All instruments of the service, declared in one place, on a registry of their own."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from itertools import accumulate

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Metric
from prometheus_client.core import HistogramMetricFamily
from prometheus_client.registry import Collector

REGISTRY = CollectorRegistry()

_SECONDS = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0)
_NANOSECONDS = tuple(round(bound * 1e9) for bound in _SECONDS)

CALLS = Counter(
    "nlu_calls", "Finished calls by method and status code.", ["method", "code"], registry=REGISTRY
)
CALL_SECONDS = Histogram(
    "nlu_call_seconds", "Time in the handler.", ["method"], buckets=_SECONDS, registry=REGISTRY
)


class StageTimes(Collector):
    """A histogram of stage times. prometheus_client's own costs 4 us an observation, and a cached answer has six."""

    STAGES = ("normalize", "encode", "annotate", "search", "rank", "total")

    def __init__(self) -> None:
        self._counts = {stage: [0] * (len(_SECONDS) + 1) for stage in self.STAGES}
        self._sums = dict.fromkeys(self.STAGES, 0)

    def observe(self, stage: str, nanoseconds: int) -> None:
        """Count one duration. Only the event loop's thread may call this."""
        self._counts[stage][bisect_left(_NANOSECONDS, nanoseconds)] += 1
        self._sums[stage] += nanoseconds

    def collect(self) -> Iterator[Metric]:
        """What Prometheus scrapes."""
        family = HistogramMetricFamily("nlu_stage_seconds", "Time by stage of Understand.", labels=["stage"])
        for stage, counts in self._counts.items():
            bounds = [*(str(bound) for bound in _SECONDS), "+Inf"]
            buckets = list(zip(bounds, accumulate(counts), strict=True))
            family.add_metric([stage], buckets, sum_value=self._sums[stage] / 1e9)
        yield family


STAGES = StageTimes()
REGISTRY.register(STAGES)
ENCODINGS = Counter("nlu_encodings", "Encodings by where they came from.", ["source"], registry=REGISTRY)
KNOWN = Counter("nlu_known_answers", "Answers given again, without any computation.", registry=REGISTRY)
SEARCHES_FAILED = Counter(
    "nlu_searches_failed", "Answers without replies, because these could not be reached.", registry=REGISTRY
)
ANNOTATIONS = Counter(
    "nlu_annotations_not_ok", "Annotations that were not ok.", ["head", "status"], registry=REGISTRY
)
SHADOW_ANSWERS = Counter(
    "nlu_shadow_answers",
    "Answers of shadow heads by how they compare with the live ones.",
    ["head", "verdict"],
    registry=REGISTRY,
)
SHADOW_FLIPS = Counter(
    "nlu_shadow_flips",
    "Answers of shadow heads that differ, by the label only the live head accepts and the one only the candidate does.",
    ["head", "live", "candidate"],
    registry=REGISTRY,
)
IN_FLIGHT = Gauge("nlu_in_flight", "Calls being handled.", registry=REGISTRY)
QUEUE = Gauge("nlu_queue", "Phrases waiting for the vectorizer.", registry=REGISTRY)
PHRASES = Gauge(
    "nlu_phrases",
    "Phrases that reached the vectorizer or were dropped before it.",
    ["fate"],
    registry=REGISTRY,
)
LRU_BYTES = Gauge("nlu_lru_bytes", "Bytes in the in-process cache.", registry=REGISTRY)
REDIS_EVENTS = Gauge(
    "nlu_redis_events", "Failed calls, refused values, dropped writes.", ["event"], registry=REGISTRY
)
SERVING = Gauge(
    "nlu_serving_info",
    "Always 1; the labels say what is served.",
    ["bundle", "vectorizer", "service"],
    registry=REGISTRY,
)
