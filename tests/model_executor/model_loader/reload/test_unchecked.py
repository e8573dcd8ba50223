# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Weights that come past the checks of a sync are said to, until a sync brings all."""

import pytest
import torch
from torch import nn

from vllm.model_executor.model_loader.reload import (
    abort_layerwise_reload,
    finalize_layerwise_reload,
    initialize_layerwise_reload,
    record_metadata_for_reloading,
    reload_status,
)
from vllm.model_executor.model_loader.reload.unchecked import (
    kernel_format_is_unchecked,
    patches_are_unchecked,
)


class Model(nn.Linear):
    """A model of two tensors, loaded by name."""

    def __init__(self):
        super().__init__(2, 2)
        self.requires_grad_(False)

    def load_weights(self, weights) -> None:
        for name, weight in weights:
            self.get_parameter(name).copy_(weight)


@pytest.fixture
def model() -> Model:
    model = Model()
    record_metadata_for_reloading(model)
    return model


@kernel_format_is_unchecked
def reload_weights(config, model, weights, is_checkpoint_format: bool) -> None:
    model.load_weights(weights)


@patches_are_unchecked
def load_chunk(model, weights, *, sparse: bool = True) -> None:
    model.load_weights(weights)


def sync(model: Model, *names: str) -> None:
    initialize_layerwise_reload(model)
    model.load_weights(
        [(name, torch.ones_like(model.get_parameter(name))) for name in names]
    )
    finalize_layerwise_reload(model, None)


def road(model: Model) -> str:
    return reload_status(model).unchecked


def test_nothing_is_said_of_checkpoint_format(model):
    reload_weights(None, model, [], is_checkpoint_format=True)
    assert road(model) == ""


def test_the_road_is_named_until_a_sync(model):
    reload_weights(None, model, [], is_checkpoint_format=False)
    assert road(model) == "kernel format"
    load_chunk(model, [("bias", torch.zeros(2))])
    assert road(model) == "patches"
    sync(model, "bias", "weight")
    assert road(model) == ""
    assert reload_status(model).state == "serving"


def test_a_road_that_breaks_off_leaves_a_mixture(model):
    weights = [("bias", torch.zeros(2)), ("weight", torch.zeros(3))]
    with pytest.raises(RuntimeError, match="size"):
        load_chunk(model, weights)
    status = reload_status(model)
    assert (status.state, status.fenced) == ("inconsistent", True)
    assert "patches" in status.detail


def test_patches_of_a_sync_are_checked(model):
    initialize_layerwise_reload(model)
    load_chunk(model, [], sparse=False)
    assert road(model) == ""
    abort_layerwise_reload(model, "a test")
