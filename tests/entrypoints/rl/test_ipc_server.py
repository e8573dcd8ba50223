# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""A trainer syncs into a running server over HTTP, its weights through CUDA IPC.

Two servers, one of each checkpoint. The first is synced, and must answer as the second
did when it had loaded its own.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import pytest
import requests
import torch

from tests.checkpoints import CASES, write_checkpoint
from tests.harness.ipc_sender import json_of
from tests.harness.server import GPU_OPTIONS, Server, starting
from tests.harness.synced_engine import PROMPTS
from tests.harness.trainer_process import (
    Post,
    Road,
    TrainerGoneError,
    TrainerProcess,
    start_trainer,
)

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

CASE = CASES["qwen3_moe-fp8_block"]
A, B = 1, 2
ROADS = (Road.IPC, Road.IPC_PACKED)
SYNCS = 20
OPTIONS = [
    *("--max-model-len", "256", "--max-num-seqs", "4"),
    *("--weight-transfer-config", '{"backend": "ipc"}'),
    *("--compilation-config", '{"mode": 0, "cudagraph_mode": "FULL"}'),
    *(*GPU_OPTIONS, "--enable-sleep-mode"),
]
ENVIRONMENT = {
    "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",
    "VLLM_RELOAD_COMMIT": "model",
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
}
REQUEST = {
    "model": "tiny",
    "prompt": PROMPTS[0],
    "max_tokens": 16,
    "temperature": 0,
    "logprobs": 1,
    "ignore_eos": True,
    "return_token_ids": True,
}

Answer = tuple[list[int], list[float]]


@dataclass(frozen=True)
class Running:
    """The server that is synced, and what fresh ones answer, by seed."""

    server: Server
    fresh: dict[int, Answer]


@pytest.fixture(scope="module")
def running(tmp_path_factory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("servers")
    with ExitStack() as first, ExitStack() as other:
        servers = {}
        for seed, stack in ((A, first), (B, other)):
            model = write_checkpoint(CASE, seed, folder / str(seed), tokenizer=True)
            log = folder / f"{seed}.log"
            started = starting(model, log, OPTIONS, ENVIRONMENT)
            servers[seed] = stack.enter_context(started)
        for server in servers.values():
            server.wait()
        fresh = {seed: ask(server) for seed, server in servers.items()}
        other.close()
        yield Running(servers[A], fresh)


@pytest.fixture(scope="module", params=ROADS, ids=lambda road: road.value)
def trainer(request) -> Iterator[TrainerProcess]:
    with start_trainer(request.param, CASE) as trainer:
        yield trainer


def ask(server: Server) -> Answer:
    """Return what a server answers: tokens and their log-probabilities."""
    response = server.post("v1/completions", REQUEST)
    assert response.status_code == 200, response.text
    (choice,) = response.json()["choices"]
    return choice["token_ids"], choice["logprobs"]["token_logprobs"]


def over_http(server: Server) -> Post:
    """What a trainer asks, asked with the key."""

    def post(route: str, body: dict[str, Any]) -> None:
        answer = server.post(route, json_of(body))
        if not answer.ok:
            raise requests.HTTPError(answer.text, response=answer)

    return post


def status_of(act: Callable[..., Any], *args: Any) -> int:
    """Return the status of a request that is refused."""
    with pytest.raises(requests.HTTPError) as raised:
        act(*args)
    return raised.value.response.status_code


def test_each_sync_serves_what_a_fresh_server_serves(running, trainer):
    assert running.fresh[A] != running.fresh[B]
    for count in range(SYNCS):
        seed = (B, A)[count % 2]
        trainer.sync(seed, over_http(running.server))
        assert ask(running.server) == running.fresh[seed]


@pytest.mark.parametrize("level", [1, 2])
def test_a_sync_waits_until_the_weights_are_awake(running, trainer, level):
    server, post = running.server, over_http(running.server)
    trainer.sync(A, post)
    assert server.post(f"sleep?level={level}", {}).status_code == 200
    assert status_of(trainer.sync, B, post) == 409
    assert server.post("wake_up?tags=weights", {}).status_code == 200
    trainer.sync(B, post)
    assert server.post("wake_up?tags=kv_cache", {}).status_code == 200
    assert ask(server) == running.fresh[B]


def test_a_trainer_that_is_killed_changes_nothing(running, trainer, request):
    server = running.server
    trainer.sync(A, over_http(server))
    with start_trainer(request.node.callspec.params["trainer"], CASE) as killed:

        def post(route: str, body: dict[str, Any]) -> None:
            if route == "finish_weight_update":
                killed.kill()
            else:
                over_http(server)(route, body)

        with pytest.raises(TrainerGoneError):
            killed.sync(B, post)
    assert ask(server) == running.fresh[A]
    assert status_of(trainer.sync, B, over_http(server)) == 409
    assert server.post("abort_weight_update", {}).status_code == 200
    trainer.sync(B, over_http(server))
    assert ask(server) == running.fresh[B]


def test_a_key_is_asked_for(running, trainer):
    def post(route: str, body: dict[str, Any]) -> None:
        answer = running.server.post(route, json_of(body), key="wrong")
        answer.raise_for_status()

    assert status_of(trainer.sync, B, post) == 401
