# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The weight sync on two ranks, with real gloo processes: each ends with its shard.

The functions that take a rank run in the processes of the ranks.
"""

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from packaging.version import Version

import vllm
from tests.checkpoints import CASES, Case, Sizes, chunks, write_checkpoint
from tests.harness.memory import nan_memory
from tests.harness.models import Built, build
from tests.harness.ranks import Ranks, start_ranks
from tests.harness.snapshot import Snapshot, assert_same, snapshot
from tests.harness.sync import sync_parts
from vllm.model_executor.model_loader.reload import (
    ReloadStatus,
    WeightSyncError,
    reload_status,
)
from vllm.model_executor.model_loader.reload.agreement import RankFailedError

FP8_BLOCK = CASES["qwen3_moe-fp8_block"]
EXPERTS_PER_RANK = FP8_BLOCK.sizes.experts // 2
LAST_EXPERT = f"model.layers.1.mlp.experts.{FP8_BLOCK.sizes.experts - 1}"
LOST_SCALE = f"{LAST_EXPERT}.down_proj.weight_scale_inv"


class Layout(NamedTuple):
    """What two ranks serve, and how they share it.

    Attributes:
        case: The checkpoint.
        scales: Shape of a rank's gate and up scales,
            [experts, 2 * blocks of the expert's width, blocks of the hidden width].
        expert_parallel: Whether whole experts are shared out, or shards of each.
    """

    case: Case
    scales: tuple[int, int, int]
    expert_parallel: bool = False


def fp8_block(intermediate: int) -> Case:
    """A case whose every projection has whole scale blocks on each of two ranks."""
    sizes = Sizes(head_dim=128, intermediate=intermediate)
    return Case(FP8_BLOCK.architecture, FP8_BLOCK.quantization, sizes=sizes)


LAYOUTS = {
    "tp": Layout(fp8_block(intermediate=256), scales=(8, 2, 2)),
    # 192 columns a rank are one and a half blocks: vLLM refines to blocks of 64.
    "tp-refined_scales": Layout(fp8_block(intermediate=384), scales=(8, 6, 4)),
    "ep": Layout(fp8_block(intermediate=256), (4, 4, 2), expert_parallel=True),
}
EP = "ep"
refined_scales = pytest.mark.skipif(
    Version(vllm.__version__) < Version("0.32"),
    reason="releases before 0.32 refuse shards that are no whole scale blocks",
)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> Iterator[Ranks]:
    with start_ranks(2, tmp_path_factory.mktemp("ranks")) as ranks:
        yield ranks


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[tuple[str, int], Path]:
    """The checkpoints of each layout, by seed."""
    return {
        (name, seed): write_checkpoint(layout.case, seed, tmp_path_factory.mktemp(name))
        for name, layout in LAYOUTS.items()
        for seed in (1, 2)
    }


@pytest.fixture(
    params=["tp", pytest.param("tp-refined_scales", marks=refined_scales), "ep"]
)
def layout(request) -> str:
    return request.param


@pytest.fixture(params=["layer", "model"])
def policy(request) -> str:
    return request.param


def load(name: str, folder: Path) -> Built:
    layout = LAYOUTS[name]
    with nan_memory():
        return build(
            layout.case,
            folder,
            tensor_parallel_size=2,
            enable_expert_parallel=layout.expert_parallel,
        )


@functools.cache
def cold_load(name: str, folder: Path) -> Snapshot:
    return snapshot(load(name, folder).model)


def sync(built: Built, policy: str, tensors: dict[str, torch.Tensor]) -> None:
    """Send the tensors in chunks through one bucket that is poisoned after each."""
    bucket = torch.empty(1 << 20, dtype=torch.uint8)
    with pytest.MonkeyPatch.context() as patch, nan_memory():
        patch.setenv("VLLM_RELOAD_COMMIT", policy)
        sync_parts(built, chunks(tensors.items(), 1 << 17, bucket))


def is_owned(tensor: str, rank: int) -> bool:
    """Whether a tensor is no expert's, or one of an expert that this rank serves."""
    _, _, expert = tensor.partition(".experts.")
    return not expert or int(expert.split(".")[0]) // EXPERTS_PER_RANK == rank


def test_synced_ranks_equal_cold_loads(ranks, folders, policy, layout):
    scales = ranks.run(sync_all, layout, policy, folders)
    assert scales == [LAYOUTS[layout].scales] * 2


def sync_all(rank, name, policy, folders) -> tuple[int, ...]:
    """Sync everything; return the shape of the scales that this rank serves."""
    built = load(name, folders[name, 1])
    sync(built, policy, dict(LAYOUTS[name].case.tensors(2)))
    assert reload_status(built.model).version == 1
    expected = cold_load(name, folders[name, 2])
    assert_same(snapshot(built.model), expected)
    paths = [path for path in expected if path.endswith("w13_weight_scale_inv")]
    return tuple(expected[paths[0]].shape)


def test_each_rank_may_be_sent_its_own_experts_only(ranks, folders, policy):
    sent = ranks.run(sync_owned, policy, folders)
    assert set.union(*sent) == {name for name, _ in LAYOUTS[EP].case.tensors(2)}
    assert not any(".experts." in name for name in set.intersection(*sent))


def sync_owned(rank, policy, folders) -> set[str]:
    built = load(EP, folders[EP, 1])
    tensors = {n: t for n, t in LAYOUTS[EP].case.tensors(2) if is_owned(n, rank)}
    sync(built, policy, tensors)
    assert_same(snapshot(built.model), cold_load(EP, folders[EP, 2]))
    return set(tensors)


def test_a_scale_that_one_rank_misses_stops_both(ranks, folders, policy):
    first, last = ranks.run(sync_without_scale_then_all, policy, folders)
    missing = "model.layers.1.mlp.experts"
    assert first.startswith("RankFailedError: rank 1 of 2 failed: WeightSyncError")
    assert missing in first
    assert last.startswith("WeightSyncError: weight sync is incomplete")
    assert missing in last and f"expert {EXPERTS_PER_RANK - 1} down" in last


def sync_without_scale_then_all(rank, policy, folders) -> str:
    """Lose a scale of an expert of rank 1, then heal; return the error of the loss."""
    built = load(EP, folders[EP, 1])
    before = snapshot(built.model)
    tensors = dict(LAYOUTS[EP].case.tensors(2))
    short = {name: t for name, t in tensors.items() if name != LOST_SCALE}
    with pytest.raises((WeightSyncError, RankFailedError)) as refused:
        sync(built, policy, short)
    if policy == "model":
        assert reload_status(built.model).state == "serving"
        assert_same(snapshot(built.model), before)
    else:
        assert reload_status(built.model).fenced
    sync(built, policy, tensors)
    assert reload_status(built.model).state == "serving"
    assert_same(snapshot(built.model), cold_load(EP, folders[EP, 2]))
    return f"{refused.typename}: {refused.value}"


def test_both_ranks_roll_back_when_one_fails(ranks, folders):
    first, last = ranks.run(roll_back_then_sync, folders)
    assert first.startswith("RankFailedError: rank 1 of 2 failed: WeightSyncError")
    assert last.startswith("WeightSyncError: weight sync is incomplete")


def roll_back_then_sync(rank, folders) -> str:
    """Lose a scale of an expert of rank 1, then heal; return the error of the loss."""
    built = load(EP, folders[EP, 1])
    before, new = snapshot(built.model), dict(LAYOUTS[EP].case.tensors(2))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_RELOAD_ROLLBACK", "host")
        with pytest.raises((WeightSyncError, RankFailedError)) as refused:
            sync(built, "layer", {n: t for n, t in new.items() if n != LOST_SCALE})
        assert reload_status(built.model) == ReloadStatus("serving", 0)
        assert_same(snapshot(built.model), before)
        sync(built, "layer", new)
    assert reload_status(built.model) == ReloadStatus("serving", 1)
    assert_same(snapshot(built.model), cold_load(EP, folders[EP, 2]))
    return f"{refused.typename}: {refused.value}"
