# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""A rank of two needs memory, and reads from disk, for its own shard only.

The functions that take a rank run in the processes of the ranks.
"""

import gc
import weakref
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.checkpoints import CASES, chunks, write_checkpoint, write_shards
from tests.harness.memory import allocated
from tests.harness.models import Built, build
from tests.harness.ranks import Ranks, start_ranks
from tests.harness.snapshot import assert_same, snapshot
from tests.harness.stand_ins import no_packing
from vllm.model_executor.model_loader.reload import (
    abort_layerwise_reload,
    finalize_layerwise_reload,
    initialize_layerwise_reload,
)
from vllm.model_executor.model_loader.reload.checkpoint_files import CheckpointFile

CASE = CASES["qwen3_moe-fp8_block"]
# Layers so large that what has a fixed size does not count.
LARGE = replace(
    CASE,
    sizes=replace(
        CASE.sizes, experts=16, hidden=512, intermediate=512, heads=8, head_dim=128
    ),
)
EXPERTS_PER_RANK = LARGE.sizes.experts // 2
SHARED_OUT = ["tp", "ep"]
PLANS = ["0", "1"]

Tensors = list[tuple[str, torch.Tensor]]
Parts = dict[str, list[tuple[int, int]]]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> Iterator[Ranks]:
    with start_ranks(2, tmp_path_factory.mktemp("ranks")) as ranks:
        yield ranks


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[int, Path]:
    """A checkpoint in one file, and another one with its tensors dealt out to three."""
    return {
        1: write_checkpoint(LARGE, 1, tmp_path_factory.mktemp("checkpoint")),
        2: write_shards(LARGE, 2, tmp_path_factory.mktemp("shards"), 3),
    }


def load(shared_out: str, folder: Path) -> Built:
    expert_parallel = shared_out == "ep"
    arguments = dict(enable_expert_parallel=expert_parallel, tensor_parallel_size=2)
    return build(LARGE, folder, **arguments)


def layers(built: Built) -> list[int]:
    """Bytes of each layer's own parameters, as this rank has them."""
    return [
        sum(param.nbytes for param in layer.parameters(recurse=False))
        for layer in built.model.modules()
    ]


@contextmanager
def under_plan(plan: str) -> Iterator[None]:
    """Let loaded layers serve at once, by plan or without."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_RELOAD_COMMIT", "layer")
        patch.setenv("VLLM_RELOAD_PLAN", plan)
        gc.collect()
        gc.disable()
        yield
        gc.enable()


def send(built: Built, tensors: Tensors, bucket: torch.Tensor) -> None:
    model, vllm_config = built
    with built.worker_context():
        initialize_layerwise_reload(model)
        for chunk in chunks(tensors, len(bucket), bucket):
            model.load_weights(chunk)
        finalize_layerwise_reload(model, vllm_config.model_config)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("shared_out", SHARED_OUT)
def test_in_order_a_sync_needs_one_layer_of_the_shard(ranks, folders, shared_out, plan):
    for needed, layer in ranks.run(measure_sync, shared_out, plan, folders):
        assert layer < 0.6 * 3 * LARGE.sizes.experts * 512 * 512
        assert needed <= 1.1 * layer


@no_packing()
def measure_sync(rank, shared_out, plan, folders) -> tuple[int, int]:
    """The most bytes that a sync needs, first or later, and those of a layer."""
    built = load(shared_out, folders[1])
    tensors = list(LARGE.tensors(2))
    bucket = torch.empty(1 << 21, dtype=torch.uint8)
    peaks = []
    with under_plan(plan):
        for _ in range(2):
            with allocated() as count:
                send(built, tensors, bucket)
            peaks.append(count.peak)
    assert_same(snapshot(built.model), snapshot(load(shared_out, folders[2]).model))
    return max(peaks), max(layers(built))


@pytest.mark.parametrize("plan", PLANS)
def test_experts_of_the_other_rank_cost_nothing(ranks, folders, plan):
    for needed, layer in ranks.run(measure_others, plan, folders):
        assert needed <= 0.01 * layer


def measure_others(rank, plan, folders) -> tuple[int, int]:
    """The most bytes that sending the other rank's experts needs, and of a layer."""
    built = load("ep", folders[1])
    others = [(n, t) for n, t in LARGE.tensors(2) if rank_of(n) == 1 - rank]
    with under_plan(plan), built.worker_context():
        initialize_layerwise_reload(built.model)
        with allocated() as count:
            built.model.load_weights(others)
        abort_layerwise_reload(built.model, "enough was sent")
    return count.peak, max(layers(built))


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("shared_out", SHARED_OUT)
def test_no_tensor_outlives_the_call_that_brought_it(ranks, folders, shared_out, plan):
    total = len(list(LARGE.tensors(2)))
    kept = ranks.run(count_kept, shared_out, plan, folders)
    assert kept == [([], 2 * total)] * 2


def count_kept(rank, shared_out, plan, folders) -> tuple[list[str], int]:
    """The names whose memory outlived `load_weights`, and how many were sent."""
    built = load(shared_out, folders[1])
    tensors = list(LARGE.tensors(2))
    kept, sent = [], 0
    model, vllm_config = built
    with under_plan(plan):
        for container in list, iter:
            with built.worker_context():
                initialize_layerwise_reload(model)
                for start in range(0, len(tensors), 10):
                    chunk, memories = lend(tensors[start : start + 10])
                    model.load_weights(container(chunk))
                    del chunk
                    kept += [name for name, memory in memories if memory() is not None]
                    sent += len(memories)
                finalize_layerwise_reload(model, vllm_config.model_config)
    return kept, sent


def lend(tensors: Tensors) -> tuple[Tensors, list[tuple[str, weakref.ref]]]:
    """Copies in arrays, which live as long as anything refers to their memory."""
    arrays = [np.array(t.reshape(-1).view(torch.uint8).numpy()) for _, t in tensors]
    lent = [
        (name, torch.from_numpy(array).view(tensor.dtype).view(tensor.shape))
        for array, (name, tensor) in zip(arrays, tensors, strict=True)
    ]
    return lent, [(n, weakref.ref(a)) for a, (n, _) in zip(arrays, tensors)]


@pytest.mark.parametrize("shared_out", SHARED_OUT)
def test_a_rank_reads_its_own_slices(ranks, folders, shared_out):
    pytest.importorskip("vllm.model_executor.model_loader.reload.inplace")
    sizes = {name: tensor.nbytes for name, tensor in LARGE.tensors(2)}
    watched = ranks.run(read_from_disk, shared_out, folders)
    for rank, (parts, mapped) in enumerate(watched):
        others = 1 - rank if shared_out == "ep" else None
        assert mapped == {n for n in sizes if others is None or rank_of(n) != others}
        assert parts.keys() == mapped
        for name, read in parts.items():
            expected = own_bytes(shared_out, rank, name, sizes[name])
            assert read == [expected], (rank, name)


def read_from_disk(rank, shared_out, folders) -> tuple[Parts, set[str]]:
    """What a second sync reads by plan, and which tensors it looks at."""
    from vllm.model_executor.model_loader.reload.inplace import reload_weights

    built = load(shared_out, folders[1])
    model, vllm_config = built
    arguments = vllm_config, model, None, str(folders[2]), True
    with under_plan("1"), built.worker_context():
        reload_weights(*arguments)
        with watched_files() as watched:
            reload_weights(*arguments)
    assert_same(snapshot(model), snapshot(load(shared_out, folders[2]).model))
    return watched


@contextmanager
def watched_files() -> Iterator[tuple[Parts, set[str]]]:
    """Note which bytes of which tensors are read, and which tensors are looked at."""
    parts: Parts = defaultdict(list)
    mapped: set[str] = set()
    fault_in, map_tensor = CheckpointFile.fault_in, CheckpointFile.map

    def noting_read(file, start, stop):
        for stored in file.tensors:
            first, last = stored.start, stored.start + stored.nbytes
            if start < last and first < stop:
                part = max(start, first) - first, min(stop, last) - first
                parts[stored.name].append(part)
        fault_in(file, start, stop)

    def noting_map(file, stored):
        mapped.add(stored.name)
        return map_tensor(file, stored)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CheckpointFile, "fault_in", noting_read)
        patch.setattr(CheckpointFile, "map", noting_map)
        yield parts, mapped


def rank_of(name: str) -> int | None:
    """The rank that serves a tensor's expert, with experts shared out."""
    _, _, expert = name.partition(".experts.")
    return int(expert.split(".")[0]) // EXPERTS_PER_RANK if expert else None


def own_bytes(shared_out: str, rank: int, name: str, size: int) -> tuple[int, int]:
    """The bytes of a tensor that a rank has to read: first and last + 1.

    Ranks share the rows of a matrix, or its columns: of those all rows are read, from
    the first byte to the last.
    """
    module = name.split(".")[-2]
    is_own = shared_out == "ep" and rank_of(name) is not None
    if is_own or module in ("norm", "gate") or module.endswith("norm"):
        return 0, size
    if module in ("o_proj", "down_proj"):
        skipped = row_bytes(module, name) // 2
        return (0, size - skipped) if rank == 0 else (skipped, size)
    return (0, size // 2) if rank == 0 else (size // 2, size)


def row_bytes(module: str, name: str) -> int:
    sizes = LARGE.sizes
    columns = sizes.intermediate if module == "down_proj" else sizes.heads * 128
    return columns // 128 * 4 if name.endswith("scale_inv") else columns
