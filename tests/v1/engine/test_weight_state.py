# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""What the workers' weight states add up to."""

import pytest

from vllm.model_executor.model_loader.reload import ReloadStatus
from vllm.v1.engine.weight_state import EngineWeightState


def serving(version: int) -> tuple[ReloadStatus, ...]:
    return (ReloadStatus("serving", version),)


def broken(version: int, detail: str = "mixed") -> tuple[ReloadStatus, ...]:
    return (ReloadStatus("inconsistent", version, detail, fenced=True),)


def after(*reports) -> EngineWeightState:
    state = EngineWeightState()
    for report in reports:
        state = state.after(report)
    return state


@pytest.mark.parametrize(
    "report",
    [
        [serving(0)],
        [(ReloadStatus("updating", 0),)],
        [(ReloadStatus("inconsistent", 0, "dummy weights", fenced=False),)],
        [()],
        [],
    ],
    ids=["serving", "updating", "dummy weights", "no model", "no worker"],
)
def test_weights_that_may_serve(report):
    state = after(report)
    assert state.reason is None
    assert not state.committed_since(EngineWeightState())


def test_a_mixture_on_the_only_rank():
    assert after([broken(0)]).reason == "mixed"


def test_a_mixture_names_its_rank():
    assert after([serving(0), broken(0)]).reason == "rank 1: mixed"


def test_a_mixture_in_the_draft_model_counts():
    assert after([serving(0) + broken(0)]).reason == "mixed"


def test_a_complete_sync_mends_a_mixture():
    assert after([broken(0)], [serving(1)]).reason is None


def test_the_first_report_may_already_be_a_commit():
    assert after([serving(1)]).committed_since(EngineWeightState())


def test_a_commit_is_seen_once():
    first = after([serving(1)])
    assert not first.after([serving(1)]).committed_since(first)


def test_ranks_that_did_not_commit_are_named():
    reason = after([serving(1), serving(0), serving(1), serving(0)]).reason
    assert reason == (
        "new weights were committed on 2 of 4 ranks, but not on rank 1, 3"
    )


def test_a_split_stays_until_all_ranks_commit():
    split = after([serving(1), serving(0)])
    assert split.after([serving(1), serving(0)]).reason == split.reason
    assert split.after([serving(1), serving(1)]).reason is not None
    assert split.after([serving(2), serving(1)]).reason is None


def test_versions_may_differ_between_ranks_after_a_split_was_mended():
    mended = after([serving(1), serving(0)], [serving(2), serving(1)])
    assert mended.after([serving(3), serving(2)]).reason is None
    assert mended.after([serving(3), serving(1)]).reason is not None
