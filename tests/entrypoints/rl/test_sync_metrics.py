# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""What a running server tells of weight syncs: series, pauses and who answered."""

import json
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from threading import Event

import pytest
import regex as re
import requests
import torch
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from examples.rl.shm_trainer import Trainer
from examples.rl.weight_checksums import differing
from tests.checkpoints import CASES, write_checkpoint
from tests.harness.completion import choice_of
from tests.harness.server import KEY, Server, starting

CASE = CASES["qwen3_moe-fp8_block"]
A, B = 1, 2
OPTIONS = [
    *("--enforce-eager", "--max-model-len", "256", "--max-num-seqs", "4"),
    *("--weight-transfer-config", '{"backend": "shm"}'),
    "--trust-request-chat-template",
]
# Less than a checkpoint, so that a sync takes several chunks.
BUCKET_BYTES = 1 << 20
SCALE = "model.layers.0.mlp.experts.0.down_proj.weight_scale_inv"
REQUEST = {
    "model": "tiny",
    "prompt": [3, 1, 4, 1, 5],
    "max_tokens": 12,
    "temperature": 0,
    "ignore_eos": True,
    "return_token_ids": True,
}
LONG_REQUEST = {**REQUEST, "max_tokens": 200}
CHAT = {
    "messages": [{"role": "user", "content": "1 2 3"}],
    "chat_template": "{{ messages[0].content }}",
}
# Statistics follow an answer, on another way.
PATIENCE_SECONDS = 10

DASHBOARD = Path("examples/observability/dashboards/grafana/weight_sync.json")

Samples = dict[tuple[str, ...], float]


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[Server]:
    """One that serves A until a sync is whole."""
    folder = tmp_path_factory.mktemp("server")
    model = write_checkpoint(CASE, A, folder / "model", tokenizer=True)
    environment = {
        "VLLM_RELOAD_COMMIT": "model",
        "VLLM_RELOAD_CHECKSUMS": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
    }
    with starting(model, folder / "log", OPTIONS, environment) as server:
        server.wait()
        yield server


@pytest.fixture
def trainer(server) -> Iterator[Trainer]:
    with closing(Trainer(server.url, KEY, BUCKET_BYTES)) as trainer:
        yield trainer


def samples_of(server: Server) -> list[Sample]:
    text = requests.get(f"{server.url}/metrics", timeout=60).text
    families = text_string_to_metric_families(text)
    return [sample for family in families for sample in family.samples]


def series(server: Server) -> Samples:
    """Values by the name of the series, after vLLM's prefix, and its own label."""
    found = {}
    for sample in samples_of(server):
        labels = dict(sample.labels)
        name = sample.name.removeprefix("vllm:weight_sync_")
        if name != sample.name and not name.endswith("_created"):
            assert labels.pop("model_name") == "tiny"
            assert labels.pop("engine") == "0"
            found[(name, *labels.values())] = sample.value
    return found


def ended(server: Server, result: str, before: Samples) -> Samples:
    """How the series have changed once one more sync has ended with this."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < deadline:
        now = series(server)
        if now["results_total", result] > before["results_total", result]:
            changes = {key: now[key] - before[key] for key in now}
            return {key: change for key, change in changes.items() if change}
        time.sleep(0.05)
    raise TimeoutError(f"no sync that is {result}: {now}")


def test_all_series_are_there_from_the_start(server):
    samples = series(server)
    assert not any(samples.values())
    assert {name for name, *_ in samples} == {
        "results_total",
        "bytes_total",
        "missing_tensors_total",
        "invalid_tensors_total",
        "bad_scales_total",
        "phase_seconds_bucket",
        "phase_seconds_count",
        "phase_seconds_sum",
        "pause_seconds_bucket",
        "pause_seconds_count",
        "pause_seconds_sum",
        "version",
        "fenced",
    }


def test_a_complete_sync(server, trainer):
    before = series(server)
    began = time.monotonic()
    trainer.sync(CASE.tensors(B))
    took = time.monotonic() - began
    changes = ended(server, "complete", before)
    assert changes["results_total", "complete"] == 1
    assert changes["version",] == 1
    assert changes["bytes_total",] == sum(t.nbytes for _, t in CASE.tensors(B))
    phases = ("wait", "receive", "check", "commit")
    assert all(changes["phase_seconds_count", phase] == 1 for phase in phases)
    spent = [changes["phase_seconds_sum", phase] for phase in phases]
    assert min(spent) > 0
    assert changes["pause_seconds_count",] == 1
    assert 0 < changes["pause_seconds_sum",] < sum(spent) < took
    assert ("missing_tensors_total",) not in changes


def test_an_incomplete_sync(server, trainer):
    before = series(server)
    tensors = [item for item in CASE.tensors(A) if item[0] != SCALE]
    with pytest.raises(requests.HTTPError, match="never sent"):
        trainer.sync(tensors)
    changes = ended(server, "incomplete", before)
    bytes_sent = sum(tensor.nbytes for _, tensor in tensors)
    assert changes == {
        ("results_total", "incomplete"): 1,
        ("missing_tensors_total",): 1,
        ("bytes_total",): bytes_sent,
    }


def test_an_invalid_sync(server, trainer):
    before = series(server)
    tensors = dict(CASE.tensors(A))
    tensors[SCALE] = torch.full_like(tensors[SCALE], torch.nan)
    with pytest.raises(requests.HTTPError, match="scale is nan"):
        trainer.sync(tensors.items())
    changes = ended(server, "invalid", before)
    assert changes["results_total", "invalid"] == 1
    assert changes["invalid_tensors_total",] > 0
    assert not {("missing_tensors_total",), ("version",), ("fenced",)} & set(changes)


def test_an_aborted_sync(server, trainer):
    before = series(server)
    trainer.post("start_weight_update")
    trainer.post("abort_weight_update")
    assert ended(server, "aborted", before) == {("results_total", "aborted"): 1}


def queries(dashboard: dict) -> Iterator[str]:
    for variable in dashboard["templating"]["list"]:
        yield variable.get("definition", "")
    for panel in dashboard["panels"]:
        yield from (target["expr"] for target in panel["targets"])


def test_the_dashboard_shows_what_the_server_has(server, trainer):
    trainer.sync(CASE.tensors(A))
    labels = {sample.name: set(sample.labels) for sample in samples_of(server)}
    dashboard = json.loads((Path(__file__).parents[3] / DASHBOARD).read_text())
    shown = set()
    for query in queries(dashboard):
        names = re.findall(r"vllm:\w+", query)
        for grouped in re.findall(r"by \(([\w, ]+)\)", query):
            assert all(set(grouped.split(", ")) <= labels[name] for name in names)
        shown.update(names)
    assert shown <= set(labels)
    kinds = {re.sub("_(bucket|sum|count)$", "", name) for name in shown}
    own = {f"vllm:weight_sync_{name}" for name, *_ in series(server)}
    assert {re.sub("_(bucket|sum|count)$", "", name) for name in own} <= kinds


def ask(server: Server, body: dict = REQUEST) -> dict:
    """Return the choice of a completion."""
    return choice_of(server.post("v1/completions", body))


def spans_of(choice: dict) -> list[tuple[str, list[int]]]:
    """Names of weights, and the tokens that they produced."""
    spans = choice["weight_versions"]
    assert spans[0]["start"] == 0
    assert [s["start"] for s in spans[1:]] == [s["end"] for s in spans[:-1]]
    assert spans[-1]["end"] == len(choice["token_ids"])
    tokens = choice["token_ids"]
    return [(s["version"], tokens[s["start"] : s["end"]]) for s in spans]


def test_a_trainer_learns_of_the_pause(server, trainer):
    before = series(server)
    sync = trainer.sync(CASE.tensors(B))
    assert sync["result"] == "complete"
    assert sync["tensors"] == len(list(CASE.tensors(B)))
    changes = ended(server, "complete", before)
    assert changes["pause_seconds_sum",] == pytest.approx(sync["pause_seconds"])
    assert f"{sync['pause_seconds']:.3f} s pause" in server.log.read_text()
    assert 0 < sync["pause_seconds"] < sync["seconds"]


def weight_info(server: Server) -> dict:
    headers = {"Authorization": f"Bearer {KEY}"}
    return requests.get(f"{server.url}/weight_info", headers=headers, timeout=60).json()


def test_the_series_of_the_base_count_too(server, trainer):
    before = operations(server)
    trainer.sync(CASE.tensors(B))
    after = operations(server)
    assert after["start"] - before["start"] == after["finish"] - before["finish"] == 1
    assert after["update"] - before["update"] > 1


def operations(server: Server) -> dict[str, float]:
    """How often the base has seen each request of a weight update."""
    name = "vllm:rl_weight_update_operation_duration_seconds_count"
    counts = {"start": 0.0, "update": 0.0, "finish": 0.0}
    for sample in samples_of(server):
        if sample.name == name:
            counts[sample.labels["operation"]] = sample.value
    return counts


def test_weights_have_the_name_that_the_trainer_gives(server, trainer):
    sync = trainer.sync(CASE.tensors(B))
    ((name, _),) = spans_of(ask(server))
    assert name == str(sync["version"])
    assert weight_info(server) == {"weight_version": name}
    trainer.sync(CASE.tensors(B), "step-7")
    assert weight_info(server) == {"weight_version": "step-7"}
    ((name, tokens),) = spans_of(ask(server))
    assert (name, len(tokens)) == ("step-7", REQUEST["max_tokens"])
    response = server.post("v1/chat/completions", {**REQUEST, **CHAT})
    assert response.status_code == 200, response.text
    (choice,) = response.json()["choices"]
    assert [name for name, _ in spans_of(choice)] == ["step-7"]


def streamed(server: Server, route: str, body: dict) -> dict[int, dict]:
    """Return the choices of a stream, by index; only their ends may name weights."""
    choices: dict[int, dict] = {}
    with server.stream(route, body) as chunks:
        for choice in (choice for chunk in chunks for choice in chunk["choices"]):
            whole = choices.setdefault(choice["index"], {"token_ids": []})
            assert "weight_versions" not in whole
            whole["token_ids"] += choice.get("token_ids") or []
            ends = choice["finish_reason"] is not None
            assert ends == ("weight_versions" in choice)
            if ends:
                whole["weight_versions"] = choice["weight_versions"]
    return choices


def test_a_stream_names_weights_where_a_choice_ends(server, trainer):
    trainer.sync(CASE.tensors(B), "step-9")
    several = {"n": 2, "temperature": 1, "stream_options": {"include_usage": True}}
    prompts = {"prompt": [REQUEST["prompt"], [2, 7, 1]]}
    for route, body, count in (
        ("v1/completions", REQUEST, 1),
        ("v1/completions", {**REQUEST, **several, **prompts}, 4),
        ("v1/chat/completions", {**REQUEST, **CHAT}, 1),
        ("v1/chat/completions", {**REQUEST, **CHAT, **several}, 2),
    ):
        choices = streamed(server, route, body)
        assert choices.keys() == set(range(count))
        for choice in choices.values():
            ((name, tokens),) = spans_of(choice)
            assert (name, len(tokens)) == ("step-9", REQUEST["max_tokens"])


def test_a_stream_without_token_ids_names_nothing(server):
    for route, body in (("v1/completions", {}), ("v1/chat/completions", CHAT)):
        asked = {**REQUEST, **body, "return_token_ids": False}
        with server.stream(route, asked) as chunks:
            choices = [choice for chunk in chunks for choice in chunk["choices"]]
        assert choices
        assert not any("weight_versions" in choice for choice in choices)


def test_a_sync_that_fails_names_nothing(server, trainer):
    trainer.sync(CASE.tensors(B), "b")
    tensors = [item for item in CASE.tensors(A) if item[0] != SCALE]
    with pytest.raises(requests.HTTPError, match="never sent"):
        trainer.sync(tensors, "never")
    assert [name for name, _ in spans_of(ask(server))] == ["b"]
    assert trainer.sync(CASE.tensors(B))["version"] > 0
    assert [name for name, _ in spans_of(ask(server))] != ["never"]


def test_without_token_ids_nothing_is_added(server):
    assert "weight_versions" not in ask(server, {**REQUEST, "return_token_ids": False})


def test_old_weights_answer_until_the_commit_and_no_request_is_lost(server, trainer):
    fresh = {}
    for name, seed in (("b", B), ("a", A)):
        trainer.sync(CASE.tensors(seed), name)
        fresh[name] = ask(server)["token_ids"]
    assert fresh["a"] != fresh["b"]
    with ThreadPoolExecutor() as pool:
        stop = Event()
        asking = [pool.submit(ask_until, stop, server) for _ in range(3)]
        long = pool.submit(ask, server, LONG_REQUEST)
        during: list[list[tuple[str, list[int]]]] = []
        trainer.sync(watched(CASE.tensors(B), during, server), "b")
        ask(server)
        stop.set()
        answers = [answer for each in asking for answer in each.result()]
    assert all(answer == [("a", fresh["a"])] for answer in during)
    for answer in answers:
        if len(answer) == 1:
            ((name, tokens),) = answer
            assert tokens == fresh[name]
        else:
            (old, first), (new, _) = answer
            assert (old, new) == ("a", "b")
            assert first == fresh["a"][: len(first)]
    assert {name for answer in answers for name, _ in answer} == {"a", "b"}
    assert sum(len(tokens) for _, tokens in spans_of(long.result())) == 200


def ask_until(stop: Event, server: Server) -> list[list[tuple[str, list[int]]]]:
    answers = []
    while not stop.is_set():
        answers.append(spans_of(ask(server)))
    return answers


def watched(tensors: Iterable, answers: list, server: Server) -> Iterator:
    """Ask while the tensors are sent, after each hundred."""
    for count, item in enumerate(tensors):
        if count % 100 == 0:
            answers.append(spans_of(ask(server)))
        yield item


def begun(server: Server) -> float:
    """How many tokens of prompts have been answered to.

    They count with the first token of an answer; its last ones count after it was sent.
    """
    name = "vllm:prompt_tokens_total"
    return sum(s.value for s in samples_of(server) if s.name == name)


def test_a_paused_request_names_both(server, trainer):
    trainer.sync(CASE.tensors(A), "a")
    ((_, old),) = spans_of(ask(server, LONG_REQUEST))
    # With a cached prefix a CPU with AMX rounds otherwise.
    assert server.post("reset_prefix_cache", {}).status_code == 200
    before = begun(server)
    with ThreadPoolExecutor() as pool:
        answer = pool.submit(ask, server, LONG_REQUEST)
        while begun(server) == before:
            time.sleep(0.01)
        assert server.post("pause?mode=keep", {}).status_code == 200
        trainer.sync(CASE.tensors(B), "b")
        assert server.post("resume", {}).status_code == 200
        (a, first), (b, rest) = spans_of(answer.result())
    assert (a, b) == ("a", "b")
    assert first == old[: len(first)]
    assert len(first) + len(rest) == LONG_REQUEST["max_tokens"]


def test_a_paused_stream_names_both(server, trainer):
    trainer.sync(CASE.tensors(A), "a")
    with server.stream("v1/completions", LONG_REQUEST) as chunks:
        first = next(chunks)["choices"][0]["token_ids"]
        assert server.post("pause?mode=keep", {}).status_code == 200
        trainer.sync(CASE.tensors(B), "b")
        assert server.post("resume", {}).status_code == 200
        rest = [chunk["choices"][0] for chunk in chunks]
    tokens = [*first, *(token for choice in rest for token in choice["token_ids"])]
    versions = rest[-1]["weight_versions"]
    spans = spans_of({"token_ids": tokens, "weight_versions": versions})
    assert [name for name, _ in spans] == ["a", "b"]
    assert len(tokens) == LONG_REQUEST["max_tokens"]


def test_a_trainer_compares_what_serves_with_what_it_has(server, trainer):
    trainer.sync(CASE.tensors(B))
    assert differing(server.url, CASE.tensors(B), KEY) == []
    tensors = dict(CASE.tensors(B))
    tensors[SCALE] = tensors[SCALE] * 2
    assert differing(server.url, tensors.items(), KEY) == [SCALE]
    assert requests.get(f"{server.url}/weight_checksums", timeout=60).status_code == 401
