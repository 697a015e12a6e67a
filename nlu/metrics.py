"""All instruments of the service, declared in one place, on a registry of their own."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

REGISTRY = CollectorRegistry()

_SECONDS = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0)

CALLS = Counter(
    "nlu_calls", "Finished calls by method and status code.", ["method", "code"], registry=REGISTRY
)
CALL_SECONDS = Histogram(
    "nlu_call_seconds", "Time in the handler.", ["method"], buckets=_SECONDS, registry=REGISTRY
)
STAGE_SECONDS = Histogram(
    "nlu_stage_seconds", "Time by stage of Understand.", ["stage"], buckets=_SECONDS, registry=REGISTRY
)
ENCODINGS = Counter("nlu_encodings", "Encodings by where they came from.", ["source"], registry=REGISTRY)
ANNOTATIONS = Counter(
    "nlu_annotations_not_ok", "Annotations that were not ok.", ["head", "status"], registry=REGISTRY
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
