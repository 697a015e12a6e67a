"""One exposition for all processes of a machine: every sample with a `worker` label, counts that outlive their worker."""

from __future__ import annotations

from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

_GROWING = ("counter", "histogram", "summary")

Families = dict[str, Metric]


class Gathered:
    """What all processes counted, by the name of each. Of one thread.

    Worker 2's successor is worker 2 again and begins at zero, so what its predecessors counted is added to it: in full
    where they said goodbye, as they were heard last where they were killed.
    """

    def __init__(self) -> None:
        self._last: dict[str, Families] = {}
        self._before: dict[str, Families] = {}

    def heard(
        self, worker: str, text: str, *, only: tuple[str, ...] = ("",), without: tuple[str, ...] = ()
    ) -> None:
        """A worker's exposition, in Prometheus' text format; of it, families by how their names begin."""
        self._last[worker] = {
            name: family
            for name, family in _families(text).items()
            if name.startswith(only) and not name.startswith(without)
        }

    def gone(self, worker: str) -> None:
        """A worker ended."""
        counts = _counts(self._last.pop(worker, {}))
        self._before[worker] = _added(self._before.get(worker, {}), counts)

    def families(self) -> list[Metric]:
        """Of all processes, each family once and every sample with its worker."""
        gathered: Families = {}
        for worker in sorted(self._last.keys() | self._before.keys()):
            whole = _added(self._before.get(worker, {}), self._last.get(worker, {}))
            for name, family in whole.items():
                gathered.setdefault(name, _like(family)).samples.extend(
                    sample._replace(labels={"worker": worker, **sample.labels}) for sample in family.samples
                )
        return list(gathered.values())


def _families(text: str) -> Families:
    return {family.name: family for family in text_string_to_metric_families(text)}


def _counts(families: Families) -> Families:
    """Without what is true of a moment only."""
    return {name: family for name, family in families.items() if family.type in _GROWING}


def _added(before: Families, now: Families) -> Families:
    """`now`, with the counts of `before` added, those that `now` has not begun to count among them."""
    added: Families = {}
    for name in now | before:
        samples: dict[tuple[str, frozenset[tuple[str, str]]], Sample] = {}
        for family in (before.get(name), now.get(name)):
            for sample in () if family is None else family.samples:
                key = sample.name, frozenset(sample.labels.items())
                counted = samples[key].value if key in samples else 0.0
                samples[key] = sample._replace(value=counted + sample.value)
        added[name] = _like(now.get(name) or before[name])
        added[name].samples = list(samples.values())
    return added


def _like(family: Metric) -> Metric:
    return Metric(family.name, family.documentation, family.type)
