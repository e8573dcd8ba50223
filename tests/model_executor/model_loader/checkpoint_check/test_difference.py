# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""What a sync from one checkpoint to another would send."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.checkpoints import CASES, write_checkpoint
from tests.harness.damage import found, passed_on
from vllm.model_executor.model_loader.checkpoint_check import (
    check_sync,
    open_checkpoint,
)

CASE = "qwen3_moe-fp8_block"
WEIGHT = "model.layers.1.mlp.experts.3.gate_proj.weight"
SCALE = f"{WEIGHT}_scale_inv"
FILE = "model.safetensors"


@pytest.fixture
def sync(tmp_path):
    """Report a sync to the same checkpoint, its tensors changed in place as told."""

    def report(change):
        before = write_checkpoint(CASES[CASE], 1, tmp_path / "before")
        after = write_checkpoint(CASES[CASE], 1, tmp_path / "after")
        tensors = load_file(after / FILE)
        change(tensors)
        save_file(tensors, after / FILE)
        old, new = (open_checkpoint(str(folder)) for folder in (before, after))
        return check_sync(old, new, passed_on)

    return report


def test_nothing_changed(sync):
    report = sync(lambda tensors: None)
    assert (len(report.unchanged), found(report)) == (125, [])


@pytest.mark.parametrize("index", [(0, 0), (127, 255)])
def test_one_bit_changed(index, sync):
    def change(tensors):
        tensors[WEIGHT].view(torch.uint8)[index] ^= 1

    report = sync(change)
    assert (len(report.unchanged), found(report)) == (124, [])
    assert WEIGHT not in report.unchanged


def test_nan_is_unchanged_if_its_bits_are(tmp_path):
    folder = write_checkpoint(CASES[CASE], 1, tmp_path)
    tensors = load_file(folder / FILE)
    tensors[SCALE].fill_(torch.nan)
    save_file(tensors, folder / FILE)
    opened = open_checkpoint(str(folder))
    assert SCALE in check_sync(opened, opened, passed_on).unchanged


def test_not_sent(sync):
    report = sync(lambda tensors: tensors.pop(SCALE))
    assert found(report) == [f"{SCALE}: not sent; was F32 [1, 2] in {FILE}"]
    assert len(report.missing) == 1


def test_not_there_before(sync):
    (line,) = found(sync(lambda tensors: tensors.update(more=torch.ones(3))))
    assert line.startswith("more: sent, but not in /") and "F32 [3]" in line


@pytest.mark.parametrize(
    "change, got",
    [
        (lambda weight: weight.T.contiguous(), "F8_E4M3 [256, 128]"),
        (lambda weight: weight.bfloat16(), "BF16 [128, 256]"),
    ],
)
def test_refused(change, got, sync):
    report = sync(lambda tensors: tensors.update({WEIGHT: change(tensors[WEIGHT])}))
    assert found(report) == [
        f"{WEIGHT}: expected F8_E4M3 [128, 256] in {FILE}, got {got} in {FILE}"
    ]
    assert WEIGHT not in report.unchanged


def test_a_cast_that_a_sync_takes(sync):
    report = sync(lambda tensors: tensors.update({SCALE: tensors[SCALE].bfloat16()}))
    assert (found(report), SCALE in report.unchanged) == ([], False)
