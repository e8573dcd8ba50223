# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""A trainer in a process of its own.

    with start_trainer(Road.IPC, case) as trainer:
        trainer.sync(seed, post)

It says what to ask, and the process of the test asks: `post(route, body)` may reach an
engine, a server, or kill the trainer. Its weights stay at the same addresses, as those
of an optimiser do. Each sync writes them anew, and afterwards they are poison, so that
an engine which reads too late cannot be right.
"""

import multiprocessing
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from functools import partial
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

import torch

from examples.rl.shm_trainer import Trainer
from tests.checkpoints import Case

__all__ = ["Post", "Road", "TrainerGoneError", "TrainerProcess", "start_trainer"]

Post = Callable[[str, dict[str, Any]], Any]

# Less than a checkpoint, so that a sync takes several chunks.
BUCKET_BYTES = 1 << 20
# NaN in every floating-point format.
POISON = 0xFF
PROCESSES = multiprocessing.get_context("spawn")
TIMEOUT_SECONDS = 180


class Road(Enum):
    """How weights come from the trainer to the engine."""

    SHM = "shm"
    IPC = "ipc"
    IPC_PACKED = "ipc_packed"

    @property
    def backend(self) -> str:
        """What `--weight-transfer-config` calls it."""
        return "shm" if self is Road.SHM else "ipc"


class TrainerGoneError(RuntimeError):
    """The trainer's process has ended, or does not answer."""


@dataclass(frozen=True)
class Asked:
    """What the trainer asks of the engine."""

    route: str
    body: dict[str, Any]


@dataclass(frozen=True)
class Ended:
    """A sync is over for the trainer; `failure` is its stack trace, if it failed."""

    failure: str = ""


class TrainerProcess:
    """The trainer, seen from the test."""

    def __init__(self, process: BaseProcess, pipe: Connection):
        self._process, self._pipe = process, pipe

    def sync(self, seed: int, post: Post) -> None:
        """Let it send a checkpoint.

        Args:
            seed: Which one.
            post: Asks the engine.

        Raises:
            Exception: What `post` raised first; the trainer was told of it.
            TrainerGoneError: Its process has ended.
            AssertionError: It failed by itself.
        """
        refusals: list[Exception] = []
        self._tell(seed)
        while isinstance(message := self._heard(), Asked):
            try:
                post(message.route, message.body)
            except Exception as error:
                refusals.append(error)
                self._tell(f"{message.route}: {error}")
            else:
                self._tell("")
        if refusals:
            raise refusals[0]
        assert not message.failure, message.failure

    def kill(self) -> None:
        self._process.kill()
        self._process.join()

    def leave(self) -> None:
        """Let it free what it shares with the engine, and end."""
        if self._process.is_alive():
            self._tell(None)
            self._process.join(TIMEOUT_SECONDS)

    def _tell(self, message: int | str | None) -> None:
        try:
            self._pipe.send(message)
        except ConnectionError as error:
            raise TrainerGoneError("the trainer has ended") from error

    def _heard(self) -> Any:
        try:
            if self._pipe.poll(TIMEOUT_SECONDS):
                return self._pipe.recv()
        except (EOFError, ConnectionError) as error:
            raise TrainerGoneError("the trainer has ended") from error
        raise TrainerGoneError(f"the trainer said nothing in {TIMEOUT_SECONDS} s")


@contextmanager
def start_trainer(road: Road, case: Case) -> Iterator[TrainerProcess]:
    """Start a trainer of checkpoints of this case; it is gone afterwards."""
    ours, theirs = PROCESSES.Pipe()
    process = PROCESSES.Process(target=_train, args=(road, case, theirs), daemon=True)
    process.start()
    theirs.close()
    trainer = TrainerProcess(process, ours)
    try:
        yield trainer
        trainer.leave()
    finally:
        trainer.kill()


def _train(road: Road, case: Case, pipe: Connection) -> None:
    """Be the trainer: send what is asked for, until there is no more."""
    weights = _Weights(case, "cpu" if road is Road.SHM else "cuda")
    send = _sender(road, partial(_ask, pipe))
    while (seed := pipe.recv()) is not None:
        weights.write(seed)
        try:
            send(weights.tensors)
            ended = Ended()
        except Exception:
            ended = Ended(traceback.format_exc())
        weights.spoil()
        pipe.send(ended)


class _Weights:
    """A checkpoint in the trainer's memory, on one device."""

    def __init__(self, case: Case, device: str):
        self._case = case
        made = case.tensors(0)
        self.tensors = {name: tensor.to(device).contiguous() for name, tensor in made}

    def write(self, seed: int) -> None:
        """Make it the checkpoint of this seed."""
        for name, tensor in self._case.tensors(seed):
            self.tensors[name].copy_(tensor)
        self._wait()

    def spoil(self) -> None:
        """Fill it with what no engine must ever read."""
        for tensor in self.tensors.values():
            tensor.reshape(-1).view(torch.uint8).fill_(POISON)
        self._wait()

    def _wait(self) -> None:
        if next(iter(self.tensors.values())).is_cuda:
            torch.accelerator.synchronize()


def _ask(pipe: Connection, route: str, body: dict[str, Any]) -> None:
    pipe.send(Asked(route, body))
    if refusal := pipe.recv():
        raise RuntimeError(refusal)


def _sender(road: Road, ask: Post) -> Callable[[dict[str, torch.Tensor]], None]:
    if road is Road.SHM:
        return lambda tensors: _ShmTrainer(ask).sync_and_close(tensors)
    from .ipc_sender import send_by_ipc  # of vLLM, which takes seconds to import

    packed_bytes = BUCKET_BYTES if road is Road.IPC_PACKED else 0
    return partial(send_by_ipc, ask=ask, packed_bytes=packed_bytes)


class _ShmTrainer(Trainer):
    """The example's trainer, which asks through the test's process."""

    def __init__(self, ask: Post):
        self._ask = ask
        super().__init__("", bucket_bytes=BUCKET_BYTES)

    def post(self, route: str, **body: Any) -> Any:
        self._ask(route, body)
        return {"sync": None}  # an engine in a process tells nothing of it

    def sync_and_close(self, tensors: dict[str, torch.Tensor]) -> None:
        try:
            self.sync(tensors.items())
        finally:
            self.close()
