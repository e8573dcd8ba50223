# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""All ranks go on with a weight update, or none: with real gloo processes."""

import multiprocessing
import os
import time
from collections.abc import Callable
from datetime import timedelta

import pytest
import torch.distributed as dist

from vllm.model_executor.model_loader.reload.agreement import (
    RankFailedError,
    agree_across_ranks,
    worker_axes,
)

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload([agree_across_ranks.__module__])

FINE = "fine"
BOOM = "ValueError: boom"

Axes = list[dist.ProcessGroup]
Case = Callable[[int, Axes], None]


def outcomes(case: Case, directory, ranks: int = 2) -> list[str]:
    """Run a case on each rank; return what became of it there, by rank."""
    received = PROCESSES.Queue()
    args = case, ranks, f"file://{directory}/rendezvous", received
    workers = [
        PROCESSES.Process(target=_run, args=(rank, *args)) for rank in range(ranks)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    result = ["gone"] * ranks
    while not received.empty():
        rank, outcome = received.get()
        result[rank] = outcome
    assert not any(worker.is_alive() for worker in workers), result
    return result


def _run(rank: int, case: Case, ranks: int, init: str, received) -> None:
    dist.init_process_group("gloo", init_method=init, rank=rank, world_size=ranks)
    try:
        grid = _grid(rank, ranks)
        _wait_for_all(rank, ranks)
        case(rank, grid)
        outcome = FINE
    except Exception as error:
        outcome = f"{type(error).__name__}: {error}"
    received.put((rank, outcome))
    received.close()
    received.join_thread()
    if dist.is_initialized():
        dist.destroy_process_group()


def _grid(rank: int, ranks: int) -> Axes:
    """Axes of a grid of two columns, as TP 2 and PP ranks / 2 have them."""
    rows = [dist.new_group([r, r + 1]) for r in range(0, ranks, 2)]
    columns = [dist.new_group(list(range(c, ranks, 2))) for c in (0, 1)]
    return [rows[rank // 2], columns[rank % 2]] if ranks > 2 else [rows[0]]


def _wait_for_all(rank: int, ranks: int) -> None:
    """Let no rank die while another one still connects to it."""
    store = dist.distributed_c10d._get_default_store()
    store.set(f"{rank} is connected", "")
    store.wait([f"{other} is connected" for other in range(ranks)])


def all_succeed(rank: int, axes: Axes) -> None:
    with agree_across_ranks(axes):
        pass


def last_rank_raises(rank: int, axes: Axes) -> None:
    with agree_across_ranks(axes):
        _boom_on_last(rank)


def last_rank_raises_then_all_succeed(rank: int, axes: Axes) -> None:
    with pytest.raises((RankFailedError, ValueError)):
        last_rank_raises(rank, axes)
    all_succeed(rank, axes)


def last_rank_dies(rank: int, axes: Axes) -> None:
    with agree_across_ranks(axes):
        if rank == 1:
            os._exit(1)


def last_rank_does_not_vote(rank: int, axes: Axes) -> None:
    if rank == 0:
        with agree_across_ranks(axes, timedelta(seconds=1)):
            pass
    else:
        time.sleep(3)


def last_rank_raises_before_the_inner_vote(rank: int, axes: Axes) -> None:
    with agree_across_ranks(axes):
        _boom_on_last(rank)
        with agree_across_ranks(axes):
            pass
        raise AssertionError("committed without the last rank")


def last_rank_raises_in_the_inner_block(rank: int, axes: Axes) -> None:
    with agree_across_ranks(axes), agree_across_ranks(axes):
        _boom_on_last(rank)


def last_rank_raises_after_the_inner_vote(rank: int, axes: Axes) -> None:
    with agree_across_ranks(axes):
        with agree_across_ranks(axes):
            pass
        _boom_on_last(rank)


def nested_blocks_run_one_collective(rank: int, axes: Axes) -> None:
    before = axes[0]._get_sequence_number_for_group()
    with agree_across_ranks(axes), agree_across_ranks(axes):
        pass
    assert axes[0]._get_sequence_number_for_group() == before + 1


def last_rank_raises_a_long_text(rank: int, axes: Axes) -> None:
    with agree_across_ranks(axes):
        if rank == 1:
            raise ValueError("\N{GREEK SMALL LETTER ALPHA}" * 4000)


def _boom_on_last(rank: int) -> None:
    if rank == dist.get_world_size() - 1:
        raise ValueError("boom")


def test_all_succeed(tmp_path):
    assert outcomes(all_succeed, tmp_path) == [FINE, FINE]


def test_a_failing_rank_sees_its_own_error_and_the_others_whose_it_was(tmp_path):
    first, last = outcomes(last_rank_raises, tmp_path)
    assert first == f"RankFailedError: rank 1 of 2 failed: {BOOM}"
    assert last == BOOM


def test_a_failure_on_a_grid_reaches_every_rank(tmp_path):
    *others, last = outcomes(last_rank_raises, tmp_path, ranks=4)
    assert others == [f"RankFailedError: rank 3 of 4 failed: {BOOM}"] * 3
    assert last == BOOM


def test_the_next_agreement_is_clean(tmp_path):
    assert outcomes(last_rank_raises_then_all_succeed, tmp_path) == [FINE, FINE]


def test_a_dead_rank_is_an_error(tmp_path):
    first, last = outcomes(last_rank_dies, tmp_path)
    assert first.startswith("RankFailedError: not all of 2 ranks voted")
    assert last == "gone"


def test_a_silent_rank_is_an_error_after_the_timeout(tmp_path):
    first, last = outcomes(last_rank_does_not_vote, tmp_path)
    assert first.startswith("RankFailedError: not all of 2 ranks voted")
    assert "waited 1 s" in first
    assert last == FINE


@pytest.mark.parametrize(
    "case",
    [last_rank_raises_before_the_inner_vote, last_rank_raises_in_the_inner_block],
)
def test_nested_blocks_vote_once(case, tmp_path):
    first, last = outcomes(case, tmp_path)
    assert first == f"RankFailedError: rank 1 of 2 failed: {BOOM}"
    assert last == BOOM


def test_after_the_inner_vote_a_rank_fails_alone(tmp_path):
    assert outcomes(last_rank_raises_after_the_inner_vote, tmp_path) == [FINE, BOOM]


def test_an_outer_block_leaves_the_vote_to_the_inner_one(tmp_path):
    assert outcomes(nested_blocks_run_one_collective, tmp_path) == [FINE, FINE]


def test_a_long_text_is_cut(tmp_path):
    first, _ = outcomes(last_rank_raises_a_long_text, tmp_path)
    assert first.startswith(
        "RankFailedError: rank 1 of 2 failed: ValueError: \u03b1\u03b1"
    )


def test_a_world_of_one_needs_no_process_group():
    assert worker_axes() == ()
    with agree_across_ranks():
        pass
    with pytest.raises(ValueError, match="boom"), agree_across_ranks():
        raise ValueError("boom")
