# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Load balancing and a weight sync that is open on one of two ranks.

The functions that take a rank run in the processes of the ranks.
"""

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from packaging.version import Version

import vllm
from tests.checkpoints import CASES, Case, Sizes, write_checkpoint
from tests.harness.models import Built, build
from tests.harness.ranks import start_ranks
from vllm.distributed.eplb import eplb_state
from vllm.distributed.eplb.eplb_state import EplbState
from vllm.distributed.eplb.sync_hold import (
    aborts_syncs,
    held_during_syncs,
    not_ready_during_syncs,
)
from vllm.model_executor.model_loader.reload import (
    abort_layerwise_reload,
    initialize_layerwise_reload,
    reload_status,
)
from vllm.model_executor.model_loader.reload.committer import CommitPolicy
from vllm.model_executor.model_loader.reload.model_reload import ModelReload
from vllm.model_executor.model_loader.reload.registry import get_layerwise_info
from vllm.model_executor.model_loader.reload.transaction import ReloadTransaction

FP8_BLOCK = CASES["qwen3_moe-fp8_block"]
CASE = Case(
    FP8_BLOCK.architecture,
    FP8_BLOCK.quantization,
    sizes=Sizes(head_dim=128, intermediate=256),
)


@dataclass(frozen=True)
class ModelState:
    """What `EplbModelState` has, as far as it matters here."""

    model: torch.nn.Module
    pending_result: object = "experts that arrived"


@dataclass(frozen=True)
class State:
    model_states: dict[str, ModelState]


@held_during_syncs
def rearrange(state, is_profile, rank_mapping):
    return "moved"


@not_ready_during_syncs
def ready(state, model_state):
    return model_state.pending_result is not None


@aborts_syncs
def drain(state):
    return "drained"


def build_model(folder: Path) -> Built:
    return build(CASE, folder, tensor_parallel_size=2, enable_expert_parallel=True)


def hold(rank: int, folder: Path) -> tuple:
    """What happens to experts before, during and after a sync of rank 0."""
    built = build_model(folder)
    state = State({"model": ModelState(built.model)})

    def outcomes() -> tuple:
        moved = rearrange(state), rearrange(state, rank_mapping={0: 0})
        return *moved, ready(state, state.model_states["model"])

    before = outcomes()
    with built.worker_context():
        if rank == 0:
            initialize_layerwise_reload(built.model)
        during = outcomes()
        abort_layerwise_reload(built.model, "the test is over")
    return before, during, outcomes()


def drain_ranks(rank: int, folder: Path) -> tuple:
    built = build_model(folder)
    with built.worker_context():
        initialize_layerwise_reload(built.model)
        drained = drain(State({"model": ModelState(built.model)}))
        return drained, reload_status(built.model).state


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    with start_ranks(2, tmp_path_factory.mktemp("ranks")) as ranks:
        yield ranks


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_checkpoint(CASE, 1, tmp_path_factory.mktemp("checkpoint"))


def test_experts_stay_while_a_sync_is_open_on_any_rank(ranks, folder):
    moves = "moved", "moved", True
    first, second = ranks.run(hold, folder)
    assert first == (moves, (None, "moved", False), moves)
    assert second == (moves, (None, "moved", True), moves)


def test_a_sync_ends_when_ranks_come_or_go(ranks, folder):
    assert ranks.run(drain_ranks, folder) == [("drained", "serving")] * 2


def test_experts_stay_until_a_sync_is_over_though_all_layers_are_committed():
    model = torch.nn.Linear(1, 1)
    state = State({"model": ModelState(model)})
    reload = get_layerwise_info(model).model = ModelReload()
    assert ready(state, state.model_states["model"])
    reload.transaction = ReloadTransaction(model, reload, CommitPolicy.LAYER)
    assert not ready(state, state.model_states["model"])


def test_the_base_is_wrapped():
    wrapped = ["rearrange", "_all_ranks_result_ready"]
    if Version(vllm.__version__) >= Version("0.32"):
        wrapped.append("drain_async")
    for name in wrapped:
        assert hasattr(getattr(EplbState, name), "__wrapped__"), name
    assert eplb_state.held_during_syncs is held_during_syncs
