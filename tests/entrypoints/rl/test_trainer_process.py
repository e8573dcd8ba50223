# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""A trainer in a process of its own syncs an engine, again and again.

On a GPU through vLLM's CUDA IPC backend, unpacked and packed, with CUDA graphs; on a
CPU through shared memory. An engine for each checkpoint loads it cold and answers; the
first of them is synced from then on, and must answer as the others did.
"""

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.version import Version

import vllm
from tests.checkpoints import CASES, write_checkpoint
from tests.harness.snapshot import assert_same
from tests.harness.synced_engine import Answer, SyncedEngine, start_engine
from tests.harness.trainer_process import (
    Road,
    TrainerGoneError,
    TrainerProcess,
    start_trainer,
)

ON_GPU = torch.cuda.is_available()

pytestmark = pytest.mark.skipif(
    not ON_GPU and Version(vllm.__version__) < Version("0.32"),
    reason="this base starts no engine on a CPU",
)

CASE = CASES["qwen3_moe-fp8_block"]
A, B = 1, 2
SEEDS = (A, B, 3) if ON_GPU else (A, B)
ROADS = (Road.IPC, Road.IPC_PACKED) if ON_GPU else (Road.SHM,)
GRAPHS = ("full", "piecewise") if ON_GPU else ("eager",)
SYNCS = 20 if ON_GPU else 4


@dataclass(frozen=True)
class Cold:
    """What a checkpoint is after a cold load."""

    answers: tuple[Answer, ...]
    weights: dict[str, torch.Tensor]


@dataclass(frozen=True)
class Synced:
    """The engine that is synced, where its tensors were at first, and cold loads."""

    engine: SyncedEngine
    addresses: dict[str, int]
    cold: dict[int, Cold]
    folder: Path

    def assert_serves(self, seed: int) -> None:
        """Check that this is a cold load of a checkpoint, in the place of the first."""
        expected = self.cold[seed]
        assert self.engine.answers() == expected.answers
        assert_same(self.engine.weights(self.folder), expected.weights)
        assert self.engine.addresses() == self.addresses


@pytest.fixture(scope="module", params=GRAPHS)
def synced(request, tmp_path_factory) -> Iterator[Synced]:
    folder = tmp_path_factory.mktemp("engines")
    backend = ROADS[0].backend
    with ExitStack() as first, ExitStack() as others:
        engines = {}
        for seed in SEEDS:
            model = write_checkpoint(CASE, seed, folder / str(seed), tokenizer=True)
            stack = first if seed == A else others
            engine = start_engine(model, backend, request.param)
            engines[seed] = stack.enter_context(engine)
        cold = {s: Cold(e.answers(), e.weights(folder)) for s, e in engines.items()}
        others.close()
        yield Synced(engines[A], engines[A].addresses(), cold, folder)


@pytest.fixture(scope="module", params=ROADS, ids=lambda road: road.value)
def trainer(request) -> Iterator[TrainerProcess]:
    with start_trainer(request.param, CASE) as trainer:
        yield trainer


def test_checkpoints_differ_and_graphs_are_captured(synced):
    answers = {cold.answers for cold in synced.cold.values()}
    assert len(answers) == len(SEEDS)
    assert (synced.engine.captured_graphs() > 0) == ON_GPU


def test_each_sync_serves_what_a_cold_load_serves(synced, trainer):
    for seed in islice(cycle(reversed(SEEDS)), SYNCS):
        trainer.sync(seed, synced.engine.post)
        synced.assert_serves(seed)


@pytest.mark.parametrize("level", [1, 2])
def test_a_sync_waits_until_the_weights_are_awake(synced, trainer, level):
    engine = synced.engine
    trainer.sync(A, engine.post)
    engine.sleep(level)
    with pytest.raises(RuntimeError, match="the weights are asleep"):
        trainer.sync(B, engine.post)
    engine.wake_up("weights")
    trainer.sync(B, engine.post)
    engine.wake_up("kv_cache")
    synced.assert_serves(B)


def test_after_a_level_1_sleep_the_weights_are_back(synced, trainer):
    trainer.sync(B, synced.engine.post)
    synced.engine.sleep(1)
    synced.engine.wake_up()
    synced.assert_serves(B)


def test_after_a_level_2_sleep_nothing_is_served_before_a_sync(synced, trainer):
    trainer.sync(B, synced.engine.post)
    synced.engine.sleep(2)
    synced.engine.wake_up()
    if ON_GPU:
        with pytest.raises(RuntimeError, match="a level 2 sleep dropped the weights"):
            synced.engine.answers()
    else:  # whose weights a sleep leaves where they are
        synced.assert_serves(B)
    trainer.sync(A, synced.engine.post)
    synced.assert_serves(A)


def test_an_engine_does_not_sleep_while_a_sync_is_open(synced, trainer):
    def post(route: str, body: dict[str, Any]) -> None:
        if route in ("update_weights", "finish_weight_update"):
            with pytest.raises(RuntimeError, match="a weight update is open"):
                synced.engine.sleep(2)
        synced.engine.post(route, body)

    trainer.sync(B, post)
    synced.assert_serves(B)


def test_a_trainer_that_is_killed_leaves_no_mixture(synced, trainer, request):
    trainer.sync(A, synced.engine.post)
    road = request.node.callspec.params["trainer"]
    with start_trainer(road, CASE) as killed:

        def post(route: str, body: dict[str, Any]) -> None:
            if route == "finish_weight_update":
                killed.kill()
            else:
                synced.engine.post(route, body)

        with pytest.raises(TrainerGoneError):
            killed.sync(B, post)
    synced.engine.post("abort_weight_update", {})
    with pytest.raises(RuntimeError, match="layers are committed"):
        synced.engine.answers()
    trainer.sync(B, synced.engine.post)
    synced.assert_serves(B)
