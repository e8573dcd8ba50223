# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""What a worker does about bad scales that kernels met."""

import math
from types import SimpleNamespace

import pytest
import torch

from vllm.model_executor.layers.fused_moe.scale_watch import (
    BLOCK_N_SHIFT,
    EXPERT_SHIFT,
    SLOT_SHIFT,
    ScaleWatch,
)
from vllm.model_executor.model_loader.reload import mark_inconsistent, reload_status
from vllm.v1.worker import scale_guard
from vllm.v1.worker.scale_guard import (
    ScaleGuard,
    ends_on_bad_scale,
    forget_bad_scales,
    guard_of,
)

NAME = "experts.w13_weight_scale_inv expert 3 up: scale is nan"


class Worker:
    """A worker of one model: 4 experts, w13 in 2 x 2 blocks, which have a NaN each."""

    device = torch.device("cpu")

    def __init__(self, backend: str = "uni"):
        experts = torch.nn.Module()
        self.scale = torch.nn.Parameter(torch.ones(4, 2, 2), requires_grad=False)
        self.scale[:, 1, 0] = math.nan
        experts.w13_weight_scale_inv = self.scale
        self.model = torch.nn.ModuleDict({"experts": experts})
        self.model_runner = SimpleNamespace(get_model=lambda: self.model)
        self.parallel_config = SimpleNamespace(distributed_executor_backend=backend)
        self.scale_guard = ScaleGuard(self)


@pytest.fixture
def watch(monkeypatch) -> ScaleWatch:
    with torch.inference_mode():  # as when the first forward pass makes it
        watch = ScaleWatch(Worker.device)
    monkeypatch.setattr(scale_guard, "scale_watch", lambda device: watch)
    return watch


@pytest.fixture(autouse=True)
def policy(monkeypatch, request):
    policy = getattr(request, "param", "raise")
    monkeypatch.setenv("VLLM_MOE_SCALE_CHECK", policy)


@torch.inference_mode()
def meet(watch: ScaleWatch, scale: torch.Tensor, expert: int = 3) -> None:
    """Record a scale as a kernel does: the first one stays."""
    word = watch.slot(scale) << SLOT_SHIFT | expert << EXPERT_SHIFT | 1 << BLOCK_N_SHIFT
    if not watch.device_word:
        watch.device_word.fill_(word)
        watch.host_word.fill_(word)


def told(worker: Worker) -> str:
    """Look at the scales that were met; return the reason that there must be."""
    reason = worker.scale_guard.look()
    assert reason is not None
    return reason


def test_nothing_was_met(watch):
    worker = Worker()
    assert worker.scale_guard.look() is None
    assert reload_status(worker.model).state == "serving"


def test_raise_names_it_once_and_condemns_the_model(watch):
    worker = Worker()
    meet(watch, worker.scale)
    reason = told(worker)
    assert NAME in reason
    status = reload_status(worker.model)
    assert (status.state, status.fenced, status.detail) == (
        "inconsistent",
        True,
        reason,
    )
    assert worker.scale_guard.look() is None


def test_raise_without_a_name(watch):
    worker = Worker()
    hidden = torch.ones(4, 2, 2)
    meet(watch, hidden)
    reason = told(worker)
    assert f"{hidden.data_ptr():#x}" in reason
    assert "expert 3 of this rank, block [1, 0]" in reason
    assert reload_status(worker.model).fenced


@pytest.mark.parametrize("policy", ["warn"], indirect=True)
def test_warn_logs_each_place_once_and_counts(watch, monkeypatch):
    lines = []
    logger = SimpleNamespace(warning=lambda text, *args: lines.append(text % args))
    monkeypatch.setattr(scale_guard, "logger", logger)
    worker = Worker()
    for expert in (3, 3, 2, 3):
        meet(watch, worker.scale, expert)
        assert worker.scale_guard.look() is None
    first, second = lines
    assert NAME in first and "(1 such places so far, met in 1 steps)" in first
    assert "expert 2 up" in second and "(2 such places so far, met in 3" in second
    assert reload_status(worker.model).state == "serving"
    assert forget_bad_scales(worker) == 4
    assert worker.scale_guard.take_met() == 0


@pytest.mark.parametrize("policy", ["off"], indirect=True)
def test_off_does_not_look(watch):
    worker = Worker()
    meet(watch, worker.scale)
    assert worker.scale_guard.look() is None
    assert guard_of(SimpleNamespace(driver_worker=worker)) is None
    forget_bad_scales(worker)
    assert watch.poll() is not None


def test_dummy_weights_pass(watch):
    worker = Worker()
    mark_inconsistent(worker.model, "dummy weights", fenced=False)
    meet(watch, worker.scale)
    assert worker.scale_guard.look() is None
    assert not reload_status(worker.model).fenced


def test_what_was_met_in_old_weights_is_forgotten(watch):
    worker = Worker()
    meet(watch, worker.scale)
    forget_bad_scales(worker)
    assert worker.scale_guard.look() is None
    forget_bad_scales(SimpleNamespace())  # a worker of another kind


def test_a_draft_model_with_dummy_weights_passes(watch):
    worker, draft = Worker(), Worker()
    worker.model_runner.get_draft_model = lambda: draft.model
    mark_inconsistent(draft.model, "dummy weights", fenced=False)
    meet(watch, draft.scale)
    assert worker.scale_guard.look() is None
    meet(watch, worker.scale)
    assert NAME in told(worker)


@pytest.mark.parametrize("backend", ["uni", "mp"])
def test_the_core_looks_at_a_worker_of_its_process_alone(watch, backend):
    worker = Worker(backend)
    guard = guard_of(SimpleNamespace(driver_worker=worker))
    assert guard is (worker.scale_guard if backend == "uni" else None)
    assert guard_of(SimpleNamespace()) is None


@ends_on_bad_scale
def step(worker: Worker, watch: ScaleWatch, is_bad: bool) -> str:
    if is_bad:
        meet(watch, worker.scale)
    return "output"


def test_a_worker_among_others_ends(watch):
    worker = Worker("mp")
    assert step(worker, watch, False) == "output"
    with pytest.raises(SystemExit):
        step(worker, watch, is_bad=True)


def test_a_worker_alone_leaves_it_to_the_core(watch):
    worker = Worker("uni")
    assert step(worker, watch, is_bad=True) == "output"
    assert NAME in told(worker)
