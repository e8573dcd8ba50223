# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""A trainer syncs into a running server of two replicas.

Each replica of a dense model is an engine of its own. Those of a mixture, which need
two GPUs, share out the experts. The server has loaded B, so what it answers at first is
what any server answers after a sync of B.
"""

from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import pytest
import requests
import torch
from packaging.version import Version

import vllm
from examples.rl.shm_trainer import Trainer
from tests.checkpoints import CASES, Case, write_checkpoint
from tests.harness.completion import REQUEST, Answer, answer_of
from tests.harness.server import GPU_OPTIONS, KEY, Server, refused, starting
from tests.harness.threads import one_thread

pytestmark = pytest.mark.skipif(
    torch.accelerator.device_count() == 1, reason="two replicas need two GPUs"
)

ON_GPU = torch.cuda.is_available()
A, B = 1, 2
BUCKET_BYTES = 8 << 20  # a checkpoint
OPTIONS = [
    *("--enforce-eager", "--max-model-len", "256", "--max-num-seqs", "4", "-dp=2"),
    *("--weight-transfer-config", '{"backend": "shm"}'),
    *(GPU_OPTIONS if ON_GPU else ()),
]
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "0|1",
    "VLLM_RELOAD_COMMIT": "model",
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
}


@dataclass(frozen=True)
class Replicated:
    """A model of which there are two replicas.

    Attributes:
        case: its checkpoint.
        options: of the command line.
        scale: a tensor of the checkpoint.
        layer: the layer that holds it, or, from 0.32 on, has one inside that does.
    """

    case: Case
    options: tuple[str, ...]
    scale: str
    layer: str


DENSE = Replicated(
    CASES["llama-fp8_block"],
    (),
    "model.layers.1.mlp.down_proj.weight_scale_inv",
    "model.layers.1.mlp.down_proj",
)
MIXTURE = Replicated(
    CASES["qwen3_moe-fp8_block"],
    ("--enable-expert-parallel",),
    "model.layers.1.mlp.experts.7.down_proj.weight_scale_inv",
    "model.layers.1.mlp.experts",
)


@dataclass(frozen=True)
class Running:
    """A server, its model, and what both replicas answered at first."""

    server: Server
    model: Replicated
    fresh_b: Answer


@pytest.fixture(
    scope="module",
    params=[DENSE, MIXTURE] if ON_GPU else [DENSE],
    ids=["dense", "mixture"] if ON_GPU else ["dense"],
)
def running(request, tmp_path_factory) -> Iterator[Running]:
    folder, model = tmp_path_factory.mktemp("replicas"), request.param
    checkpoint = write_checkpoint(model.case, B, folder / "model", tokenizer=True)
    options = [*OPTIONS, *model.options]
    with (
        one_thread(),  # the cores are for the replicas
        starting(checkpoint, folder / "log", options, ENVIRONMENT) as server,
    ):
        server.wait()
        first, second = answers(server)
        assert first == second
        yield Running(server, model, first)


@pytest.fixture
def server(running) -> Server:
    return running.server


class UnequalTrainer(Trainer):
    """Does not tell the second replica of a tensor."""

    def __init__(self, url: str, left_out: str):
        super().__init__(url, KEY, BUCKET_BYTES)
        self._left_out = left_out

    def post(self, route: str, **body: Any) -> None:
        if route == "update_weights":
            info = body["update_info"]
            kept = [n for n, name in enumerate(info["names"]) if name != self._left_out]
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
    case = running.model.case
    with closing(Trainer(server.url, KEY, BUCKET_BYTES)) as trainer:
        trainer.sync(case.tensors(A))
        first, second = answers(server)
        assert first == second != running.fresh_b
        trainer.sync(case.tensors(B))
    assert answers(server) == [running.fresh_b] * 2


def test_an_incomplete_sync_is_refused_by_all(running, server):
    model = running.model
    less = (t for t in model.case.tensors(A) if t[0] != model.scale)
    with closing(Trainer(server.url, KEY, BUCKET_BYTES)) as trainer:
        error = refusal(trainer, less)
    (found,) = error["missing"]
    assert found["layer"].startswith(model.layer)
    assert answers(server) == [running.fresh_b] * 2


@pytest.mark.skipif(
    Version(vllm.__version__) < Version("0.32"), reason="takes no list for its ranks"
)
def test_what_one_replica_lacks_no_replica_serves(running, server):
    model = running.model
    with closing(UnequalTrainer(server.url, model.scale)) as trainer:
        error = refusal(trainer, model.case.tensors(A))
    (found,) = error["missing"]
    assert found["layer"].startswith(model.layer)
    assert "Replicas [1] of 2 refused the weight update" in error["message"]
    assert answers(server) == [running.fresh_b] * 2
    with closing(Trainer(server.url, KEY, BUCKET_BYTES)) as trainer:
        trainer.sync(model.case.tensors(B))
    assert answers(server) == [running.fresh_b] * 2
