# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Processes of this machine that are the ranks of one engine, without the engine.

with start_ranks(2, tmp_path) as ranks:
    first, second = ranks.run(function, argument)
"""

import multiprocessing
import time
import traceback
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch

from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed import (
    destroy_distributed_environment,
    destroy_model_parallel,
    init_distributed_environment,
    initialize_model_parallel,
)

from . import stand_ins

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload([__name__, "tests.harness.models"])
TIMEOUT_SECONDS = 60


@dataclass(frozen=True)
class Ranks:
    """Processes that wait for functions to run, by rank."""

    processes: Sequence[BaseProcess]
    pipes: Sequence[Connection]

    def run(self, function: Callable, *args: Any) -> list[Any]:
        """Call a function on every rank at once; return what it gave, by rank.

        Args:
            function: A function of some module, called as `function(rank, *args)`.
            args: More arguments; they are pickled, and so is the result.

        Raises:
            AssertionError: A rank raised, is gone, or did not answer in time.
        """
        for rank, pipe in enumerate(self.pipes):
            assert self.processes[rank].is_alive(), f"rank {rank} is gone"
            pipe.send((function, args))
        deadline = time.monotonic() + TIMEOUT_SECONDS
        answers = [self._answer(rank, deadline) for rank in range(len(self.pipes))]
        for rank, (_, failure) in enumerate(answers):
            assert not failure, f"rank {rank} raised:\n{failure}"
        return [result for result, _ in answers]

    def _answer(self, rank: int, deadline: float) -> tuple[Any, str]:
        if not self.pipes[rank].poll(max(0.0, deadline - time.monotonic())):
            self.kill()  # late answers must not pass for those of the next function
            raise AssertionError(f"rank {rank} gave no answer in {TIMEOUT_SECONDS} s")
        try:
            return self.pipes[rank].recv()
        except (EOFError, ConnectionError):
            self.kill()
            raise AssertionError(f"rank {rank} is gone") from None

    def leave(self) -> None:
        """Let every rank that is still there free what it shares with the others."""
        for process, pipe in zip(self.processes, self.pipes, strict=True):
            if process.is_alive():
                pipe.send(None)
        for process in self.processes:
            process.join(TIMEOUT_SECONDS)

    def kill(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()


@contextmanager
def start_ranks(size: int, folder: Path) -> Iterator[Ranks]:
    """Start `size` ranks that meet in `folder`; all are gone afterwards."""
    identity = uuid.uuid4().hex
    pairs = [PROCESSES.Pipe() for _ in range(size)]
    processes = [
        PROCESSES.Process(
            target=_serve, args=(rank, size, folder, identity, theirs), daemon=True
        )
        for rank, (_, theirs) in enumerate(pairs)
    ]
    for process, (_, theirs) in zip(processes, pairs, strict=True):
        process.start()
        theirs.close()
    ranks = Ranks(processes, [ours for ours, _ in pairs])
    try:
        yield ranks
        ranks.leave()
    finally:
        ranks.kill()


def _serve(rank: int, size: int, folder: Path, identity: str, pipe: Connection) -> None:
    """Be one rank: run what comes, until there is no more or this process is killed."""
    torch.set_num_threads(1)
    patch = pytest.MonkeyPatch()  # never undone: for the life of this process
    patch.setenv("VLLM_DIST_IDENT", identity)  # names what ranks share in memory
    stand_ins.install(patch)
    _join(rank, size, (folder / "rendezvous").as_uri())
    while (request := pipe.recv()) is not None:
        function, args = request
        pipe.send(_call(function, rank, args))
    destroy_model_parallel()
    destroy_distributed_environment()


def _join(rank: int, size: int, meeting_point: str) -> None:
    """Join the groups of vLLM, with every rank along the tensor-parallel axis."""
    with set_current_vllm_config(VllmConfig()):
        init_distributed_environment(size, rank, meeting_point, rank, "gloo")
        initialize_model_parallel(size, 1)


def _call(function: Callable, rank: int, args: tuple[Any, ...]) -> tuple[Any, str]:
    try:
        return function(rank, *args), ""
    except Exception:
        return None, traceback.format_exc()
