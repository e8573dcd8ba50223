# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Malformed requests through CUDA IPC, to a server: it says what is wrong and lives.

It needs no GPU, because no handle is opened.
"""

from collections.abc import Iterator
from multiprocessing.reduction import ForkingPickler

import pybase64 as base64
import pytest

from tests.checkpoints import CASES, write_checkpoint
from tests.harness.completion import ask
from tests.harness.server import Server, starting

CASE = CASES["qwen3_moe-fp8_block"]
OPTIONS = [
    *("--enforce-eager", "--max-model-len", "256", "--max-num-seqs", "4"),
    *("--weight-transfer-config", '{"backend": "ipc"}'),
    # With a cached prefix a CPU with AMX rounds otherwise.
    "--no-enable-prefix-caching",
]
ENVIRONMENT = {
    "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_RELOAD_COMMIT": "model",
}
LISTS = {
    "names": ["model.norm.weight"],
    "dtype_names": ["bfloat16"],
    "shapes": [[64]],
}


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("server")
    model = write_checkpoint(CASE, 1, folder / "model", tokenizer=True)
    with starting(model, folder / "log", OPTIONS, ENVIRONMENT) as server:
        server.wait()
        yield server


def in_base64(pickled: bytes | memoryview) -> str:
    return base64.b64encode(pickled).decode()


NUMBER = in_base64(ForkingPickler.dumps(5))
MALFORMED = {
    "another type": {**LISTS, "names": 5, "ipc_handles": [{}]},
    "other lengths": {**LISTS, "shapes": [], "ipc_handles": [{}]},
    "no handles": LISTS,
    "handles of another type": {**LISTS, "ipc_handles": 5},
    "no handle": {**LISTS, "ipc_handles": [3]},
    "no base64": {**LISTS, "ipc_handles_pickled": "!"},
    "no pickle": {**LISTS, "ipc_handles_pickled": in_base64(b"garbage")},
    "no class": {**LISTS, "ipc_handles_pickled": in_base64(b"cnowhere\nnone\n.")},
    "a pickled number": {**LISTS, "ipc_handles_pickled": NUMBER},
}


@pytest.mark.parametrize("info", MALFORMED.values(), ids=MALFORMED)
def test_the_client_is_told_and_the_old_weights_serve(server, info):
    before = ask(server)
    assert server.post("init_weight_transfer_engine", {"init_info": {}}).ok
    assert server.post("start_weight_update", {}).ok
    answer = server.post("update_weights", {"update_info": info})
    assert answer.status_code == 400, answer.text
    assert "update_info" in answer.json()["error"]["message"]
    # The sync is dropped, so that there is nothing to finish.
    assert server.post("finish_weight_update", {}).status_code == 409
    assert ask(server) == before
