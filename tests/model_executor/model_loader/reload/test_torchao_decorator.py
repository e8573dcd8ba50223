# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Each `load_weights` of a model that torchao quantises is a whole sync."""

from typing import Any

import pytest
import torch
from torch import nn

from vllm.model_executor.model_loader.reload import (
    record_metadata_for_reloading,
    reload_status,
)
from vllm.model_executor.model_loader.reload.layerwise import finish_first_load
from vllm.model_executor.model_loader.reload.torchao_decorator import (
    set_torchao_reload_attrs,
    support_quantized_model_reload_from_hp_weights,
)
from vllm.model_executor.model_loader.weight_utils import default_weight_loader


class Loader:
    """What loads a model, as `AutoWeightsLoader` does."""

    def __init__(self, module: nn.Module):
        self.module = module

    @support_quantized_model_reload_from_hp_weights
    def load_weights(self, weights) -> None:
        params = dict(self.module.named_parameters())
        for name, tensor in weights:
            load = getattr(params[name], "weight_loader", default_weight_loader)
            load(params[name], tensor)


class Model(nn.Sequential):
    def __init__(self):
        super().__init__(*(nn.Linear(4, 4, bias=False) for _ in range(2)))
        self.requires_grad_(False)

    def load_weights(self, weights) -> None:
        Loader(self).load_weights(weights)


def sent(value: float) -> list[tuple[str, torch.Tensor]]:
    return [(f"{i}.weight", torch.full((4, 4), value)) for i in range(2)]


def values(model: nn.Module) -> list[float]:
    return [param.unique().item() for param in model.parameters()]


@pytest.fixture
def model(monkeypatch) -> Model:
    monkeypatch.setenv("VLLM_RELOAD_ROLLBACK", "host")
    model = Model()
    record_metadata_for_reloading(model)
    model.load_weights(sent(0.0))
    finish_first_load(model)
    config: Any = None
    set_torchao_reload_attrs(model, config)
    model.load_weights(sent(1.0))
    return model


def test_it_is_a_sync(model):
    assert values(model) == [1.0, 1.0]
    assert reload_status(model).version == 1


def test_it_is_one_also_by_a_load_weights_that_somebody_put_there(model):
    original = model.load_weights
    model.load_weights = lambda weights: original((n, t * 2) for n, t in weights)
    for version in (2, 3):
        model.load_weights(sent(2.0))
        assert values(model) == [4.0, 4.0]
        assert reload_status(model).version == version


def test_one_that_fails_is_aborted(model):
    def dies():
        yield sent(2.0)[0]
        raise ConnectionResetError("the trainer went away")

    for _ in range(2):
        with pytest.raises(ConnectionResetError):
            model.load_weights(dies())
        assert values(model) == [1.0, 1.0]
        assert reload_status(model).state == "serving"
    model.load_weights(sent(3.0))
    assert values(model) == [3.0, 3.0]
    assert reload_status(model).version == 2
