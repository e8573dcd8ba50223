# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""A sync takes a model's `load_weights`, and gives back what it has taken."""

import pytest
import torch
from torch import nn

from vllm.model_executor.model_loader.reload import (
    abort_layerwise_reload,
    finalize_layerwise_reload,
    initialize_layerwise_reload,
    record_metadata_for_reloading,
)
from vllm.model_executor.model_loader.reload.layerwise import finish_first_load
from vllm.model_executor.model_loader.weight_utils import default_weight_loader


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 4, bias=False)
        self.requires_grad_(False)

    def load_weights(self, weights) -> None:
        param = self.inner.weight
        for _, tensor in weights:
            getattr(param, "weight_loader", default_weight_loader)(param, tensor)


def double(model: Model) -> None:
    """Replace its `load_weights` by one that doubles."""
    original = model.load_weights
    model.__dict__["load_weights"] = lambda weights: original(
        (n, t * 2) for n, t in weights
    )


@pytest.fixture
def model() -> Model:
    model = Model()
    double(model)
    return model


def sent(value: float) -> list[tuple[str, torch.Tensor]]:
    return [("inner.weight", torch.full((4, 4), value))]


def test_it_is_the_models_own_again_after_the_first_load(model):
    own = model.load_weights
    record_metadata_for_reloading(model)
    model.load_weights(sent(1.0))
    finish_first_load(model)
    assert model.load_weights is own
    assert model.inner.weight.eq(2).all()


@pytest.mark.parametrize("plan", ["0", "1"])
def test_it_is_the_models_own_again_after_a_sync(plan, model, monkeypatch):
    monkeypatch.setenv("VLLM_RELOAD_PLAN", plan)
    own = model.load_weights
    record_metadata_for_reloading(model)
    for value in (1.0, 2.0, 3.0):
        initialize_layerwise_reload(model)
        abort_layerwise_reload(model, "a test")
        initialize_layerwise_reload(model)
        model.load_weights(sent(value))
        finalize_layerwise_reload(model, None)
        assert model.load_weights is own
        assert model.inner.weight.eq(2 * value).all()


def test_it_is_that_of_the_class_again_otherwise():
    model = Model()
    record_metadata_for_reloading(model)
    initialize_layerwise_reload(model)
    model.load_weights(sent(1.0))
    finalize_layerwise_reload(model, None)
    assert "load_weights" not in vars(model)


@pytest.mark.parametrize("syncs", [0, 1, 2])
def test_no_route_of_one_goes_past_another(syncs, monkeypatch):
    monkeypatch.setenv("VLLM_RELOAD_PLAN", "1")
    model = Model()
    model.inner.weight.weight_loader = lambda param, weight: param.data.copy_(weight)
    record_metadata_for_reloading(model)
    param = model.inner.weight
    model.load_weights(sent(0.0))  # which gives it a route
    for sync in range(4):
        if sync == syncs:
            double(model)
        initialize_layerwise_reload(model)
        model.load_weights(sent(1.0))
        finalize_layerwise_reload(model, None)
        assert param.eq(2 if sync >= syncs else 1).all()


class Slotted:
    """Loads a model's weights, and cannot be referred to weakly."""

    __slots__ = ("load",)

    def __init__(self, load):
        self.load = load

    def __call__(self, weights) -> None:
        self.load(weights)


def test_it_may_be_an_object_without_weak_references():
    model = Model()
    model.__dict__["load_weights"] = own = Slotted(model.load_weights)
    record_metadata_for_reloading(model)
    for value in (1.0, 2.0):
        initialize_layerwise_reload(model)
        model.load_weights(sent(value))
        finalize_layerwise_reload(model, None)
        assert model.load_weights is own
        assert model.inner.weight.eq(value).all()
