# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Who may reach what changes weights; the application and its layers are vLLM's."""

import logging
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from tests.harness.counting_engine import CountingEngine

# Each release has it in another place, but all of them here.
from vllm.entrypoints.cli.serve import make_arg_parser
from vllm.utils.argparse_utils import FlexibleArgumentParser

try:
    from vllm.entrypoints.launchers.app import build_app
except ImportError:  # before 0.32
    from vllm.entrypoints.openai.api_server import build_app

KEY = {"Authorization": "Bearer right"}
NOT_THE_KEY = [
    {},
    {"Authorization": "Bearer wrong"},
    {"Authorization": "right"},
    {"Authorization": "Bearer "},
]
CHANGES_WEIGHTS = {
    "/init_weight_transfer_engine",
    "/start_weight_update",
    "/update_weights",
    "/finish_weight_update",
    "/abort_weight_update",
    "/collective_rpc",
    "/pause",
    "/resume",
    "/sleep",
    "/wake_up",
}
OPEN = ["/health", "/metrics", "/ping", "/version"]
# None of these changes weights; docs/live-server.md says what they do.
MAY_BE_OPEN = {
    *OPEN,
    *("/load", "/kv_event_sources", "/tokenize", "/detokenize"),
    *("/invocations", "/generative_scoring"),
    *("/pooling", "/classify", "/score", "/rerank"),
}
# Dev mode or not, and with adapters that may be loaded at run time.
WITHOUT_DEV_MODE = {
    ("post", "/scale_elastic_ep"),
    ("post", "/adapters"),
    ("delete", "/adapters/{adapter_name}"),
}


def app_of(
    monkeypatch,
    dev_mode: bool,
    *options: str,
    tasks: tuple[str, ...] = ("generate",),
) -> FastAPI:
    monkeypatch.setenv("VLLM_SERVER_DEV_MODE", str(int(dev_mode)))
    parser = make_arg_parser(FlexibleArgumentParser())
    app = build_app(parser.parse_args(["--api-key", "right", *options]), tasks)
    app.state.engine_client = CountingEngine()
    app.state.server = SimpleNamespace(should_exit=False)
    return app


def routes(app: FastAPI) -> set[tuple[str, str]]:
    paths = app.openapi()["paths"]
    return {(method, path) for path, methods in paths.items() for method in methods}


@pytest.fixture(autouse=True)
def level() -> Iterator[None]:
    """Keep the root logger's level, which a library of the application's raises."""
    before = logging.root.level
    yield
    logging.root.setLevel(before)


@pytest.fixture
def dev_app(monkeypatch) -> FastAPI:
    return app_of(monkeypatch, True)


@pytest.fixture
def dev_routes(monkeypatch, dev_app) -> set[tuple[str, str]]:
    return routes(dev_app) - routes(app_of(monkeypatch, False))


def test_what_changes_weights_is_there_in_dev_mode_only(dev_routes):
    assert {path for _, path in dev_routes} >= CHANGES_WEIGHTS


@pytest.mark.parametrize("headers", NOT_THE_KEY)
def test_a_dev_route_needs_the_key(dev_app, dev_routes, headers):
    client = TestClient(dev_app)
    answers = {
        (method, path): client.request(method, path, headers=headers)
        for method, path in dev_routes
    }
    assert {answer.status_code for answer in answers.values()} == {401}
    assert dev_app.state.engine_client.asked == 0


@pytest.mark.parametrize("headers", NOT_THE_KEY)
def test_what_changes_weights_without_dev_mode_needs_the_key(monkeypatch, headers):
    monkeypatch.setenv("VLLM_ALLOW_RUNTIME_LORA_UPDATING", "1")
    app = app_of(monkeypatch, False)
    assert routes(app) >= WITHOUT_DEV_MODE
    # Behind the guard an adapter's route looks for a model, and finds none.
    client = TestClient(app, raise_server_exceptions=False)
    for method, path in WITHOUT_DEV_MODE:
        assert client.request(method, path, headers=headers).status_code == 401
        assert client.request(method, path, headers=KEY).status_code != 401


def test_a_dev_route_answers_who_has_the_key(dev_app):
    answer = TestClient(dev_app).post("/resume", headers=KEY)
    assert answer.status_code == 200
    assert dev_app.state.engine_client.asked == 1


@pytest.mark.parametrize("path", OPEN)
def test_other_routes_stay_open(dev_app, path):
    assert TestClient(dev_app).get(path).status_code == 200


def test_nothing_else_is_open(monkeypatch):
    monkeypatch.setenv("VLLM_ALLOW_RUNTIME_LORA_UPDATING", "1")
    app = app_of(monkeypatch, True, tasks=("generate", "embed", "classify"))
    client = TestClient(app, raise_server_exceptions=False)
    found = {
        path
        for method, path in routes(app)
        if client.request(method, path).status_code != 401
    }
    assert found <= MAY_BE_OPEN


@pytest.mark.parametrize("path", ["/api/resume", "/resume", "/api/resume/", "/resume/"])
def test_no_way_round_by_the_path(monkeypatch, path):
    app = app_of(monkeypatch, True, "--root-path", "/api")
    assert TestClient(app).post(path).status_code == 401
    assert app.state.engine_client.asked == 0


@pytest.mark.parametrize("path", ["//resume", "/RESUME", "/resume/x", "/%2fresume"])
def test_what_is_no_route_reaches_nothing(dev_app, path):
    assert TestClient(dev_app).post(path).status_code == 404
    assert dev_app.state.engine_client.asked == 0


def test_options_pass_as_on_other_routes(dev_app):
    answers = [TestClient(dev_app).options(path) for path in ("/resume", "/version")]
    assert {answer.status_code for answer in answers} == {405}


def test_without_a_key_nothing_is_guarded(monkeypatch):
    monkeypatch.setenv("VLLM_SERVER_DEV_MODE", "1")
    parser = make_arg_parser(FlexibleArgumentParser())
    app = build_app(parser.parse_args([]), ("generate",))
    app.state.engine_client = CountingEngine()
    assert TestClient(app).post("/resume").status_code == 200
