# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""What committing layers together must not lose."""

import gc
import time
import weakref
from typing import Any

import pytest
import torch

from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.model_loader.reload import (
    abort_layerwise_reload,
    as_staged,
    commit,
    committer,
    finalize_layerwise_reload,
    initialize_layerwise_reload,
    record_metadata_for_reloading,
    staging,
)
from vllm.model_executor.model_loader.reload.layerwise import (
    finish_first_load,
    take_reports,
)
from vllm.model_executor.model_loader.reload.sync_report import read_report


def load_weight(param: torch.Tensor, weight: torch.Tensor) -> None:
    param.data.copy_(weight)


class Layer(torch.nn.Module):
    def __init__(self, *shape: int):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(shape), requires_grad=False)
        self.weight.weight_loader = load_weight


class Model(torch.nn.Module):
    def __init__(self, **layers: torch.nn.Module):
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)

    def load_weights(self, weights) -> None:
        params: dict[str, Any] = dict(self.named_parameters(remove_duplicate=False))
        for name, tensor in weights:
            params[name].weight_loader(params[name], tensor)


def load(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Load ones, cold; return twos."""
    record_metadata_for_reloading(model)
    params = dict(model.named_parameters())
    model.load_weights((name, torch.ones(p.shape)) for name, p in params.items())
    finish_first_load(model)
    return {name: torch.full(p.shape, 2.0) for name, p in params.items()}


@pytest.fixture
def staged(monkeypatch):
    """Weak references to the storages of what is staged; only counting frees them."""
    refs: list[Any] = []
    allocate = staging.StagedTensor._allocate

    def noted(tensor):
        memory = allocate(tensor)
        refs.append(weakref.ref(memory))
        return memory

    monkeypatch.setattr(staging.StagedTensor, "_allocate", noted)
    gc.collect()
    gc.disable()
    yield refs
    gc.enable()


def in_use(refs) -> int:
    return sum(each() is not None for each in refs)


def group() -> Model:
    """Small layers that wait for a large one, and are committed with it."""
    return Model(a=Layer(8), b=Layer(8), c=Layer(8), large=Layer(64, 64))


@pytest.mark.parametrize("broken", ["check", "copy"])
def test_a_sync_that_failed_holds_nothing_until_it_is_closed(
    broken, staged, monkeypatch
):
    monkeypatch.setenv("VLLM_RELOAD_COMMIT", "layer")
    model: Any = group()
    new = load(model)

    def fails(*_):
        raise RuntimeError("the device is gone")

    if broken == "check":
        model.c.weight.data = model.b.weight.data  # as tying on load does
        new["c.weight"] += 1
    else:
        monkeypatch.setattr(committer, "apply_commits", fails)
    initialize_layerwise_reload(model)
    try:
        model.load_weights(new.items())
    except Exception as error:
        raised: BaseException | None = error
        while raised is not None:  # or its frames hold what is staged
            raised.__traceback__ = None
            raised = raised.__cause__
    held = in_use(staged)
    abort_layerwise_reload(model, "test")
    assert len(staged) == 4
    assert not held


class Doubling(QuantizeMethodBase):
    def create_weights(self, layer, *args, **kwargs):
        raise NotImplementedError

    def apply(self, layer, *args, **kwargs):
        raise NotImplementedError

    def process_weights_after_loading(self, layer):
        layer.weight = torch.nn.Parameter(layer.weight.data * 2, False)


def test_what_serves_as_staged_makes_place_for_what_is_processed(staged, monkeypatch):
    monkeypatch.setenv("VLLM_RELOAD_COMMIT", "layer")
    model: Any = group()
    model.large.quant_method = Doubling()
    new = load(model)
    model.large.quant_method.process_weights_after_loading(model.large)
    process, counts = as_staged.process_layer, []

    def counted(*args, **kwargs):
        counts.append(in_use(staged))
        return process(*args, **kwargs)

    monkeypatch.setattr(as_staged, "process_layer", counted)
    initialize_layerwise_reload(model)
    model.load_weights(new.items())
    finalize_layerwise_reload(model, None)
    assert model.large.weight.eq(4).all() and model.a.weight.eq(2).all()
    assert len(staged) == 4 and counts == [1]


def test_time_of_a_layer_is_not_that_of_others(monkeypatch, tmp_path):
    """A small layer that takes long, and a large one that is committed with it."""
    monkeypatch.setenv("VLLM_RELOAD_COMMIT", "model")
    monkeypatch.setenv("VLLM_RELOAD_REPORT", str(tmp_path / "report"))
    model: Any = group()
    model.a.quant_method = Doubling()
    new = load(model)
    copy_values = commit.copy_values

    def slow(target, source):
        if len(target) == 8:
            time.sleep(0.1)
        copy_values(target, source)

    monkeypatch.setattr(commit, "copy_values", slow)
    initialize_layerwise_reload(model)
    model.load_weights(new.items())
    finalize_layerwise_reload(model, None)
    rows = {row.name: row for row in read_report(tmp_path / "report").layers}
    assert rows["a"].committing_seconds > 0.1 > rows["large"].committing_seconds


def test_time_to_compare_shared_memory_is_in_the_report(monkeypatch):
    monkeypatch.setenv("VLLM_RELOAD_COMMIT", "layer")
    model: Any = group()
    new = load(model)
    model.c.weight.data = model.b.weight.data
    same_bytes = committer.same_bytes

    def slow(*tensors):
        time.sleep(0.2)
        return same_bytes(*tensors)

    monkeypatch.setattr(committer, "same_bytes", slow)
    initialize_layerwise_reload(model)
    model.load_weights(new.items())
    finalize_layerwise_reload(model, None)
    (report,) = take_reports(model)
    assert report.checking_seconds + report.committing_seconds > 0.2
