# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""All ranks of an engine go on with a weight update, or none does.

The workers of an engine form a grid TP x PCP x PP inside their data-parallel replica.
A vote runs along one axis of the grid after the other, which makes every worker's vote
known to all of them without a process group of its own.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from vllm.distributed.parallel_state import (
    get_pcp_group,
    get_pp_group,
    get_tp_group,
    model_parallel_is_initialized,
)
from vllm.logger import init_logger

__all__ = ["RankFailedError", "agree_across_ranks", "worker_axes"]

logger = init_logger(__name__)

TIMEOUT = timedelta(minutes=5)

# A vote has a fixed size, so that one collective without a size exchange carries it.
VOTE_BYTES = 1024


class RankFailedError(RuntimeError):
    """Another rank failed, or did not vote: this rank must not go on alone."""


@dataclass
class _Ballot:
    cast: bool = False


_ballot: ContextVar[_Ballot | None] = ContextVar("ballot", default=None)


@contextmanager
def agree_across_ranks(
    axes: Sequence[dist.ProcessGroup] | None = None, timeout: timedelta = TIMEOUT
) -> Iterator[None]:
    """Leave the block without an exception only if every rank does.

    Every rank enters the block and votes once, at its end, also a rank whose block
    raised. Blocks nest: an outer block leaves the vote to an inner one, and votes
    itself only on a rank that failed before it reached the inner one. So every rank
    votes once, wherever it fails:

        with agree_across_ranks():          # the RPC: votes if receive() raised
            receive()
            with agree_across_ranks():      # finalize: votes before anyone commits
                check()
            commit()

    Args:
        axes: CPU process groups to vote in, one after the other; default is the grid
            of this engine's workers. None of them: there is nothing to agree with.
        timeout: how long to wait for the votes of the other ranks.

    Raises:
        RankFailedError: this rank's block was fine, but another rank's raised, or its
            vote did not come in time. A rank whose own block raised sees that error.

    """
    axes = worker_axes() if axes is None else axes
    outer, ballot = _ballot.get(), _Ballot()
    token = _ballot.set(ballot)
    try:
        yield
    except BaseException as error:
        if not ballot.cast:
            _vote_failure(error, axes, timeout)
        raise
    else:
        if not ballot.cast:
            _vote_success(axes, timeout)
    finally:
        _ballot.reset(token)
        if outer is not None:
            outer.cast = True


def worker_axes() -> tuple[dist.ProcessGroup, ...]:
    """CPU process groups along which this engine's workers are laid out."""
    if not model_parallel_is_initialized():
        return ()
    grid = (get_tp_group(), get_pcp_group(), get_pp_group())
    return tuple(axis.cpu_group for axis in grid if axis.world_size > 1)


def _vote_success(axes: Sequence[dist.ProcessGroup], timeout: timedelta) -> None:
    failures = _exchange("", axes, timeout)
    if failures:
        raise RankFailedError(failures)


def _vote_failure(
    error: BaseException, axes: Sequence[dist.ProcessGroup], timeout: timedelta
) -> None:
    """Tell the others; what they say matters less than this rank's own error."""
    if not axes:
        return
    place = f"rank {dist.get_rank()} of {dist.get_world_size()}"
    try:
        _exchange(f"{place} failed: {type(error).__name__}: {error}", axes, timeout)
    except RankFailedError as silence:
        logger.warning(
            "%s failed, and its vote did not get through: %s", place, silence
        )


def _exchange(
    failure: str, axes: Sequence[dist.ProcessGroup], timeout: timedelta
) -> str:
    """Return the failures of all ranks, this one's included; "" if there is none."""
    for axis in axes:
        votes = _all_gather(failure, axis, timeout)
        failure = "\n".join(dict.fromkeys(vote for vote in votes if vote))
    return failure


def _all_gather(vote: str, axis: dist.ProcessGroup, timeout: timedelta) -> list[str]:
    """Exchange short texts along one axis.

    Raises:
        RankFailedError: a rank is gone or did not vote in time.

    """
    mine = torch.zeros(VOTE_BYTES, dtype=torch.uint8, device="cpu")
    text = bytearray(vote.encode()[:VOTE_BYTES])
    if text:
        mine[: len(text)] = torch.frombuffer(text, dtype=torch.uint8)
    votes = [torch.empty_like(mine) for _ in range(axis.size())]
    try:
        dist.all_gather(votes, mine, group=axis, async_op=True).wait(timeout)
    except RuntimeError as error:
        raise RankFailedError(
            f"not all of {axis.size()} ranks voted on the weight update (one is gone, "
            f"or this one waited {timeout.total_seconds():.0f} s): {error}"
        ) from error
    return [_text(other) for other in votes]


def _text(vote: torch.Tensor) -> str:
    return bytes(vote.tolist()).rstrip(b"\0").decode(errors="ignore")
