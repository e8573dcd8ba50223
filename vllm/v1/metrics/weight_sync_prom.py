# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Prometheus series on weight syncs.

How often requests had to wait for a commit, and for how long, in an hour:

    increase(vllm:weight_sync_pause_seconds_count[1h])
    increase(vllm:weight_sync_pause_seconds_sum[1h])

"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from vllm.v1.metrics.stats import SchedulerStats
from vllm.v1.metrics.weight_sync import PHASES, RESULTS, EndedSync

if TYPE_CHECKING:
    from vllm.v1.metrics.loggers import PrometheusStatLogger

__all__ = ["WeightSyncProm"]

# Upper bounds of the buckets, in seconds.
BUCKETS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)


class WeightSyncProm:
    """Series on the weight syncs of some engines.

    Args:
        logger: the logger that they belong to; it says which library keeps them.

    """

    def __init__(self, logger: "PrometheusStatLogger"):
        self._logger = logger
        self._results = self._counter(
            "results", "Weight syncs that have ended, by result.", ["result"]
        )
        self._bytes = self._counter("bytes", "Bytes that syncs wrote on all ranks.")
        self._missing = self._counter(
            "missing_tensors", "Parts of parameters that syncs owed and did not bring."
        )
        self._invalid = self._counter(
            "invalid_tensors", "Parts of parameters that syncs brought and are invalid."
        )
        self._bad_scales = self._counter(
            "bad_scales", "How often kernels met a bad weight scale while serving."
        )
        self._phases = self._histogram(
            "phase_seconds",
            "Seconds of complete syncs, by phase, on the slowest rank.",
            ["phase"],
        )
        self._pause = self._histogram(
            "pause_seconds", "Seconds for which complete syncs let no request run."
        )
        self._version = self._gauge("version", "Complete weight syncs so far.")
        self._fenced = self._gauge(
            "fenced", "Whether requests are refused for the state of the weights."
        )

    def start(self) -> None:
        """Show all series, before there is anything to tell."""
        for engine in self._engines.values():
            for result in RESULTS:
                self._results.labels(*engine, result)
            for phase in PHASES:
                self._phases.labels(*engine, phase)
            for series in self._plain:
                series.labels(*engine)

    def observe(self, stats: SchedulerStats | None, engine_index: int) -> None:
        """Take in what an engine tells."""
        if stats is None or stats.weight_sync is None:
            return
        engine = self._engines[engine_index]
        for sync in stats.weight_sync.ended:
            self._observe_ended(sync, engine)
        self._bad_scales.labels(*engine).inc(stats.weight_sync.bad_scales)
        self._version.labels(*engine).set(stats.weight_sync.version)
        self._fenced.labels(*engine).set(int(stats.weight_sync.fenced))

    def _observe_ended(self, sync: EndedSync, engine: Sequence[object]) -> None:
        self._results.labels(*engine, sync.result).inc()
        self._bytes.labels(*engine).inc(sync.bytes)
        self._missing.labels(*engine).inc(sync.missing)
        self._invalid.labels(*engine).inc(sync.invalid)
        # How long a sync stayed open that nobody ended says nothing of those that do.
        if sync.result == "complete":
            self._pause.labels(*engine).observe(sync.pause_seconds)
            for phase, seconds in sync.phase_seconds.items():
                self._phases.labels(*engine, phase).observe(seconds)

    @property
    def _engines(self) -> Mapping[int, Sequence[object]]:
        """By index: values of the labels that all series have."""
        return self._logger.per_engine_labelvalues

    @property
    def _plain(self) -> tuple[Any, ...]:
        """The series that have no label of their own."""
        counters = self._bytes, self._missing, self._invalid, self._bad_scales
        return *counters, self._pause, self._version, self._fenced

    def _counter(self, name: str, what: str, labels: Sequence[str] = ()) -> Any:
        return self._logger._counter_cls(**_description(name, what, labels))

    def _histogram(self, name: str, what: str, labels: Sequence[str] = ()) -> Any:
        description = _description(name, what, labels)
        return self._logger._histogram_cls(**description, buckets=BUCKETS)

    def _gauge(self, name: str, what: str) -> Any:
        description = _description(name, what)
        return self._logger._gauge_cls(**description, multiprocess_mode="mostrecent")


def _description(name: str, what: str, labels: Sequence[str] = ()) -> dict[str, Any]:
    return dict(
        name=f"vllm:weight_sync_{name}",
        documentation=what,
        labelnames=["model_name", "engine", *labels],
    )
