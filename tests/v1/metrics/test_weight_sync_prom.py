# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Series on weight syncs, of a logger for two engines."""

from functools import partial

import pytest
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from vllm.v1.metrics.stats import SchedulerStats
from vllm.v1.metrics.weight_sync import PHASES, EndedSync, WeightSyncStats
from vllm.v1.metrics.weight_sync_prom import WeightSyncProm

COMPLETE = EndedSync(
    result="complete",
    version=1,
    tensors=4,
    bytes=100,
    missing=0,
    invalid=0,
    seconds=2.0,
    phase_seconds=dict(zip(PHASES, (0.5, 1.0, 0.25, 0.25))),
    pause_seconds=0.375,
)
INVALID = EndedSync("invalid", 1, 4, 50, 1, 2, 9.0, dict.fromkeys(PHASES, 1.0), 1.0)


class Logger:
    """What a logger has for others of its kind."""

    def __init__(self):
        self.registry = CollectorRegistry()
        self.per_engine_labelvalues = {n: ["tiny", str(n)] for n in (0, 1)}
        self._counter_cls = partial(Counter, registry=self.registry)
        self._gauge_cls = partial(Gauge, registry=self.registry)
        self._histogram_cls = partial(Histogram, registry=self.registry)


class Series:
    """The series, and their values."""

    def __init__(self):
        logger = Logger()
        self._registry = logger.registry
        self._prom = WeightSyncProm(logger)
        self._prom.start()

    def tell(self, stats: WeightSyncStats | None, engine: int) -> None:
        scheduler_stats = SchedulerStats()
        scheduler_stats.weight_sync = stats
        self._prom.observe(scheduler_stats, engine)

    def __call__(self, name: str, engine: int = 1, **labels: str) -> float | None:
        labels |= {"model_name": "tiny", "engine": str(engine)}
        return self._registry.get_sample_value(f"vllm:weight_sync_{name}", labels)


@pytest.fixture
def series() -> Series:
    return Series()


def test_each_engine_has_its_own(series):
    series.tell(WeightSyncStats(3, True, 2, (COMPLETE, INVALID)), engine=1)
    assert series("version") == 3 and series("version", engine=0) == 0
    assert series("fenced") == 1 and series("fenced", engine=0) == 0
    assert series("bytes_total") == 150 and series("bytes_total", engine=0) == 0
    assert series("results_total", result="complete") == 1
    assert series("results_total", result="invalid") == 1
    assert series("results_total", result="failed") == 0
    assert series("missing_tensors_total") == 1
    assert series("invalid_tensors_total") == 2
    assert series("bad_scales_total") == 2


def test_only_complete_syncs_are_timed(series):
    series.tell(WeightSyncStats(1, False, 0, (COMPLETE, INVALID)), engine=1)
    for phase, seconds in COMPLETE.phase_seconds.items():
        assert series("phase_seconds_sum", phase=phase) == seconds
        assert series("phase_seconds_count", phase=phase) == 1
    assert series("pause_seconds_sum") == COMPLETE.pause_seconds


def test_steps_have_nothing_to_tell(series):
    series.tell(WeightSyncStats(1, True), engine=1)
    series.tell(None, engine=1)
    assert (series("version"), series("fenced")) == (1, 1)
    series.tell(WeightSyncStats(2, False), engine=1)
    assert (series("version"), series("fenced")) == (2, 0)
