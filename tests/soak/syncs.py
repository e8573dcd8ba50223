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
TIME_GROWTH = 1.25  # other work on the machine makes noise
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
    memory, seconds = [s.memory / 1e6 for s in syncs], [s.seconds for s in syncs]
    outcomes = [
        _is_flat("memory of the worker, MB", memory, MEMORY_GROWTH, log),
        _is_flat("seconds of a sync", seconds, TIME_GROWTH, log),
    ]
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


def _is_flat(what: str, values: list[float], limit: float, log: Logger) -> bool:
    """Compare the medians of the first and the last quarter after the warm-up."""
    quarter = len(values[WARM_UP:]) // 4
    early = median(values[WARM_UP : WARM_UP + quarter])
    late = median(values[-quarter:])
    growth = late / early
    log.info("%s: %.4g, then %.4g (%+.2f %%)", what, early, late, 100 * (growth - 1))
    return growth < limit


def _fresh_answer(folder: Path, number: int) -> Answer:
    seed, name = _seed(number), str(number)
    checkpoint = write_checkpoint(CASE, seed, folder / f"fresh-{name}", tokenizer=True)
    with _started(checkpoint, folder / f"fresh-{name}.log") as server:
        server.wait()
        return answer_of(server.post("v1/completions", LONG_REQUEST))
