# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Weights come into a running server by other roads than the weight update routes.

One server, which has no weight transfer configured and commits layer by layer. It has
loaded B, so what it answers at first is what any server answers after a sync of B.
"""

import json
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import pytest
import requests
import torch
from safetensors.torch import load_file, save_file

from tests.checkpoints import CASES, write_checkpoint
from tests.harness.completion import REQUEST, Answer, ask
from tests.harness.server import Server, starting

CASE = CASES["qwen3_moe-fp8_block"]
A, B = 1, 2
EXTENSION = "tests.entrypoints.rl.bucket_extension.BucketExtension"
OPTIONS = [
    *("--enforce-eager", "--max-model-len", "256", "--max-num-seqs", "4"),
    *("--worker-extension-cls", EXTENSION),
]
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_RELOAD_COMMIT": "layer",
    "VLLM_RELOAD_ROLLBACK": "host",
}
CHUNK_TENSORS = 40
BUCKET_BYTES = 2 << 20
# In the last layer, so that others are committed before it is missed.
SCALE = "model.layers.1.mlp.experts.7.down_proj.weight_scale_inv"
NORM = "model.norm.weight"
HIDDEN = str(CASE.sizes.hidden)

Named = tuple[str, torch.Tensor]


@dataclass(frozen=True)
class Running:
    """A server, what it answered at first, and where checkpoints are, by seed."""

    server: Server
    fresh_b: Answer
    folders: dict[int, Path]


@pytest.fixture(scope="module")
def running(tmp_path_factory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("server")
    folders = {
        seed: write_checkpoint(CASE, seed, folder / str(seed), tokenizer=True)
        for seed in (A, B)
    }
    log = folder / "log"
    with starting(folders[B], log, OPTIONS, ENVIRONMENT) as server:
        server.wait()
        yield Running(server, ask(server), folders)


@pytest.fixture
def fresh_b(running) -> Answer:
    return running.fresh_b


@pytest.fixture
def server(running) -> Iterator[Server]:
    """The server; it serves B again afterwards."""
    yield running.server
    assert running.server.post("wake_up", {}).status_code == 200
    call(running.server, "drop_sync")
    call(running.server, "reload_weights", weights_path=str(running.folders[B]))
    assert ask(running.server) == running.fresh_b


@dataclass(frozen=True)
class Bucket:
    """A file that server and trainer have mapped, written over for each chunk."""

    server: Server
    memory: torch.Tensor

    def sync(self, tensors: Iterable[Named]) -> requests.Response:
        """Push tensors; return the first answer that is an error, or the last one."""
        call(self.server, "begin_sync")
        remaining = iter(tensors)
        while chunk := list(islice(remaining, CHUNK_TENSORS)):
            answer = rpc(self.server, "load_chunk", self._write(chunk))
            if not answer.ok:
                return answer
        return rpc(self.server, "end_sync")

    def _write(self, chunk: list[Named]) -> str:
        self.memory.fill_(0xFF)
        start, entries = 0, []
        for name, tensor in chunk:
            data = tensor.contiguous().reshape(-1).view(torch.uint8)
            self.memory[start : start + data.numel()] = data
            dtype = str(tensor.dtype).removeprefix("torch.")
            entries.append((name, dtype, list(tensor.shape), start))
            start += -(-data.numel() // 16) * 16
        return json.dumps(entries)


@pytest.fixture
def bucket(server, tmp_path) -> Bucket:
    path = str(tmp_path / "bucket")
    memory = torch.from_file(path, shared=True, size=BUCKET_BYTES, dtype=torch.uint8)
    call(server, "map_bucket", path, str(BUCKET_BYTES))
    return Bucket(server, memory)


def rpc(server: Server, method: str, *args: str, **kwargs: str) -> requests.Response:
    body = {"method": method, "args": args, "kwargs": kwargs}
    return server.post("collective_rpc", body)


def call(server: Server, method: str, *args: str, **kwargs: str) -> list:
    """Return what a method of the worker gives; it must succeed."""
    response = rpc(server, method, *args, **kwargs)
    assert response.status_code == 200, response.text
    return response.json()["results"]


def status_of(server: Server) -> dict:
    ((status,),) = call(server, "weight_status")
    return status


def without_scale(folder: Path, source: Path) -> str:
    """Copy a checkpoint but for `SCALE`."""
    shutil.copytree(source, folder)
    for path in folder.glob("*.safetensors"):
        tensors = load_file(path)
        tensors.pop(SCALE, None)
        save_file(tensors, path)
    return str(folder)


def test_weights_come_from_disk(running, server, fresh_b):
    call(server, "reload_weights", weights_path=str(running.folders[A]))
    assert ask(server) != fresh_b
    call(server, "reload_weights", weights_path=str(running.folders[B]))
    assert ask(server) == fresh_b


def test_an_incomplete_checkpoint_is_refused(running, server, fresh_b, tmp_path):
    path = without_scale(tmp_path / "incomplete", running.folders[A])
    answer = rpc(server, "reload_weights", weights_path=path)
    assert answer.status_code == 422, answer.text
    (found,) = answer.json()["error"]["missing"]
    assert (found["expert"], found["shard"]) == (7, "down")
    assert ask(server) == fresh_b


@pytest.mark.parametrize("is_there", [True, False])
def test_a_place_without_weights_is_named(server, fresh_b, tmp_path, is_there):
    path = tmp_path / "none"
    if is_there:
        path.mkdir()
    answer = rpc(server, "reload_weights", weights_path=str(path))
    assert answer.status_code == 400, answer.text
    message = answer.json()["error"]["message"]
    assert "weights_path: expected a folder" in message
    assert "got 'none' in " in message
    assert ask(server) == fresh_b


@pytest.mark.parametrize("is_there", [True, False])
def test_a_reload_that_fails_leaves_where_weights_come_from(
    running, server, fresh_b, tmp_path, is_there
):
    call(server, "reload_weights", weights_path=str(running.folders[B]))
    path = tmp_path / "bad"
    if is_there:
        without_scale(path, running.folders[A])
    assert not rpc(server, "reload_weights", weights_path=str(path)).ok
    call(server, "reload_weights")
    assert ask(server) == fresh_b


def test_chunks_come_through_the_bucket_of_an_extension(server, bucket, fresh_b):
    assert bucket.sync(CASE.tensors(A)).status_code == 200
    assert ask(server) != fresh_b
    assert bucket.sync(CASE.tensors(B)).status_code == 200
    assert ask(server) == fresh_b


def test_an_incomplete_sync_of_an_extension_is_rolled_back(server, bucket, fresh_b):
    answer = bucket.sync(item for item in CASE.tensors(A) if item[0] != SCALE)
    assert answer.status_code == 422, answer.text
    (found,) = answer.json()["error"]["missing"]
    assert (found["expert"], found["shard"]) == (7, "down")
    assert ask(server) == fresh_b


def test_a_bad_chunk_of_an_extension_is_rolled_back(server, bucket, fresh_b):
    tensors = [*CASE.tensors(A)][:-1] + [(NORM, torch.ones(3))]
    answer = bucket.sync(tensors)
    assert answer.status_code == 422, answer.text
    assert NORM in answer.json()["error"]["message"]
    assert rpc(server, "end_sync").status_code == 422
    assert ask(server) == fresh_b


def test_what_comes_in_kernel_format_is_said_to_be_unchecked(running, server):
    call(server, "copy_kernel_format", NORM, HIDDEN)
    status = status_of(server)
    assert (status["state"], status["unchecked"]) == ("serving", "kernel format")
    assert "past the checks of a sync (kernel format)" in server.log.read_text()
    call(server, "reload_weights", weights_path=str(running.folders[B]))
    assert status_of(server)["unchecked"] == ""


def test_kernel_format_that_breaks_off_is_fenced(running, server, fresh_b):
    assert rpc(server, "copy_kernel_format", NORM, HIDDEN, "3").status_code == 500
    answer = server.post("v1/completions", REQUEST)
    assert answer.status_code == 503
    assert "kernel format" in answer.json()["error"]["message"]
    assert requests.get(f"{server.url}/health", timeout=60).status_code == 503
    call(server, "reload_weights", weights_path=str(running.folders[B]))
    assert ask(server) == fresh_b


def test_weights_that_were_reset_are_not_served(running, server, fresh_b):
    assert server.post("weight_checker", {"action": "reset"}).status_code == 200
    answer = server.post("v1/completions", REQUEST)
    assert answer.status_code == 503, answer.text
    assert "reset the weights to zeros" in answer.json()["error"]["message"]
    call(server, "reload_weights", weights_path=str(running.folders[B]))
    assert ask(server) == fresh_b


def test_a_patch_is_said_to_be_unchecked(running, server):
    call(server, "patch", NORM, "3", "7.5")
    assert status_of(server)["unchecked"] == "patches"
    assert "past the checks of a sync (patches)" in server.log.read_text()
    call(server, "reload_weights", weights_path=str(running.folders[B]))
    assert status_of(server)["unchecked"] == ""


@pytest.mark.parametrize(
    ("route", "body"),
    [
        ("init_weight_transfer_engine", {"init_info": {"segment": "vllm-weights-1"}}),
        ("start_weight_update", {}),
    ],
)
def test_without_a_transfer_engine_the_setting_is_named(server, fresh_b, route, body):
    answer = server.post(route, body)
    assert answer.status_code == 501, answer.text
    assert "--weight-transfer-config" in answer.json()["error"]["message"]
    assert ask(server) == fresh_b


@pytest.mark.parametrize("level", [1, 2])
def test_an_engine_does_not_sleep_while_a_sync_is_open(server, bucket, fresh_b, level):
    call(server, "begin_sync")
    answer = server.post(f"sleep?level={level}", {})
    assert answer.status_code == 409, answer.text
    assert "abort_weight_update" in answer.json()["error"]["message"]
    assert ask(server) == fresh_b
    call(server, "drop_sync")
    assert server.post(f"sleep?level={level}", {}).status_code == 200


@pytest.mark.parametrize("level", [1, 2])
def test_weights_that_sleep_are_not_written_to(running, server, fresh_b, level):
    path = str(running.folders[A])
    assert server.post(f"sleep?level={level}", {}).status_code == 200
    answer = rpc(server, "reload_weights", weights_path=path)
    assert answer.status_code == 409, answer.text
    assert "wake_up" in answer.json()["error"]["message"]
    assert server.post("wake_up?tags=weights", {}).status_code == 200
    call(server, "reload_weights", weights_path=path)
    assert server.post("wake_up?tags=kv_cache", {}).status_code == 200
    assert ask(server) != fresh_b
