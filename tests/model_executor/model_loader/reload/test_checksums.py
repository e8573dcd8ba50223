# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Checksums of what a sync was sent, against those that a trainer computes."""

import math

import pytest
import torch

from examples.rl.weight_checksums import checksum as checksum_of_trainer
from tests.checkpoints import write_checkpoint
from tests.harness.ranks import start_ranks
from tests.harness.sync import sync_parts
from tests.model_executor.model_loader.reload.test_parallel import (
    FP8_BLOCK,
    LAYOUTS,
    load,
    sync,
)
from vllm.model_executor.model_loader.reload import (
    WeightSyncError,
    abort_layerwise_reload,
    finalize_layerwise_reload,
    initialize_layerwise_reload,
    mark_inconsistent,
)
from vllm.model_executor.model_loader.reload.checksums import (
    CPU_ROWS,
    WORDS,
    SentChecksums,
)
from vllm.model_executor.model_loader.reload.layerwise import sent_checksums

ROW_BYTES = 8 * WORDS
SCALE = "model.layers.1.mlp.experts.3.up_proj.weight_scale_inv"


def checksum(tensor: torch.Tensor) -> str:
    sums = SentChecksums()
    sums.watch([("a", tensor)])
    return sums.as_text()["a"]


def random_bytes(count: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(count)
    return torch.randint(256, (count,), dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize("rows", [0, 1, CPU_ROWS, CPU_ROWS + 1])
@pytest.mark.parametrize("more", [-9, -8, -1, 0, 1, 8])
def test_of_any_size_a_trainer_computes_the_same(rows, more):
    data = random_bytes(max(0, rows * ROW_BYTES + more))
    assert checksum(data) == checksum_of_trainer(data)


@pytest.mark.parametrize(
    "tensor",
    [
        torch.tensor(1.5),
        torch.ones(3, 5, dtype=torch.bfloat16),
        torch.randn(64, 48).t(),
        torch.randn(4, 6).to(torch.float8_e4m3fn)[1:, 1:5],
        random_bytes(100)[3:83],
        torch.tensor([True, False, True]),
        torch.nn.Parameter(torch.randn(7)),
    ],
    ids=["scalar", "bf16", "transposed", "part", "unaligned", "bool", "parameter"],
)
def test_of_any_kind_a_trainer_computes_the_same(tensor):
    assert checksum(tensor) == checksum_of_trainer(tensor)
    assert checksum(tensor) == checksum(tensor.detach().clone())


def test_each_bit_counts():
    data = random_bytes(200)
    before = checksum(data)
    for place in range(len(data)):
        for bit in range(8):
            data[place] ^= 1 << bit
            assert checksum(data) != before
            data[place] ^= 1 << bit
    assert checksum(data) == before


def test_order_counts():
    words = random_bytes(3 * ROW_BYTES).view(torch.int64).view(3, WORDS)
    for a, b in (((0, 0), (0, 1)), ((0, 0), (1, 0)), ((0, 1), (1, 0))):
        swapped = words.clone()
        swapped[a], swapped[b] = words[b], words[a]
        assert checksum(swapped) != checksum(words)


class Trainer:
    """Syncs that take checksums into a model that serves seed 1."""

    def __init__(self, built):
        self.built = built

    def __call__(self, weights) -> dict[str, str]:
        sync_parts(self.built, [weights])
        return sent_checksums(self.built.model)


@pytest.fixture
def trainer(make_model, monkeypatch) -> Trainer:
    monkeypatch.setenv("VLLM_RELOAD_CHECKSUMS", "1")
    monkeypatch.setenv("VLLM_RELOAD_COMMIT", "model")
    return Trainer(make_model(FP8_BLOCK, seed=1))


def sums_of(tensors) -> dict[str, str]:
    return {name: checksum_of_trainer(tensor) for name, tensor in tensors}


@pytest.mark.parametrize("form", [list, iter])
@pytest.mark.parametrize("plan", ["0", "1"])
def test_of_all_that_was_sent(form, plan, trainer, monkeypatch):
    monkeypatch.setenv("VLLM_RELOAD_PLAN", plan)
    assert trainer(form(list(FP8_BLOCK.tensors(2)))) == sums_of(FP8_BLOCK.tensors(2))
    assert trainer(form(list(FP8_BLOCK.tensors(3)))) == sums_of(FP8_BLOCK.tensors(3))


def test_what_a_sync_leaves_out_keeps_its_own(trainer):
    old, new = dict(FP8_BLOCK.tensors(2)), dict(FP8_BLOCK.tensors(3))
    trainer(old.items())
    norm = "model.norm.weight"
    found = trainer([(norm, new[norm])])
    assert found == sums_of({**old, norm: new[norm]}.items())


def test_a_sync_that_fails_changes_none(trainer):
    before = dict(trainer(FP8_BLOCK.tensors(2)))
    bad = dict(FP8_BLOCK.tensors(3))
    bad[SCALE] = torch.full_like(bad[SCALE], math.nan)
    with pytest.raises(WeightSyncError):
        trainer(bad.items())
    assert sent_checksums(trainer.built.model) == before


def test_what_came_unwatched_leaves_no_old_ones(trainer):
    trainer(FP8_BLOCK.tensors(2))
    model, vllm_config = trainer.built
    with trainer.built.worker_context():
        initialize_layerwise_reload(model, exposed=True)
        param = dict(model.named_parameters())["model.norm.weight"]
        param.weight_loader(param, dict(FP8_BLOCK.tensors(3))["model.norm.weight"])
        finalize_layerwise_reload(model, vllm_config.model_config)
    assert sent_checksums(model) == {}


def test_weights_that_are_lost_have_none(trainer):
    trainer(FP8_BLOCK.tensors(2))
    mark_inconsistent(trainer.built.model, "asleep")
    with pytest.raises(WeightSyncError, match="asleep"):
        sent_checksums(trainer.built.model)


def test_unless_asked_for_there_are_none(trainer, monkeypatch):
    monkeypatch.delenv("VLLM_RELOAD_CHECKSUMS")
    model = trainer.built.model
    monkeypatch.setattr(SentChecksums, "watch", None)
    with pytest.raises(ValueError, match="set VLLM_RELOAD_CHECKSUMS=1"):
        trainer(FP8_BLOCK.tensors(2))
    initialize_layerwise_reload(model)
    abort_layerwise_reload(model, "enough")


@pytest.mark.parametrize("layout", ["tp", "ep"])
def test_each_rank_has_those_of_whole_tensors(layout, tmp_path):
    case = LAYOUTS[layout].case
    folder = write_checkpoint(case, 1, tmp_path / "checkpoint")
    with start_ranks(2, tmp_path) as ranks:
        found = ranks.run(sync_and_sum, layout, folder)
    assert found == [sums_of(case.tensors(2))] * 2


def sync_and_sum(rank, layout, folder) -> dict[str, str]:
    built = load(layout, folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_RELOAD_CHECKSUMS", "1")
        sync(built, "layer", dict(LAYOUTS[layout].case.tensors(2)))
        return sent_checksums(built.model)
