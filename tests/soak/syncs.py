# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Hundreds of syncs into one server, of five checkpoints in turn, and requests between.

Memory and time must stay flat, and at five points the answers must be those of a server
that was started with the checkpoint.
"""

import time
from contextlib import closing
from dataclasses import dataclass
from logging import Logger
from pathlib import Path
from statistics import median

from examples.rl.shm_trainer import Trainer
from tests.checkpoints import CASES, write_checkpoint
from tests.harness.fault_bench import SERVER_OPTIONS
from tests.harness.fault_schedule import LONG_REQUEST, answer_of
from tests.harness.server import KEY, Server, starting

__all__ = ["run"]

CASE = CASES["qwen3_moe-fp8_block"]
# Few, so that after the first ones each expert has met its numbers of tokens: for each
# new number the worker may keep a kernel.
CHECKPOINTS = POINTS = 5
WARM_UP = 10
MEMORY_GROWTH = 1.01
# The last quarter's median over the first's; other work on the machine makes noise.
TIME_GROWTH = 1.25
POLICY = {"VLLM_RELOAD_COMMIT": "layer", "VLLM_RELOAD_ROLLBACK": "host"}
Answer = tuple[list[int], list[float]]


@dataclass(frozen=True)
class Sync:
    """What was measured of a sync.

    Attributes:
        seconds: from start to finish.
        memory: proportional set size of the worker after it, in bytes.
        answer: what the server answered then.
    """

    seconds: float
    memory: int
    answer: Answer


def run(count: int, folder: Path, log: Logger) -> bool:
    """Sync `count` times; tell whether memory, time and answers are as they should."""
    first = write_checkpoint(CASE, 0, folder / "0", tokenizer=True)
    with _started(first, folder / "server.log") as server:
        server.wait()
        with closing(Trainer(server.url, KEY, 1 << 20)) as trainer:
            syncs = [_sync(server, trainer, n, log) for n in range(count)]
    outcomes = [_memory_is_flat(syncs, log), _time_is_flat(syncs, log)]
    for point in range(1, POINTS + 1):
        # Each point is at another checkpoint.
        number = count * point // POINTS - point
        same = _fresh_answer(folder, number) == syncs[number].answer
        log.info("after sync %d: %s a fresh server", number, "as" if same else "UNLIKE")
        outcomes.append(same)
    return all(outcomes)


def _started(checkpoint: Path, log: Path):
    return starting(checkpoint, log, SERVER_OPTIONS, POLICY)


def _seed(number: int) -> int:
    return 1 + number % CHECKPOINTS


def _sync(server: Server, trainer: Trainer, number: int, log: Logger) -> Sync:
    tensors = list(CASE.tensors(_seed(number)))
    start = time.perf_counter()
    trainer.sync(tensors)
    seconds = time.perf_counter() - start
    answer = answer_of(server.post("v1/completions", LONG_REQUEST))
    memory = _worker_memory(server)
    log.info("sync %3d: %.3f s, %.1f MB", number, seconds, memory / 1e6)
    return Sync(seconds, memory, answer)


def _worker_memory(server: Server) -> int:
    answer = server.post("collective_rpc", {"method": "process_id"})
    (told,) = answer.json()["results"]
    lines = Path(f"/proc/{told['process_id']}/smaps_rollup").read_text().splitlines()
    (size,) = (line.split()[1] for line in lines if line.startswith("Pss:"))
    return int(size) * 1024


def _memory_is_flat(syncs: list[Sync], log: Logger) -> bool:
    early = syncs[WARM_UP].memory
    late = max(sync.memory for sync in syncs[WARM_UP:])
    log.info(
        "memory of the worker: %.2f MB after sync %d, at most %.2f MB since (%+.2f %%)",
        early / 1e6,
        WARM_UP,
        late / 1e6,
        100 * (late / early - 1),
    )
    return late < MEMORY_GROWTH * early


def _time_is_flat(syncs: list[Sync], log: Logger) -> bool:
    seconds = [sync.seconds for sync in syncs[WARM_UP:]]
    quarter = len(seconds) // 4
    early, late = median(seconds[:quarter]), median(seconds[-quarter:])
    log.info(
        "median time: %.4f s in the first quarter, %.4f s in the last (%+.1f %%)",
        early,
        late,
        100 * (late / early - 1),
    )
    return late < TIME_GROWTH * early


def _fresh_answer(folder: Path, number: int) -> Answer:
    seed, name = _seed(number), str(number)
    checkpoint = write_checkpoint(CASE, seed, folder / f"fresh-{name}", tokenizer=True)
    with _started(checkpoint, folder / f"fresh-{name}.log") as server:
        server.wait()
        return answer_of(server.post("v1/completions", LONG_REQUEST))
