# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""What an engine core tells of its weights, and when."""

import queue
from dataclasses import asdict, replace
from types import SimpleNamespace

import msgspec
import pytest

from tests.model_executor.model_loader.reload.test_sync_report import EXAMPLE
from vllm.v1.engine import EngineCoreOutputs
from vllm.v1.engine.weight_sync_feed import WeightSyncFeed
from vllm.v1.metrics.stats import SchedulerStats
from vllm.v1.metrics.weight_sync import EndedSync, WeightSyncStats
from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder
from vllm.v1.worker.weight_report import WorkerReply


class Feed(WeightSyncFeed):
    """A feed whose outbox can be looked into."""

    def __init__(self, make_stats=SchedulerStats):
        self.outbox: queue.Queue = queue.Queue()
        scheduler = SimpleNamespace(make_stats=make_stats)
        super().__init__(SimpleNamespace(scheduler=scheduler), self.outbox)

    def told(self) -> list[WeightSyncStats]:
        sent = [self.outbox.get_nowait() for _ in range(self.outbox.qsize())]
        assert all(client == 0 for client, _ in sent)
        return [outputs.scheduler_stats.weight_sync for _, outputs in sent]


def reply(*ended) -> WorkerReply:
    return WorkerReply(None, None, (), ended)


def test_nothing_new_is_not_told():
    feed = Feed()
    feed.note_replies([reply(), reply()])
    feed.tell(0, False)
    assert feed.told() == []
    feed.tell(0, True)
    feed.tell(0, True)
    feed.tell(1, False)
    assert feed.told() == [WeightSyncStats(0, True), WeightSyncStats(1, False)]


def test_what_ended_is_told_once():
    feed = Feed()
    feed.note_replies([reply(EXAMPLE)])
    feed.note_bad_scales([1, 2])
    feed.tell(7, False)
    feed.tell(7, False)
    (stats,) = feed.told()
    assert stats == WeightSyncStats(7, False, 3, (EndedSync.of([EXAMPLE]),))
    assert feed.last == stats.ended[0]


def test_ranks_are_added_up_or_the_slowest_decides():
    slow = replace(EXAMPLE, rank=1, seconds=0.75, pause_seconds=0.5, bytes=1)
    sync = EndedSync.of([EXAMPLE, slow])
    assert sync.bytes == EXAMPLE.bytes + 1
    assert (sync.seconds, sync.pause_seconds) == (0.75, 0.5)
    assert sync.phase_seconds["receive"] == slow.phase_seconds["receive"]
    assert sync.phase_seconds["commit"] == EXAMPLE.committing_seconds


@pytest.mark.parametrize(
    "results, result",
    [
        (("complete", "complete"), "complete"),
        (("failed", "incomplete"), "incomplete"),
        (("invalid", "failed"), "invalid"),
        (("complete", "failed"), "failed"),
    ],
)
def test_the_rank_that_failed_by_itself_says_how(results, result):
    reports = [replace(EXAMPLE, result=each, missing=1) for each in results]
    sync = EndedSync.of(reports)
    assert (sync.result, sync.missing) == (result, 2)


def test_a_rank_may_have_nothing_to_say():
    feed = Feed()
    feed.note_replies([reply(EXAMPLE), reply(), reply(EXAMPLE, EXAMPLE)])
    feed.tell(0, False)
    (stats,) = feed.told()
    assert [sync.bytes for sync in stats.ended] == [2 * EXAMPLE.bytes, EXAMPLE.bytes]


def test_without_metrics_nothing_is_told_and_nothing_kept():
    feed = Feed(make_stats=lambda: None)
    feed.note_replies([reply(EXAMPLE)])
    feed.tell(1, False)
    assert feed.told() == []
    feed.tell(1, False)


def test_an_rpc_that_ends_no_sync_has_none():
    feed = Feed()
    feed.note_replies([reply(EXAMPLE)])
    assert feed.last_as_dict() == asdict(EndedSync.of([EXAMPLE]))
    feed.note_replies([reply()])
    assert feed.last_as_dict() is None


def test_it_travels_as_it_is():
    stats = SchedulerStats()
    stats.weight_sync = WeightSyncStats(3, True, 2, (EndedSync.of([EXAMPLE]),))
    message = MsgpackEncoder().encode(EngineCoreOutputs(scheduler_stats=stats))
    try:
        came = MsgpackDecoder(EngineCoreOutputs).decode(message)
    except msgspec.ValidationError as error:
        pytest.fail(str(error))
    assert came.scheduler_stats.weight_sync == stats.weight_sync
