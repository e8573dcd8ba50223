# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""A trainer syncs into a running server of two replicas of a dense model.

Each replica is an engine of its own. The server has loaded B, so what it answers at
first is what any server answers after a sync of B.
"""

from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import pytest
import requests

from examples.rl.shm_trainer import Trainer
from tests.checkpoints import CASES, write_checkpoint
from tests.harness.completion import REQUEST, Answer, answer_of
from tests.harness.server import KEY, Server, refused, starting
from tests.harness.threads import one_thread

CASE = CASES["llama-fp8_block"]
A, B = 1, 2
BUCKET_BYTES = 8 << 20  # a checkpoint
OPTIONS = [
    *("--enforce-eager", "--max-model-len", "256", "--max-num-seqs", "4", "-dp=2"),
    *("--weight-transfer-config", '{"backend": "shm"}'),
]
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "0|1",
    "VLLM_RELOAD_COMMIT": "model",
}
SCALE = "model.layers.1.mlp.down_proj.weight_scale_inv"


@dataclass(frozen=True)
class Running:
    """A server, and what both replicas answered at first."""

    server: Server
    fresh_b: Answer


@pytest.fixture(scope="module")
def running(tmp_path_factory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("replicas")
    model = write_checkpoint(CASE, B, folder / "model", tokenizer=True)
    with (
        one_thread(),  # the cores are for the replicas
        starting(model, folder / "log", OPTIONS, ENVIRONMENT) as server,
    ):
        server.wait()
        first, second = answers(server)
        assert first == second
        yield Running(server, first)


@pytest.fixture
def server(running) -> Server:
    return running.server


class UnequalTrainer(Trainer):
    """Does not tell the second replica of `SCALE`."""

    def post(self, route: str, **body: Any) -> None:
        if route == "update_weights":
            info = body["update_info"]
            kept = [n for n, name in enumerate(info["names"]) if name != SCALE]
            less = {
                key: [values[n] for n in kept]
                for key, values in info.items()
                if isinstance(values, list)
            }
            body["update_info"] = [info, {**info, **less}]
        super().post(route, **body)


def answers(server: Server) -> list[Answer]:
    """Return what each replica answers: tokens and their log-probabilities."""
    return [answer(server, replica) for replica in range(2)]


def answer(server: Server, replica: int) -> Answer:
    headers = {"Authorization": f"Bearer {KEY}", "X-data-parallel-rank": str(replica)}
    return answer_of(
        requests.post(
            f"{server.url}/v1/completions", json=REQUEST, headers=headers, timeout=60
        )
    )


def refusal(trainer: Trainer, tensors: Any) -> dict:
    """Return the error of a sync that is refused for what it lacks."""
    status, error = refused(trainer.sync, tensors)
    assert status == 422
    return error


def test_a_sync_reaches_all_replicas(running, server):
    with closing(Trainer(server.url, KEY, BUCKET_BYTES)) as trainer:
        trainer.sync(CASE.tensors(A))
        first, second = answers(server)
        assert first == second != running.fresh_b
        trainer.sync(CASE.tensors(B))
    assert answers(server) == [running.fresh_b] * 2


def test_an_incomplete_sync_is_refused_by_all(running, server):
    with closing(Trainer(server.url, KEY, BUCKET_BYTES)) as trainer:
        error = refusal(trainer, (t for t in CASE.tensors(A) if t[0] != SCALE))
    (found,) = error["missing"]
    assert found["layer"] == "model.layers.1.mlp.down_proj"
    assert answers(server) == [running.fresh_b] * 2


def test_a_replica_that_lacks_something_keeps_its_weights(running, server):
    with closing(UnequalTrainer(server.url, KEY, BUCKET_BYTES)) as trainer:
        error = refusal(trainer, CASE.tensors(A))
    (found,) = error["missing"]
    assert found["layer"] == "model.layers.1.mlp.down_proj"
    first, second = answers(server)
    assert first != running.fresh_b
    assert second == running.fresh_b
    with closing(Trainer(server.url, KEY, BUCKET_BYTES)) as trainer:
        trainer.sync(CASE.tensors(B))
    assert answers(server) == [running.fresh_b] * 2
