# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""How metrics learn of weight syncs, also of an engine that has nothing to do.

Statistics leave an engine core with the outputs of a step. A sync is over between
steps, and the next one may be far off, so it is told by an output without requests.
"""

import queue
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from itertools import zip_longest
from typing import Any

from vllm.v1.engine import EngineCoreOutputs
from vllm.v1.metrics.weight_sync import EndedSync, WeightSyncStats
from vllm.v1.worker.weight_report import WorkerReply

__all__ = ["WeightSyncFeed"]

# Of several clients, the one whose metrics have the engine's gauges in any case.
CLIENT = 0


class WeightSyncFeed:
    """Collects what is new about the weights of an engine core, and tells it.

    Args:
        core: the engine core.
        outbox: where outputs for a client go: (client index, outputs).

    Attributes:
        last: the sync that the last RPC ended, if it did.

    """

    def __init__(
        self, core: Any, outbox: "queue.Queue[tuple[int, EngineCoreOutputs]]"
    ) -> None:
        self.last: EndedSync | None = None
        self._core = core
        self._outbox = outbox
        self._ended: list[EndedSync] = []
        self._bad_scales = 0
        self._told = (0, False)

    def last_as_dict(self) -> dict[str, Any] | None:
        """The sync that the last RPC ended, for other processes."""
        return None if self.last is None else asdict(self.last)

    def note_replies(self, replies: Sequence[WorkerReply]) -> None:
        """Take in which syncs an RPC ended; of all ranks, in order."""
        self.last = None
        for reports in zip_longest(*(reply.ended for reply in replies)):
            self.last = EndedSync.of([report for report in reports if report])
            self._ended.append(self.last)

    def note_bad_scales(self, counts: Iterable[int]) -> None:
        """Take in how often kernels met a bad scale, on some ranks."""
        self._bad_scales += sum(counts)

    def tell(self, version: int, fenced: bool) -> None:
        """Tell what is new, if anything is.

        Args:
            version: complete syncs so far.
            fenced: whether requests are refused.

        """
        state = version, fenced
        if not self._ended and not self._bad_scales and state == self._told:
            return
        stats = self._core.scheduler.make_stats()
        if stats is not None:  # else nobody keeps metrics
            ended = tuple(self._ended)
            stats.weight_sync = WeightSyncStats(*state, self._bad_scales, ended)
            outputs = EngineCoreOutputs(scheduler_stats=stats)
            self._outbox.put_nowait((CLIENT, outputs))
        self._ended, self._bad_scales, self._told = [], 0, state
