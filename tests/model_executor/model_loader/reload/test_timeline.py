# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""A picture of a real sync, from its report."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib import pyplot as plt

from benchmarks.sync import timeline
from tests.checkpoints import CASES, chunks
from tests.harness.sync import sync_parts
from vllm.model_executor.model_loader.reload import (
    WeightSyncError,
)
from vllm.model_executor.model_loader.reload.sync_report import SyncReport, read_report

CASE = CASES["qwen3_moe-fp8_block"]
SCALE = "model.layers.1.mlp.experts.3.up_proj.weight_scale_inv"


@pytest.fixture
def sync(make_model, monkeypatch, tmp_path):
    """Syncs tensors in chunks, and returns the report."""
    file = tmp_path / "sync.json"
    monkeypatch.setenv("VLLM_RELOAD_REPORT", str(file))
    built = make_model(CASE, seed=1)

    def run(tensors: dict[str, torch.Tensor]) -> SyncReport:
        bucket = torch.empty(1 << 20, dtype=torch.uint8)
        sync_parts(built, chunks(tensors.items(), 1 << 18, bucket))
        return read_report(file)

    def run_or_fail(tensors: dict[str, torch.Tensor]) -> SyncReport:
        try:
            return run(tensors)
        except WeightSyncError:
            return read_report(file)

    return run_or_fail


def draw(report: SyncReport, tmp_path: Path) -> np.ndarray:
    """The picture, [height, width, 3]."""
    timeline.draw(report, tmp_path / "timeline.png")
    return plt.imread(tmp_path / "timeline.png")[..., :3]


@pytest.mark.parametrize("policy", ["layer", "model"])
def test_spans_are_in_order(policy, sync, monkeypatch):
    monkeypatch.setenv("VLLM_RELOAD_COMMIT", policy)
    report = sync(dict(CASE.tensors(2)))
    for row in report.layers:
        ((start, end),) = row.received
        assert 0 <= start <= end
        assert end - start == pytest.approx(row.receiving_seconds)
        edges = [edge for span in row.checked + row.processed for edge in span]
        assert edges == sorted(edges)
        assert end <= edges[0] and edges[-1] <= row.committed_at <= report.seconds
        spent = sum(b - a for a, b in row.processed)
        assert spent == pytest.approx(row.committing_seconds)


def test_it_needs_no_colours(sync, tmp_path):
    picture = draw(sync(dict(CASE.tensors(2))), tmp_path)
    assert (picture == picture[..., :1]).all()
    shades = {round(float(shade), 2) for shade in np.unique(picture)}
    for style in timeline.STYLES.values():
        shade = style.get("color", "1")
        assert round(round(float(shade) * 255) / 255, 2) in shades


def test_a_sync_that_failed_has_one_too(sync, tmp_path):
    tensors = dict(CASE.tensors(2))
    tensors[SCALE] = torch.full_like(tensors[SCALE], math.nan)
    report = sync(tensors)
    assert report.result == "invalid"
    assert draw(report, tmp_path).min() < 0.2


def test_a_sync_that_brought_nothing_has_one_too(sync, tmp_path):
    report = sync({})
    assert not report.layers
    assert draw(report, tmp_path).size
