# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Layers of which processing makes nothing are processed once, all others each time."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.model_loader.reload import (
    WeightSyncError,
    finalize_layerwise_reload,
    initialize_layerwise_reload,
    mark_inconsistent,
    record_metadata_for_reloading,
    staging,
)
from vllm.model_executor.model_loader.reload.fingerprint import fingerprints
from vllm.model_executor.model_loader.reload.layerwise import finish_first_load

SIZE = 8


class Process:
    """What a quant method does, which its shadows share; counts how often."""

    def __init__(self, process):
        self.times = 0
        self._process = process

    def __call__(self, layer):
        self.times += 1
        self._process(layer)


class Method(QuantizeMethodBase):
    def __init__(self, process):
        self.process = process

    def create_weights(self, layer, *args, **kwargs):
        raise NotImplementedError

    def apply(self, layer, *args, **kwargs):
        raise NotImplementedError

    def process_weights_after_loading(self, layer):
        self.process(layer)


class Projection(torch.nn.Module):
    weight: Any

    def __init__(self, process):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(SIZE), requires_grad=False)
        self.weight.weight_loader = lambda param, loaded: param.data.copy_(loaded)
        self.quant_method = Method(Process(process))


class Model(torch.nn.Module):
    def __init__(self, process):
        super().__init__()
        self.projection = Projection(process)

    def load_weights(self, weights):
        for _, tensor in weights:
            weight = self.projection.weight
            weight.weight_loader(weight, tensor)


def keep(layer):
    """Looks at what does not depend on values, and takes a view."""
    assert layer.weight.shape == (SIZE,)
    layer.weight.data.view(2, -1)


def wrap(layer):
    """Puts another parameter around the same memory."""
    layer.weight = torch.nn.Parameter(layer.weight.data, requires_grad=False)


def negate(layer):
    layer.weight.data.neg_()


def negate_unseen(layer):
    """As a kernel does that is handed an address."""
    array = layer.weight.data.numpy()
    array *= -1


def replace(layer):
    layer.weight = torch.nn.Parameter(-layer.weight.data, requires_grad=False)


def derive(layer):
    layer.largest = layer.weight.max()


def look(layer):
    layer.is_positive = bool(layer.weight[0] > 0)


def count(layer):
    layer.nonzero = int(torch.count_nonzero(layer.weight))


def build(process) -> Model:
    model = Model(process)
    record_metadata_for_reloading(model)
    model.load_weights([("projection.weight", torch.ones(SIZE))])
    finish_first_load(model)
    process(model.projection)
    return model


def sync(model: Model, value: float, policy: str = "layer") -> None:
    config: Any = SimpleNamespace(dtype=torch.float32)
    initialize_layerwise_reload(model)
    model.load_weights([("projection.weight", torch.full((SIZE,), value))])
    finalize_layerwise_reload(model, config)


def times_processed(model: Model) -> int:
    return model.projection.quant_method.process.times


@pytest.mark.parametrize("policy", ["layer", "model"])
@pytest.mark.parametrize("process", [keep, wrap])
def test_a_layer_that_serves_as_staged_is_processed_once(process, policy, monkeypatch):
    monkeypatch.setenv("VLLM_RELOAD_COMMIT", policy)
    model = build(process)
    address = model.projection.weight.data_ptr()
    for value in (2.0, 3.0, 4.0):
        sync(model, value)
        assert model.projection.weight.tolist() == [value] * SIZE
    assert model.projection.weight.data_ptr() == address
    assert times_processed(model) == 1


@pytest.fixture
def summed(monkeypatch) -> list[torch.Tensor]:
    """Tensors that sums were asked of when their layer was closed."""
    tensors: list[torch.Tensor] = []

    def note(staged):
        tensors.extend(tensor for tensor, _ in staged)
        return fingerprints(staged)

    monkeypatch.setattr(staging, "fingerprints", note)
    return tensors


@pytest.mark.parametrize("process", [keep, wrap, negate, replace])
def test_only_what_does_not_serve_as_staged_is_summed(process, summed):
    model = build(process)
    sync(model, 2.0)
    assert len(summed) == 1
    sync(model, 3.0)
    assert len(summed) == (1 if process in (keep, wrap) else 2)


@pytest.mark.parametrize("syncs", [0, 1])
@pytest.mark.parametrize("process", [keep, negate])
def test_what_comes_again_is_compared_with_what_serves(process, syncs):
    model = build(process)
    for _ in range(syncs):
        sync(model, 2.0)
    initialize_layerwise_reload(model)
    for _ in range(2):
        model.load_weights([("projection.weight", torch.full((SIZE,), 3.0))])
    with pytest.raises(WeightSyncError, match="came again with other values"):
        model.load_weights([("projection.weight", torch.full((SIZE,), 4.0))])


class Pair(torch.nn.Module):
    """Two small layers, which are committed together."""

    def __init__(self, process):
        super().__init__()
        self.first, self.second = Projection(process), Projection(process)
        self.first.register_buffer("table", torch.arange(4.0))
        large = self.large = Projection(lambda layer: None)
        large.weight = torch.nn.Parameter(torch.zeros(200 * SIZE), requires_grad=False)

    def load_weights(self, weights):
        for name, tensor in weights:
            getattr(self, name).weight.data.copy_(tensor)


def pair(value: float) -> list[tuple[str, torch.Tensor]]:
    first, second = torch.full((2, SIZE), value)
    return [("first", first), ("second", second + 1)]


@pytest.fixture(params=[keep, negate])
def loaded_pair(request) -> Pair:
    model = Pair(request.param)
    record_metadata_for_reloading(model)
    model.load_weights([*pair(1.0), ("large", torch.ones(200 * SIZE))])
    finish_first_load(model)
    for layer in (model.first, model.second):
        request.param(layer)
    return model


def test_each_of_a_group_is_compared_with_itself(loaded_pair):
    config: Any = SimpleNamespace(dtype=torch.float32)
    large = "large", torch.ones(200 * SIZE)  # for which the others need not wait
    for value in (2.0, 3.0):
        initialize_layerwise_reload(loaded_pair)
        loaded_pair.load_weights([*pair(value), large])
        loaded_pair.load_weights(pair(value))
        finalize_layerwise_reload(loaded_pair, config)
    initialize_layerwise_reload(loaded_pair)
    loaded_pair.load_weights([*pair(4.0), large])
    with pytest.raises(WeightSyncError, match="came again with other values"):
        loaded_pair.load_weights([("first", torch.full((SIZE,), 5.0))])


def test_after_weights_were_lost_what_is_not_sent_is_made_anew(loaded_pair):
    config: Any = SimpleNamespace(dtype=torch.float32)
    table: Any = loaded_pair.first.table
    for value in (2.0, 3.0):
        initialize_layerwise_reload(loaded_pair)
        loaded_pair.load_weights([*pair(value), ("large", torch.ones(200 * SIZE))])
        finalize_layerwise_reload(loaded_pair, config)
        mark_inconsistent(loaded_pair, "slept")
        table.fill_(9)
    initialize_layerwise_reload(loaded_pair)
    loaded_pair.load_weights([*pair(4.0), ("large", torch.ones(200 * SIZE))])
    finalize_layerwise_reload(loaded_pair, config)
    assert loaded_pair.first.table is table
    assert table.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("process", [negate, negate_unseen, replace])
def test_a_layer_whose_values_change_is_processed_each_time(process):
    model = build(process)
    for value in (2.0, 3.0, 4.0):
        sync(model, value)
        assert model.projection.weight.tolist() == [-value] * SIZE
    assert times_processed(model) == 3


@pytest.mark.parametrize(
    "process, name, expected",
    [
        (derive, "largest", [2.0, -3.0, 4.0]),
        (look, "is_positive", [True, False, True]),
        (count, "nonzero", [SIZE, SIZE, SIZE]),
    ],
)
def test_a_layer_from_which_something_follows_is_processed_each_time(
    process, name, expected
):
    model = build(process)
    for value, follows in zip((2.0, -3.0, 4.0), expected):
        sync(model, value)
        assert model.projection.weight.tolist() == [value] * SIZE
        assert getattr(model.projection, name) == follows
    assert times_processed(model) == 3


def test_a_layer_that_serves_other_tensors_is_processed_again():
    model = build(keep)
    sync(model, 2.0)
    served = model.projection.weight
    model.projection.weight = torch.nn.Parameter(torch.zeros(SIZE), requires_grad=False)
    sync(model, 3.0)
    assert model.projection.weight.tolist() == [3.0] * SIZE
    assert served.tolist() == [2.0] * SIZE
    assert times_processed(model) == 2
    sync(model, 4.0)
    assert times_processed(model) == 2
