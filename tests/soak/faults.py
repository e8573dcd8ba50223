# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Thousands of random schedules of faults against one server."""

import time
from logging import Logger
from pathlib import Path

from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test

from tests.harness.fault_bench import FaultBench, starting_bench
from tests.harness.fault_schedule import FaultSchedule

__all__ = ["run"]

BATCH = 100
STEPS = 10


def run(count: int, folder: Path, log: Logger) -> bool:
    """Try `count` schedules; tell whether none has failed."""
    with starting_bench(folder) as bench:
        try:
            return _play(bench, count, log) == 0
        finally:  # also when it is interrupted
            for (kind, outcome), times in sorted(bench.tally.items()):
                log.info("%-40s %-20s %7d", kind, outcome, times)


def _play(bench: FaultBench, count: int, log: Logger) -> int:
    """Return how many batches have failed."""
    failures, start = 0, time.monotonic()
    while _played(bench) < count:
        failures += not _batch(bench, log)
        done, seconds = _played(bench), time.monotonic() - start
        log.info("%d schedules, %.0f s, %d batches failed", done, seconds, failures)
        if bench.server.process.poll() is not None:
            raise RuntimeError("the server has ended")
    return failures


def _batch(bench: FaultBench, log: Logger) -> bool:
    try:
        run_state_machine_as_test(
            lambda: FaultSchedule(bench),
            settings=settings(
                max_examples=BATCH,
                stateful_step_count=STEPS,
                deadline=None,
                database=None,
                phases=[Phase.generate],
                suppress_health_check=list(HealthCheck),
            ),
        )
    except Exception:
        log.exception("a schedule failed")
        return False
    return True


def _played(bench: FaultBench) -> int:
    return sum(n for (kind, _), n in bench.tally.items() if kind == "schedule")
