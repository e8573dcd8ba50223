# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""A trainer syncs into running servers over HTTP, and makes mistakes.

Two servers, started once: one that serves the old weights until a sync is whole, and
one that commits layer by layer. The trainer is the example.
"""

import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path

import pytest
import requests
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from examples.rl.shm_trainer import Trainer
from tests.checkpoints import CASES, write_checkpoint
from tests.harness.completion import PROMPT, REQUEST, Answer, ask
from tests.harness.server import KEY, Server, refused, starting
from vllm.distributed.weight_transfer.clients import HTTPVLLMWeightSyncClient

CASE = CASES["qwen3_moe-fp8_block"]
A, B = 1, 2
OPTIONS = [
    *("--enforce-eager", "--max-model-len", "256", "--max-num-seqs", "4"),
    *("--weight-transfer-config", '{"backend": "shm"}'),
]
# Less than a checkpoint, so that a sync takes several chunks.
BUCKET_BYTES = 1 << 20
# Longer than it takes to pause it.
LONG_REQUEST = {**REQUEST, "prompt": PROMPT[:40], "max_tokens": 200}
SCALE = "model.layers.0.mlp.experts.0.down_proj.weight_scale_inv"
NORM = "model.norm.weight"

# A trainer that has sent some chunks.
KILLED = f"""
import os, signal, sys
from examples.rl.shm_trainer import Trainer
from tests.checkpoints import CASES

def tensors():
    for item in CASES["qwen3_moe-fp8_block"].tensors({B}):
        if "layers.1." in item[0]:
            os.kill(os.getpid(), signal.SIGKILL)
        yield item

Trainer(*sys.argv[1:], {BUCKET_BYTES // 2}).sync(tensors())
"""

Named = tuple[str, torch.Tensor]


@dataclass(frozen=True)
class Running:
    """A server, and what it answered with the weights that it had loaded."""

    server: Server
    first_answer: Answer


@pytest.fixture(scope="module")
def running(tmp_path_factory) -> Iterator[dict[str, Running]]:
    """By commit policy: "model" has loaded A, and "layer" B."""
    folder = tmp_path_factory.mktemp("servers")
    with ExitStack() as stack:
        servers = {}
        for policy, seed in (("model", A), ("layer", B)):
            model = write_checkpoint(CASE, seed, folder / str(seed), tokenizer=True)
            environment = {"VLLM_RELOAD_COMMIT": policy, "VLLM_CPU_KVCACHE_SPACE": "1"}
            log = folder / f"{policy}.log"
            servers[policy] = stack.enter_context(
                starting(model, log, OPTIONS, environment)
            )
        for server in servers.values():
            server.wait()
        yield {p: Running(server, ask(server)) for p, server in servers.items()}


@pytest.fixture
def fresh_a(running) -> Answer:
    return running["model"].first_answer


@pytest.fixture
def fresh_b(running) -> Answer:
    return running["layer"].first_answer


@pytest.fixture
def server(running) -> Server:
    return running["model"].server


@pytest.fixture
def trainer(server) -> Iterator[Trainer]:
    """A trainer whose server serves A."""
    assert server.post("abort_weight_update", {}).status_code == 200
    with closing(Trainer(server.url, KEY, BUCKET_BYTES)) as trainer:
        trainer.sync(CASE.tensors(A))
        yield trainer


def tokens_of(answer: dict) -> list[int]:
    return answer["choices"][0]["token_ids"]


def without(seed: int, *endings: str) -> Iterator[Named]:
    return (item for item in CASE.tensors(seed) if not item[0].endswith(endings))


def replaced(seed: int, name: str, value: torch.Tensor) -> Iterator[Named]:
    return ((n, value if n == name else tensor) for n, tensor in CASE.tensors(seed))


def test_a_sync_serves_what_a_fresh_server_serves(server, trainer, fresh_a, fresh_b):
    assert fresh_a != fresh_b
    trainer.sync(CASE.tensors(B))
    assert ask(server) == fresh_b
    trainer.sync(CASE.tensors(A))
    assert ask(server) == fresh_a


def test_the_trainer_of_the_readme_works(server, trainer, fresh_b):
    readme = (Path(__file__).parents[3] / "README.md").read_text()
    code = readme.split("## Into a running server")[1].split("```python")[1]
    names = {"URL": server.url, "KEY": KEY, "tensors": CASE.tensors(B)}
    exec(code.split("```")[0], names)
    assert ask(server) == fresh_b


def test_without_scales_the_old_weights_serve(server, trainer, fresh_a, fresh_b):
    status, error = refused(trainer.sync, without(B, "_scale_inv"))
    assert status == error["code"] == 422
    assert len(error["missing"]) == 20
    assert error["more"] > 0
    (gate,) = (
        found
        for found in error["missing"]
        if (found["expert"], found["shard"]) == (0, "gate")
    )
    assert gate["layer"].startswith("model.layers.0.mlp.experts")
    assert gate["parameter"] == "w13_weight_scale_inv"
    assert (gate["detail"], gate["ranks"]) == ("never sent", [0])
    assert ask(server) == fresh_a
    trainer.sync(CASE.tensors(B))
    assert ask(server) == fresh_b


def test_one_missing_tensor_is_named(server, trainer, fresh_a):
    status, error = refused(
        trainer.sync, without(B, "layers.1.self_attn.k_proj.weight")
    )
    assert status == 422
    (found,) = error["missing"]
    assert found["layer"] == "model.layers.1.self_attn.qkv_proj"
    assert found["parameter"] == "weight"
    assert (error["invalid"], error["more"]) == ([], 0)
    assert ask(server) == fresh_a


def test_a_scale_that_is_nan_is_named(server, trainer, fresh_a):
    scale = torch.full_like(dict(CASE.tensors(B))[SCALE], torch.nan)
    status, error = refused(trainer.sync, replaced(B, SCALE, scale))
    assert status == 422
    assert error["missing"] == []
    (found, *_) = error["invalid"]
    assert found["parameter"] == "w2_weight_scale_inv"
    assert (found["expert"], found["shard"]) == (0, "down")
    assert "scale is nan" in found["detail"]
    assert ask(server) == fresh_a


def test_a_wrong_shape_ends_the_sync(server, trainer, fresh_a):
    status, error = refused(trainer.sync, replaced(B, NORM, torch.ones(3)))
    assert status == 422
    assert NORM in error["message"]
    assert refused(trainer.post, "finish_weight_update")[0] == 409
    assert ask(server) == fresh_a


def test_a_wrong_key_changes_nothing(server, trainer, fresh_a):
    for route in ("start_weight_update", "update_weights", "finish_weight_update"):
        assert server.post(route, {}, key="wrong").status_code == 401
    assert refused(trainer.post, "finish_weight_update")[0] == 409
    assert ask(server) == fresh_a


def test_the_client_of_the_base_sends_no_key(server, fresh_a):
    status, _ = refused(HTTPVLLMWeightSyncClient(server.url).start_weight_update)
    assert status == 401


@pytest.mark.parametrize("segment", ["psm_1234abcd", "vllm-weights-none", "../x", 7])
def test_a_segment_that_is_no_bucket_is_refused(server, trainer, fresh_b, segment):
    status, error = refused(
        trainer.post, "init_weight_transfer_engine", init_info={"segment": segment}
    )
    assert status == 400
    assert "segment" in error["message"]
    trainer.sync(CASE.tensors(B))
    assert ask(server) == fresh_b


def test_the_bucket_of_another_trainer_is_refused(server, trainer, fresh_a):
    with closing(Trainer(server.url, KEY, BUCKET_BYTES)):
        status, error = refused(trainer.sync, CASE.tensors(B))
    assert status == 400
    assert "segment" in error["message"]
    assert ask(server) == fresh_a


def test_a_second_sync_waits_for_the_first(server, trainer, fresh_a, fresh_b):
    def interrupted() -> Iterator[Named]:
        for count, item in enumerate(CASE.tensors(B)):
            if count == 100:
                assert refused(trainer.post, "start_weight_update")[0] == 409
                assert refused(Trainer, server.url, KEY, BUCKET_BYTES)[0] == 409
                assert ask(server) == fresh_a
            yield item

    trainer.sync(interrupted())
    assert ask(server) == fresh_b


def test_a_paused_request_goes_on_with_the_new_weights(server, trainer, fresh_b):
    old = tokens_of(server.post("v1/completions", LONG_REQUEST).json())
    with server.stream("v1/completions", LONG_REQUEST) as answers:
        tokens = tokens_of(next(answers))
        assert server.post("pause?mode=keep", {}).status_code == 200
        trainer.sync(CASE.tensors(B))
        assert server.post("resume", {}).status_code == 200
        for answer in answers:
            tokens += tokens_of(answer)
    assert len(tokens) == len(old)
    assert tokens[0] == old[0]
    assert tokens != old
    assert ask(server) == fresh_b


def test_a_request_that_is_not_paused_is_not_lost(server, trainer, fresh_b):
    new = list(CASE.tensors(B))
    with server.stream("v1/completions", LONG_REQUEST) as answers:
        tokens = tokens_of(next(answers))
        trainer.sync(new)
        for answer in answers:
            tokens += tokens_of(answer)
    assert len(tokens) == LONG_REQUEST["max_tokens"]
    assert ask(server) == fresh_b


def test_a_sync_is_finished_once(server, trainer, fresh_a):
    status, error = refused(trainer.post, "finish_weight_update")
    assert status == 409
    assert "start_weight_update" in error["message"]
    assert ask(server) == fresh_a


def test_a_chunk_needs_a_start(server, trainer, fresh_a):
    assert refused(trainer.post, "update_weights", update_info={})[0] == 409
    assert ask(server) == fresh_a


def test_a_trainer_that_fails_takes_back_what_it_sent(server, trainer, fresh_a):
    def fails() -> Iterator[Named]:
        for item in CASE.tensors(B):
            if "layers.1." in item[0]:
                raise ArithmeticError("the optimizer has diverged")
            yield item

    with pytest.raises(ArithmeticError):
        trainer.sync(fails())
    assert refused(trainer.post, "finish_weight_update")[0] == 409
    assert ask(server) == fresh_a


def test_who_comes_after_a_killed_trainer_starts_anew(server, fresh_a, fresh_b):
    with closing(Trainer(server.url, KEY, BUCKET_BYTES)) as trainer:
        trainer.sync(CASE.tensors(A))
    killed = subprocess.run([sys.executable, "-c", KILLED, server.url, KEY], text=True)
    assert killed.returncode == -signal.SIGKILL
    assert ask(server) == fresh_a
    assert refused(Trainer, server.url, KEY, BUCKET_BYTES)[0] == 409
    assert server.post("abort_weight_update", {}).status_code == 200
    # With a cached prefix a CPU with AMX rounds otherwise.
    assert server.post("reset_prefix_cache", {}).status_code == 200
    assert ask(server) == fresh_a
    with closing(Trainer(server.url, KEY, BUCKET_BYTES)) as next_trainer:
        next_trainer.sync(CASE.tensors(B))
    assert ask(server) == fresh_b


def test_half_committed_weights_are_fenced(running, fresh_a, fresh_b):
    server = running["layer"].server
    with closing(Trainer(server.url, KEY, BUCKET_BYTES)) as trainer:
        assert (
            refused(trainer.sync, without(A, "1.down_proj.weight_scale_inv"))[0] == 422
        )
        answer = server.post("v1/completions", REQUEST)
        assert answer.status_code == 503
        assert "layers are committed" in answer.json()["error"]["message"]
        health = requests.get(f"{server.url}/health", timeout=60)
        assert health.status_code == 503
        assert "layers are committed" in health.json()["error"]["message"]
        trainer.sync(CASE.tensors(A))
        assert ask(server) == fresh_a
        trainer.sync(CASE.tensors(B))
        assert requests.get(f"{server.url}/health", timeout=60).status_code == 200
    assert ask(server) == fresh_b


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3)
    ),
    max_leaves=6,
)
KEYS = ("names", "dtype_names", "shapes", "offsets")
ENTRIES = st.tuples(
    st.sampled_from([NORM, SCALE, "lm_head.weight", "model.layers.9", ""]),
    st.sampled_from(["bfloat16", "float32", "float8_e4m3fn", "bool"]),
    st.sampled_from([[256], [2, 1], [], [0], [-1, 3], [1 << 40]]),
    st.sampled_from([0, 1, 16, 1 << 10, BUCKET_BYTES - 512, BUCKET_BYTES, -16]),
)
INFOS = st.lists(ENTRIES, max_size=3).map(
    lambda entries: {key: [each[n] for each in entries] for n, key in enumerate(KEYS)}
) | st.fixed_dictionaries({}, optional=dict.fromkeys(KEYS, JSON))


@settings(
    max_examples=100,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(st.builds(dict, update_info=INFOS | st.lists(INFOS, max_size=2) | JSON) | JSON)
def test_no_request_is_the_fault_of_the_server(server, trainer, body):
    server.post("start_weight_update", {})
    infos = body.get("update_info") if isinstance(body, dict) else None
    if isinstance(infos, dict):
        infos.setdefault("segment", trainer.segment)
    assert server.post("update_weights", body).status_code < 500
    assert server.post("finish_weight_update", {}).status_code < 500


def test_after_all_that_a_sync_is_whole(server, trainer, fresh_b):
    trainer.sync(CASE.tensors(B))
    assert ask(server) == fresh_b
