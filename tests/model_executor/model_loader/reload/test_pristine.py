# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Processing a shadow leaves the live layer alone, and tells which buffers it wrote."""

import pytest
import torch

from vllm.model_executor.model_loader.reload.pristine import PristineLayer


class Layer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(2), requires_grad=False)
        self.register_buffer("scale", torch.ones(1))
        self.levels = {"a": [1.0]}


def shadow_of(layer: Layer):
    pristine = PristineLayer(layer, dict(layer.named_parameters()))
    params = {"weight": torch.nn.Parameter(torch.ones(2), requires_grad=False)}
    return pristine.shadow(layer, params, {"scale": layer.scale.clone()}, {})


def test_live_layer_is_not_touched():
    layer = Layer()
    shadow = shadow_of(layer)
    shadow.layer.levels["a"][0] = 2.0
    shadow.layer.scale.fill_(2)
    shadow.layer.weight.data.fill_(2)
    assert layer.levels == {"a": [1.0]}
    assert layer.scale.tolist() == [1] and layer.weight.tolist() == [0, 0]


def assign(layer: torch.nn.Module) -> None:
    layer.scale = torch.full((1,), 2.0)


def write(layer: torch.nn.Module) -> None:
    layer.scale.fill_(2)


def write_data(layer: torch.nn.Module) -> None:
    layer.scale.data.fill_(2)


@pytest.mark.parametrize("change", [assign, write, write_data])
def test_changed_buffers_are_told(change):
    shadow = shadow_of(Layer())
    assert shadow.buffers.touched({"scale": shadow.layer.scale}) == []
    change(shadow.layer)
    assert shadow.buffers.touched({"scale": shadow.layer.scale}) == ["scale"]
