# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""What an engine core tells of its weights, for metrics.

Plain data that travels in `SchedulerStats`. The ranks of an engine sync together: what
they report of one sync is added up here, or the slowest rank decides.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm.model_executor.model_loader.reload.sync_report import SyncReport

__all__ = ["PHASES", "RESULTS", "EndedSync", "WeightSyncStats"]

# Of ranks that differ the first of these is told: others failed because that one did.
RESULTS = ("incomplete", "invalid", "failed", "aborted", "complete")
PHASES = ("wait", "receive", "check", "commit")


@dataclass(frozen=True)
class EndedSync:
    """A sync that has ended on the ranks of an engine.

    Attributes:
        result: one of `RESULTS`.
        version: complete syncs so far.
        tensors: how many were sent to a rank, at most.
        bytes: what was written on all ranks, in checkpoint format.
        missing: parts of parameters that were never sent, counted on each rank.
        invalid: parts of parameters that must not be served, counted on each rank.
        seconds: from start to end, on the slowest rank.
        phase_seconds: by phase, on the rank that it took longest on.
        pause_seconds: during which no request ran, on the slowest rank.

    """

    result: str
    version: int
    tensors: int
    bytes: int
    missing: int
    invalid: int
    seconds: float
    phase_seconds: dict[str, float]
    pause_seconds: float

    @classmethod
    def of(cls, reports: Sequence["SyncReport"]) -> "EndedSync":
        """Return what the ranks' reports of one sync add up to."""
        phases = [report.phase_seconds for report in reports]
        return cls(
            result=min((report.result for report in reports), key=RESULTS.index),
            version=min(report.version for report in reports),
            tensors=max(report.tensors for report in reports),
            bytes=sum(report.bytes for report in reports),
            missing=sum(report.missing for report in reports),
            invalid=sum(report.invalid for report in reports),
            seconds=max(report.seconds for report in reports),
            phase_seconds={phase: max(p[phase] for p in phases) for phase in PHASES},
            pause_seconds=max(report.pause_seconds for report in reports),
        )


@dataclass(frozen=True)
class WeightSyncStats:
    """What is new about the weights of an engine.

    Attributes:
        version: complete syncs so far, on the rank that has the fewest.
        fenced: whether requests are refused.
        bad_scales: how often kernels met a bad scale, since this was told last.
        ended: the syncs that have ended since.

    """

    version: int
    fenced: bool
    bad_scales: int = 0
    ended: tuple[EndedSync, ...] = ()
