# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""What the server answers when its workers refuse a weight update."""

import pytest
from fastapi.testclient import TestClient

# Each release has it in another place, but all of them here.
from vllm.entrypoints.cli.serve import make_arg_parser
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.v1.engine.rpc_refusal import RpcRefusal, RpcRefusedError

try:
    from vllm.entrypoints.launchers.app import build_app
except ImportError:  # before 0.32
    from vllm.entrypoints.openai.api_server import build_app

MISSING = [{"layer": "layers.0", "parameter": "weight", "ranks": [0]}]


class Engine:
    """Refuses to finish."""

    def __init__(self, error: Exception):
        self.error = error

    async def finish_weight_update(self, *args) -> None:
        raise self.error


@pytest.fixture
def answer_to(monkeypatch):
    monkeypatch.setenv("VLLM_SERVER_DEV_MODE", "1")
    parser = make_arg_parser(FlexibleArgumentParser())
    app = build_app(parser.parse_args([]), ("generate",))

    def answer(error: Exception):
        app.state.engine_client = Engine(error)
        # What the last of the handlers answers is raised too, for the server's log.
        client = TestClient(app, raise_server_exceptions=False)
        return client.post("/finish_weight_update", json={})

    return answer


@pytest.mark.parametrize("status", [400, 409, 422])
def test_what_is_wrong_is_listed(answer_to, status):
    refusal = RpcRefusal("weight sync is incomplete", status, MISSING, [], 3)
    answer = answer_to(RpcRefusedError(refusal))
    assert answer.status_code == status
    error = answer.json()["error"]
    assert error["code"] == status
    assert error["message"] == "weight sync is incomplete"
    assert (error["missing"], error["invalid"], error["more"]) == (MISSING, [], 3)


def test_other_errors_list_nothing(answer_to):
    answer = answer_to(RuntimeError("out of order"))
    assert answer.status_code == 500
    assert "missing" not in answer.json()["error"]
