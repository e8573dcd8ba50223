# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Bodies that are no object, to routes that update weights; the router is vLLM's."""

from importlib import import_module

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from tests.harness.counting_engine import CountingEngine

try:
    api_router = import_module("vllm.entrypoints.rl.online.api_router")
except ImportError:  # before 0.32
    api_router = import_module("vllm.entrypoints.serve.rlhf.api_router")


@pytest.fixture
def client() -> TestClient:
    app = FastAPI()
    app.include_router(api_router.router)
    app.state.engine_client = CountingEngine()
    return TestClient(app, raise_server_exceptions=False)


ROUTES = pytest.mark.parametrize(
    ("route", "field"),
    [("/init_weight_transfer_engine", "init_info"), ("/update_weights", "update_info")],
)


@ROUTES
@pytest.mark.parametrize(
    "body", [b"", b"{", b"5", b"null", b'"update_info"', b"[1]", b'"\xff"']
)
def test_a_body_that_is_no_object_is_refused(client, route, field, body):
    headers = {"Content-Type": "application/json"}
    answer = client.post(route, content=body, headers=headers)
    assert answer.status_code in (400, 422), answer.text
    assert answer.json()["detail"]
    assert client.app.state.engine_client.asked == 0


@ROUTES
def test_an_object_reaches_the_engine(client, route, field):
    assert client.post(route, json={field: {}}).status_code == 200
    assert client.app.state.engine_client.asked == 1
