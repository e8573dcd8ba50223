# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""An iterator that is asked for weights may drive its own sync meanwhile."""

from collections.abc import Iterable
from ctypes import memmove
from typing import Any

import pytest
import torch
from torch import nn

from vllm.model_executor.model_loader.reload import (
    WeightSyncError,
    abort_layerwise_reload,
    finalize_layerwise_reload,
    initialize_layerwise_reload,
    record_metadata_for_reloading,
    reload_status,
    transaction,
)
from vllm.model_executor.model_loader.reload.layerwise import prepare_layerwise_reload

Weights = Iterable[tuple[str, torch.Tensor]]
NAMES = [f"{i}.weight" for i in range(4)]


class Model(nn.Sequential):
    def __init__(self):
        super().__init__(*(nn.Linear(4, 4, bias=False) for _ in NAMES))
        self.requires_grad_(False)

    def load_weights(self, weights: Weights) -> None:
        params = dict(self.named_parameters())
        for name, tensor in weights:
            params[name].data.copy_(tensor)


def sent(value: float, names: Iterable[str] = NAMES) -> list[tuple[str, torch.Tensor]]:
    return [(name, torch.full((4, 4), value)) for name in names]


def values(model: Model) -> list[float]:
    return [layer.weight.unique().item() for layer in model]


def sync(model: Model, weights: Weights) -> None:
    initialize_layerwise_reload(model)
    model.load_weights(weights)
    finalize_layerwise_reload(model, None)


@pytest.fixture(params=["0", "1"], ids=["loaders", "plan"])
def plan(request, monkeypatch) -> str:
    monkeypatch.setenv("VLLM_RELOAD_PLAN", request.param)
    return request.param


@pytest.fixture
def model(plan) -> Model:
    """One that had a sync, so that tensors have their routes."""
    model = Model()
    record_metadata_for_reloading(model)
    sync(model, sent(0.0))
    return model


def by_list(model: Model, weights: list) -> None:
    model.load_weights(weights)


def by_iterator(model: Model, weights: list) -> None:
    model.load_weights(iter(weights))


@pytest.mark.parametrize("policy", ["layer", "model"])
@pytest.mark.parametrize("load", [by_list, by_iterator])
def test_it_may_load(load, policy, model, monkeypatch):
    monkeypatch.setenv("VLLM_RELOAD_COMMIT", policy)

    def weights() -> Weights:
        first, second, third, fourth = sent(1.0)
        yield first
        load(model, [second])
        yield third
        load(model, [fourth])

    sync(model, weights())
    assert values(model) == [1.0] * 4


def test_it_may_call_loaders(model):
    def weights() -> Weights:
        first, (_, second), third, fourth = sent(1.0)
        yield first
        param = model[1].weight
        param.weight_loader(param, second)
        yield third
        yield fourth

    initialize_layerwise_reload(model, exposed=True)
    model.load_weights(weights())
    finalize_layerwise_reload(model, None)
    assert values(model) == [1.0] * 4


class Halves(nn.Module):
    """Loads two tensors into one parameter."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(8, 4), requires_grad=False)
        self.weight.weight_loader = self._load

    def _load(self, param: torch.Tensor, weight: torch.Tensor, half: int) -> None:
        param.data.narrow(0, 4 * half, 4).copy_(weight)

    def load_weights(self, weights: Weights) -> None:
        for name, tensor in weights:
            self.weight.weight_loader(self.weight, tensor, int(name))


@pytest.mark.parametrize("within", [True, False], ids=["iterator", "caller"])
def test_one_half_may_come_by_its_name_and_the_other_by_the_loader(within, plan):
    model = Halves()
    record_metadata_for_reloading(model)
    sync(model, sent(0.0, "01"))

    def weights() -> Weights:
        (first, _), (_, second) = sent(1.0, "01")
        yield first, second
        if within:
            model.weight.weight_loader(model.weight, second, 1)

    initialize_layerwise_reload(model, exposed=True)
    model.load_weights(weights())
    if not within:
        model.weight.weight_loader(model.weight, torch.ones(4, 4), 1)
    finalize_layerwise_reload(model, None)
    assert model.weight.eq(1).all()


def launch(batches) -> None:
    """Copy as an accelerator does: when it is told to, and not before."""
    for layout, targets, sources in batches:
        assert layout.outer == layout.rows == 1
        for target, source in zip(targets.tolist(), sources.tolist()):
            memmove(target, source, layout.row_bytes)


def test_it_may_load_a_list_and_then_overwrite_its_own_memory(model, monkeypatch):
    monkeypatch.setattr(transaction, "batch_launcher", lambda device: launch)
    monkeypatch.setenv("VLLM_RELOAD_COMMIT", "model")
    bucket = torch.empty(4, 4)

    def weights() -> Weights:
        model.load_weights(sent(1.0, NAMES[:1]))
        for value, name in enumerate(NAMES[1:], start=2):
            yield name, bucket.fill_(value)

    sync(model, weights())
    assert values(model) == [1.0, 2.0, 3.0, 4.0]


def staged_memory(load_weights: Any) -> list[torch.Tensor | None]:
    return [tensor.memory for tensor in load_weights.__self__._layers_of]


@pytest.mark.parametrize("policy", ["layer", "model"])
def test_nothing_is_staged_after_it_has_aborted(policy, model, monkeypatch):
    monkeypatch.setenv("VLLM_RELOAD_COMMIT", policy)

    def weights() -> Weights:
        abort_layerwise_reload(model, "a test")
        yield from sent(1.0)

    initialize_layerwise_reload(model)
    held = model.load_weights
    with pytest.raises(WeightSyncError, match="aborted.*a test"):
        held(weights())
    assert staged_memory(held) == [None] * 4
    assert values(model) == [0.0] * 4


@pytest.mark.parametrize("policy", ["layer", "model"])
def test_what_it_yields_after_it_has_prepared_is_refused(policy, model, monkeypatch):
    monkeypatch.setenv("VLLM_RELOAD_COMMIT", policy)

    def weights() -> Weights:
        yield from sent(1.0)
        prepare_layerwise_reload(model, None)
        yield from sent(2.0) if policy == "model" else sent(1.0)

    initialize_layerwise_reload(model)
    with pytest.raises(WeightSyncError, match="takes no more tensors"):
        model.load_weights(weights())
    status = reload_status(model)
    if policy == "model":
        assert values(model) == [0.0] * 4 and status.state == "serving"
    else:
        assert values(model) == [1.0] * 4 and status.fenced
