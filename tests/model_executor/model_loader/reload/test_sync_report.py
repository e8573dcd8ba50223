# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""What is told about a sync once it has ended, well or not."""

import json
import logging
import math
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.checkpoints import CASES, chunks
from tests.harness.memory import allocated
from tests.harness.models import Built
from tests.harness.ranks import start_ranks
from tests.harness.sync import Weights, sync_parts
from vllm.model_executor.model_loader.reload import (
    WeightSyncError,
    abort_layerwise_reload,
    finalize_layerwise_reload,
    initialize_layerwise_reload,
    model_reload,
    transaction,
)
from vllm.model_executor.model_loader.reload import sync_report as module
from vllm.model_executor.model_loader.reload.layerwise import take_reports
from vllm.model_executor.model_loader.reload.sync_report import (
    SyncReport,
    publish,
    read_report,
)

CASE = CASES["qwen3_moe-fp8_block"]
EXPERTS = "model.layers.1.mlp.experts"
SCALE = f"{EXPERTS}.3.up_proj.weight_scale_inv"

EXAMPLE = SyncReport(
    model="Model",
    rank=0,
    result="complete",
    reason="",
    state="serving",
    version=7,
    commit="layer",
    planned=90,
    through_loaders=10,
    bytes=3_000_000,
    seconds=0.5,
    waiting_seconds=0.25,
    checking_seconds=0.05,
    committing_seconds=0.1,
    pause_seconds=0.125,
    peak_staged_bytes=1_500_000,
)


class Trainer:
    """A model that serves seed 1, and syncs of seed 2 into it that write reports."""

    def __init__(self, built: Built, file: Path):
        self.built = built
        self.file = file
        self.tensors = dict(CASE.tensors(2))
        self.bytes = sum(tensor.nbytes for tensor in self.tensors.values())

    def __call__(self, *parts: Weights) -> SyncReport:
        """Sync these, or else all; return the report."""
        return self.parts(parts or (self.tensors.items(),))

    def parts(self, parts: Iterable[Weights]) -> SyncReport:
        """Sync, and return the report."""
        sync_parts(self.built, parts)
        return read_report(self.file)

    def fails(self, *parts: Weights) -> SyncReport:
        """Sync what is refused, and return the report."""
        with pytest.raises(Exception):  # noqa: B017  whatever the trainer did
            self(*parts)
        return read_report(self.file)


@pytest.fixture
def sync(make_model, monkeypatch, tmp_path) -> Trainer:
    file = tmp_path / "sync.json"
    monkeypatch.setenv("VLLM_RELOAD_REPORT", str(file))
    return Trainer(make_model(CASE, seed=1), file)


@pytest.fixture
def log(monkeypatch) -> list[tuple[int, str]]:
    """Levels and texts of what the sync logs."""
    lines: list[tuple[int, str]] = []

    class Handler(logging.Handler):
        def emit(self, record):
            lines.append((record.levelno, record.getMessage()))

    for logger in (transaction.logger, module.logger):
        monkeypatch.setattr(logger, "handlers", [*logger.handlers, Handler()])
        monkeypatch.setattr(logger, "level", logging.INFO)
    return lines


@pytest.mark.parametrize("form", [list, iter])
@pytest.mark.parametrize("plan", ["0", "1"])
@pytest.mark.parametrize("policy", ["layer", "model"])
def test_all_that_was_sent_is_in_it(policy, plan, form, sync, monkeypatch):
    monkeypatch.setenv("VLLM_RELOAD_COMMIT", policy)
    monkeypatch.setenv("VLLM_RELOAD_PLAN", plan)
    report = sync(form(sync.tensors.items()))
    assert (report.result, report.reason) == ("complete", "")
    assert (report.state, report.version, report.commit) == ("serving", 1, policy)
    assert report.tensors == len(sync.tensors)
    assert report.bytes == sync.bytes
    assert report.planned == sum(layer.planned for layer in report.layers)
    loaded = sum(layer.through_loaders for layer in report.layers)
    assert report.through_loaders == loaded
    assert report.bytes == sum(layer.bytes for layer in report.layers)
    assert (report.planned > report.through_loaders) == (plan == "1")


@pytest.mark.parametrize("plan", ["0", "1"])
def test_a_row_is_about_its_layer(plan, sync, monkeypatch):
    monkeypatch.setenv("VLLM_RELOAD_PLAN", plan)
    report = sync()
    (experts,) = (row for row in report.layers if row.name.startswith(EXPERTS))
    own = [t for name, t in sync.tensors.items() if name.startswith(EXPERTS)]
    assert experts.planned + experts.through_loaders == len(own)
    assert experts.bytes == sum(tensor.nbytes for tensor in own)
    names = [name for name, _ in sync.built.model.named_modules()]
    order = [names.index(layer.name) for layer in report.layers]
    assert order == sorted(order)


@pytest.mark.parametrize("policy", ["layer", "model"])
def test_times_fit_together(policy, sync, monkeypatch):
    monkeypatch.setenv("VLLM_RELOAD_COMMIT", policy)
    bucket = torch.empty(1 << 20, dtype=torch.uint8)
    report = sync.parts(chunks(sync.tensors.items(), 1 << 18, bucket))
    spent = [
        (row.receiving_seconds, row.checking_seconds, row.committing_seconds)
        for row in report.layers
    ]
    worked = sum(check + commit for _, check, commit in spent)
    assert all(check > 0 and commit > 0 for _, check, commit in spent)
    assert 0 < report.waiting_seconds < report.seconds - worked
    assert all(0 <= receive < report.seconds for receive, _, _ in spent)
    assert 0 < report.pause_seconds < report.seconds
    assert report.committing_seconds == pytest.approx(sum(c for _, _, c in spent))
    assert sum(report.phase_seconds.values()) == pytest.approx(report.seconds)
    assert min(report.phase_seconds.values()) > 0
    for row, (receive, _, commit) in zip(report.layers, spent, strict=True):
        assert receive + commit < row.committed_at <= report.seconds


def test_what_is_staged_at_most(sync, monkeypatch):
    sync()
    peaks = {}
    for policy in ("layer", "model"):
        monkeypatch.setenv("VLLM_RELOAD_COMMIT", policy)
        with allocated() as count:
            peaks[policy] = sync().peak_staged_bytes
        assert peaks[policy] <= count.peak
    assert peaks["model"] == sync.bytes
    assert peaks["layer"] < sync.bytes / 1.5


def test_what_comes_twice_counts_twice(sync, monkeypatch):
    monkeypatch.setenv("VLLM_RELOAD_COMMIT", "model")
    twice = sync(sync.tensors.items(), sync.tensors.items())
    assert twice.tensors == 2 * len(sync.tensors)
    assert twice.bytes == 2 * sync.bytes


def test_what_callers_of_loaders_bring_counts(sync):
    model, vllm_config = sync.built
    name = "model.norm.weight"
    with sync.built.worker_context():
        initialize_layerwise_reload(model, exposed=True)
        param = dict(model.named_parameters())[name]
        param.weight_loader(param, sync.tensors[name])
        finalize_layerwise_reload(model, vllm_config.model_config)
    report = read_report(sync.file)
    (row,) = report.layers
    assert (row.name, row.through_loaders, report.tensors) == ("model.norm", 1, 1)
    assert row.bytes == sync.tensors[name].nbytes


def test_a_refused_sync_has_a_reason(sync, monkeypatch):
    monkeypatch.setenv("VLLM_RELOAD_COMMIT", "model")
    report = sync.fails([(n, t) for n, t in sync.tensors.items() if n != SCALE])
    assert (report.result, report.state) == ("incomplete", "serving")
    assert (report.version, report.missing, report.invalid) == (0, 1, 0)
    assert "never sent" in report.reason and EXPERTS in report.reason
    assert report.tensors == len(sync.tensors) - 1
    assert all(row.committed_at is None for row in report.layers)


def test_a_mixture_is_told(sync, monkeypatch):
    monkeypatch.setenv("VLLM_RELOAD_COMMIT", "layer")
    bad = {**sync.tensors, SCALE: torch.full_like(sync.tensors[SCALE], math.nan)}
    report = sync.fails(bad.items())
    assert (report.result, report.state) == ("invalid", "inconsistent")
    assert report.missing == 0 < report.invalid
    committed = {row.name for row in report.layers if row.committed_at is not None}
    assert committed and not any(name.startswith(EXPERTS) for name in committed)
    assert sync().result == "complete"


def test_a_trainer_that_ends_is_told_once(sync, log):
    def ends():
        yield from list(sync.tensors.items())[:3]
        raise ConnectionError("the trainer is gone")

    report = sync.fails(ends())
    abort_layerwise_reload(sync.built.model, "cleaning up")
    assert report.result == "failed" and "the trainer is gone" in report.reason
    assert report == read_report(sync.file)
    ((level, line),) = log
    assert level == logging.WARNING and "the trainer is gone" in line
    assert report.tensors == 3


def test_a_sync_ends_with_a_line(sync, log):
    report = sync()
    assert log == [(logging.INFO, report.summary)]


@pytest.mark.parametrize(
    "changes, line",
    [
        (
            {},
            (
                "Weight sync 7 is complete: 100 tensors, 3.0 MB in 0.50 s (0.25 s "
                "waiting, 0.125 s pause), 0.01 GB/s, 90 planned, 10 through loaders, "
                "at most 1.5 MB staged."
            ),
        ),
        (
            dict(result="failed", reason="weight sync is incomplete\n  missing: a"),
            (
                "Weight sync failed: 100 tensors, 3.0 MB in 0.50 s (0.25 s waiting, "
                "0.125 s pause), 0.01 GB/s, 90 planned, 10 through loaders, at most "
                "1.5 MB staged. Version 7 is serving. It failed at weight sync is "
                "incomplete"
            ),
        ),
    ],
)
def test_the_line(changes, line):
    assert replace(EXAMPLE, **changes).summary == line


def test_no_file_unless_asked_for(sync, monkeypatch):
    monkeypatch.delenv("VLLM_RELOAD_REPORT")
    with pytest.raises(FileNotFoundError):
        sync()


def test_a_sync_does_not_fail_for_its_report(sync, log, monkeypatch, tmp_path):
    monkeypatch.setenv("VLLM_RELOAD_REPORT", str(tmp_path / "no" / "such" / "folder"))
    with pytest.raises(FileNotFoundError):
        sync()
    assert [level for level, _ in log] == [logging.INFO, logging.WARNING]
    assert "cannot be written" in log[1][1]


def publish_own(rank: int, file: str) -> None:
    publish(replace(EXAMPLE, rank=rank), file)


def test_each_rank_writes_its_own(tmp_path):
    file = tmp_path / "sync.json"
    with start_ranks(2, tmp_path) as ranks:
        ranks.run(publish_own, str(file))
    assert not file.exists()
    for rank in (0, 1):
        report = read_report(tmp_path / f"sync.rank{rank}.json")
        assert report == replace(EXAMPLE, rank=rank, layers=[])


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"layers": [{}]}'])
def test_what_is_no_report(content, tmp_path):
    file = tmp_path / "sync.json"
    file.write_text(content)
    with pytest.raises(ValueError, match="sync.json is no report"):
        read_report(file)


def test_reports_of_later_releases_may_say_more(sync):
    report = sync()
    content = json.loads(sync.file.read_text())
    sync.file.write_text(json.dumps({**content, "more": 1}))
    assert read_report(sync.file) == report


def test_who_gives_up_aborts(sync):
    with sync.built.worker_context():
        initialize_layerwise_reload(sync.built.model)
        abort_layerwise_reload(sync.built.model, "enough")
    report = read_report(sync.file)
    assert (report.result, report.reason) == ("aborted", "enough")
    assert report.pause_seconds == 0


def test_a_tensor_that_its_loader_refuses_is_invalid(sync):
    report = sync.fails([("model.norm.weight", torch.ones(3))])
    assert (report.result, report.missing) == ("invalid", 0)


def test_reports_are_taken_once(sync):
    reports = [sync(), sync.fails([(SCALE, torch.ones(3))])]
    reports = [replace(report, layers=()) for report in reports]
    assert take_reports(sync.built.model) == reports
    assert take_reports(sync.built.model) == []


def test_of_reports_that_nobody_takes_the_last_are_kept(sync):
    for _ in range(model_reload.MAX_KEPT + 1):
        initialize_layerwise_reload(sync.built.model)
        abort_layerwise_reload(sync.built.model, "enough")
    assert len(take_reports(sync.built.model)) == model_reload.MAX_KEPT


def test_a_failed_report_says_what_was_wrong(sync):
    with pytest.raises(WeightSyncError) as error:
        sync([(n, t) for n, t in sync.tensors.items() if n != SCALE])
    assert read_report(sync.file).reason == str(error.value)
