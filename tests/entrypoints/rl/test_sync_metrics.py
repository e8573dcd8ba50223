# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""What a running server tells of weight syncs: series, and what they count."""

import time
from collections.abc import Iterator
from contextlib import closing

import pytest
import requests
import torch
from prometheus_client.parser import text_string_to_metric_families

from examples.rl.shm_trainer import Trainer
from tests.checkpoints import CASES, write_checkpoint
from tests.harness.server import KEY, Server, starting

CASE = CASES["qwen3_moe-fp8_block"]
A, B = 1, 2
OPTIONS = [
    *("--enforce-eager", "--max-model-len", "256", "--max-num-seqs", "4"),
    *("--weight-transfer-config", '{"backend": "shm"}'),
]
# Less than a checkpoint, so that a sync takes several chunks.
BUCKET_BYTES = 1 << 20
SCALE = "model.layers.0.mlp.experts.0.down_proj.weight_scale_inv"
# Statistics follow an answer, on another way.
PATIENCE_SECONDS = 10

Samples = dict[tuple[str, ...], float]


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[Server]:
    """One that serves A until a sync is whole."""
    folder = tmp_path_factory.mktemp("server")
    model = write_checkpoint(CASE, A, folder / "model", tokenizer=True)
    environment = {"VLLM_RELOAD_COMMIT": "model", "VLLM_CPU_KVCACHE_SPACE": "1"}
    with starting(model, folder / "log", OPTIONS, environment) as server:
        server.wait()
        yield server


@pytest.fixture
def trainer(server) -> Iterator[Trainer]:
    with closing(Trainer(server.url, KEY, BUCKET_BYTES)) as trainer:
        yield trainer


def series(server: Server) -> Samples:
    """Values by the name of the series, after vLLM's prefix, and its own label."""
    text = requests.get(f"{server.url}/metrics", timeout=60).text
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
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
