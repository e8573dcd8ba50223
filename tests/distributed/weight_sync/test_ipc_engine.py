# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""vLLM's CUDA IPC backend into a model of this process, with host memory for a GPU's.

What a GPU has to show: `tests/entrypoints/rl/test_trainer_process.py`.
"""

import json
import os
from collections.abc import Iterator
from inspect import signature
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import pybase64 as base64
import pytest
import torch

from tests.checkpoints import CASES, write_checkpoint
from tests.harness import memory, stand_ins
from tests.harness.cuda_stand_in import shared_memory_of_a_gpu
from tests.harness.ipc_sender import json_of, send_by_ipc
from tests.harness.models import Built, build, single_rank
from tests.harness.snapshot import assert_same, snapshot
from tests.harness.transfer_engine import make_transfer_engine
from vllm.config import VllmConfig
from vllm.model_executor.model_loader.reload import (
    WeightSyncError,
    abort_layerwise_reload,
    finalize_layerwise_reload,
    initialize_layerwise_reload,
)

CASE = CASES["qwen3_moe-fp8_block"]
A, B, C = 1, 2, 3
# Less than a checkpoint, so that a sync takes several chunks; or no bucket at all.
PACKED_BYTES = pytest.mark.parametrize("packed_bytes", [0, 1 << 20])


@pytest.fixture(scope="module")
def rank() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # on a busy machine threads wait long for each other
    with single_rank():
        yield
    torch.set_num_threads(threads)


@pytest.fixture
def should_do_global_cleanup_after_test() -> bool:
    """Have upstream's conftest leave `rank` its groups from test to test."""
    return False


@pytest.fixture
def make_model(rank, tmp_path, monkeypatch):
    stand_ins.install(monkeypatch)
    dtype = torch.get_default_dtype()

    def make_model(seed: int) -> Built:
        folder = write_checkpoint(CASE, seed, tmp_path / str(seed))
        with memory.nan_memory():
            return build(CASE, folder)

    yield make_model
    torch.set_default_dtype(dtype)


def make_engine(model: torch.nn.Module, config: VllmConfig) -> Any:
    device = torch.device("cuda", 0)
    return make_transfer_engine("ipc", device, model, config)


class Worker:
    """The part of a worker that takes weights."""

    def __init__(self, built: Built):
        self._built, self._config = built, built.vllm_config
        self.engine = make_engine(built.model, built.vllm_config)

    def ask(self, route: str, body: dict[str, Any]) -> None:
        """Do what a route does."""
        with self._built.worker_context():
            getattr(self, f"_{route}")(**body)

    def _init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        engine = self.engine
        engine.init_transfer_engine(engine.parse_init_info(init_info))

    def _start_weight_update(self) -> None:
        if hasattr(self.engine, "start_weight_update"):
            self.engine.start_weight_update()
        else:  # before 0.32
            initialize_layerwise_reload(self._built.model)

    def _update_weights(self, update_info: dict[str, Any]) -> None:
        receive = self.engine.receive_weights
        known = {
            "update_info": self.engine.parse_update_info(update_info),
            "load_weights": self._built.model.load_weights,  # before 0.32
        }
        receive(**{name: known[name] for name in signature(receive).parameters})

    def _finish_weight_update(self) -> None:
        if hasattr(self.engine, "finish_weight_update"):
            self.engine.finish_weight_update()
        else:  # before 0.32
            finalize_layerwise_reload(self._built.model, self._config.model_config)


@PACKED_BYTES
def test_memory_may_be_written_over_once_a_chunk_is_answered(make_model, packed_bytes):
    cold = {seed: snapshot(make_model(seed).model) for seed in (B, C)}
    built = make_model(A)
    worker = Worker(built)
    with shared_memory_of_a_gpu() as gpu:

        def ask(route: str, body: dict[str, Any]) -> None:
            worker.ask(route, body)
            gpu.spoil()

        for seed in (B, C, B):
            send_by_ipc(dict(CASE.tensors(seed)), ask, packed_bytes)
            assert_same(snapshot(built.model), cold[seed])
    assert gpu.shared


@PACKED_BYTES
def test_handles_come_as_json(make_model, packed_bytes, monkeypatch):
    monkeypatch.setenv("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")
    built = make_model(A)
    worker = Worker(built)

    def ask(route: str, body: dict[str, Any]) -> None:
        worker.ask(route, json.loads(json.dumps(json_of(body))))

    with shared_memory_of_a_gpu():
        send_by_ipc(dict(CASE.tensors(B)), ask, packed_bytes)
    assert_same(snapshot(built.model), snapshot(make_model(B).model))


@PACKED_BYTES
def test_without_scales_it_is_refused(make_model, packed_bytes, monkeypatch):
    monkeypatch.setenv("VLLM_RELOAD_COMMIT", "model")
    built = make_model(A)
    before = snapshot(built.model)
    tensors = {n: t for n, t in CASE.tensors(B) if not n.endswith("_scale_inv")}
    with shared_memory_of_a_gpu(), pytest.raises(WeightSyncError, match="never sent"):
        send_by_ipc(tensors, Worker(built).ask, packed_bytes)
    abort_layerwise_reload(built.model, "the trainer gave up")
    assert_same(snapshot(built.model), before)


class Code:
    """What runs where it is unpickled: makes a folder."""

    def __init__(self, folder: Path):
        self._folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self._folder),)


def pickled(folder: Path) -> dict[str, Any]:
    """What HTTP carries in place of handles; here it is code instead."""
    handles = base64.b64encode(ForkingPickler.dumps([Code(folder)])).decode()
    lists = {"names": ["a"], "dtype_names": ["float32"], "shapes": [[1]]}
    return {**lists, "ipc_handles_pickled": handles}


def test_nothing_is_unpickled_unless_the_operator_allows_it(tmp_path, monkeypatch):
    monkeypatch.delenv("VLLM_ALLOW_INSECURE_SERIALIZATION", raising=False)
    engine = make_engine(torch.nn.Identity(), VllmConfig())
    with pytest.raises(ValueError, match="VLLM_ALLOW_INSECURE_SERIALIZATION=1"):
        engine.parse_update_info(pickled(tmp_path / "made"))
    assert not (tmp_path / "made").exists()


def test_whoever_may_send_pickled_handles_may_run_code(tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")
    engine = make_engine(torch.nn.Identity(), VllmConfig())
    engine.parse_update_info(pickled(tmp_path / "made"))
    assert (tmp_path / "made").exists()
