# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""What one layer's loader wrote is known of the layers that are like it."""

import pytest
import torch

from vllm.model_executor.model_loader.reload import (
    WeightSyncError,
    finalize_layerwise_reload,
    initialize_layerwise_reload,
    mark_inconsistent,
    record_metadata_for_reloading,
)
from vllm.model_executor.model_loader.reload.first_load import (
    finish_recording,
    start_recording,
)
from vllm.model_executor.model_loader.reload.first_plan import first_routes
from vllm.model_executor.model_loader.reload.layerwise import finish_first_load
from vllm.model_executor.model_loader.reload.ledger import Box
from vllm.model_executor.model_loader.reload.planned import PlannedCopies
from vllm.model_executor.model_loader.reload.staging_area import stage_model

LAYERS = 3


class Layer(torch.nn.Module):
    """Two experts of [2, 3]; `first` is where the first one is loaded."""

    def __init__(self, first: int = 0):
        super().__init__()
        self.first = first
        self.weight = torch.nn.Parameter(torch.zeros(2, 2, 3), requires_grad=False)
        self.weight.weight_loader = self.load
        self.derived = [0]

    def load(self, param, weight, name, expert=0):
        self.derived[0] += param.is_meta
        param.data[(self.first + expert) % 2].copy_(weight)


class Model(torch.nn.Module):
    def __init__(self, layers):
        super().__init__()
        self.layers = torch.nn.ModuleList(layers)
        for layer in layers:
            layer.derived = layers[0].derived

    def load_weights(self, weights):
        for name, weight in weights:
            _, index, expert = name.split(".")
            param = self.layers[int(index)].weight
            param.weight_loader(param, weight, f"layers.{index}.w", expert=int(expert))


def tensors(experts=2):
    shape = LAYERS, experts, 2, 3
    values = torch.arange(float(LAYERS * experts * 6)).view(shape)
    return {
        f"layers.{i}.{e}": values[i, e] for i in range(LAYERS) for e in range(experts)
    }


def first_sync(model, sent):
    start_recording(model)
    model.load_weights(iter(sent.items()))
    assert finish_recording(model)
    model.layers[0].derived[0] = 0
    layers = stage_model(dict(model.named_modules()), True, lambda *_: None)
    return [tensor for layer in layers for tensor in layer.tensors]


def assert_routes_lead_where_the_load_did(model, staged, sent):
    planned = PlannedCopies(first_routes(staged), staged, lambda _: None)
    assert all(planned.take(name, tensor) for name, tensor in sent.items())
    for tensor, layer in zip(staged, model.layers):
        assert torch.equal(tensor.memory, layer.weight)


def test_layers_that_are_alike_are_derived_once():
    model, sent = Model([Layer() for _ in range(LAYERS)]), tensors()
    staged = first_sync(model, sent)
    assert model.layers[0].derived[0] == 2
    assert_routes_lead_where_the_load_did(model, staged, sent)


def test_layers_that_load_otherwise_are_derived_for_themselves():
    model, sent = Model([Layer(), Layer(first=1), Layer(first=1)]), tensors()
    staged = first_sync(model, sent)
    assert model.layers[0].derived[0] == 4
    assert_routes_lead_where_the_load_did(model, staged, sent)


@pytest.mark.parametrize("absent", ["layers.1.0", "layers.1.1"])
def test_layers_that_were_sent_other_tensors_are_derived_for_themselves(absent):
    model, sent = Model([Layer() for _ in range(LAYERS)]), tensors()
    del sent[absent]
    staged = first_sync(model, sent)
    assert_routes_lead_where_the_load_did(model, staged, sent)
    owed = [sum(box.numel for box in t.ledger.written) for t in staged]
    assert owed == [12, 6, 12] and all(t.ledger.complete for t in staged)


def test_tensors_that_were_sent_in_another_shape_are_derived_for_themselves():
    model, sent = Model([Layer() for _ in range(LAYERS)]), tensors()
    sent["layers.1.0"] = sent["layers.1.0"].t().contiguous().t()
    staged = first_sync(model, sent)
    assert model.layers[0].derived[0] == 6
    assert [t.ledger.missing() for t in staged] == [
        [Box((e, 0, 0), (e + 1, 2, 3)) for e in range(2)]
    ] * LAYERS


class OverlappingModel(Model):
    """Reads each tensor's first two rows, from the third tensor on its last two."""

    def load_weights(self, weights):
        for name, weight in weights:
            _, index, number = name.split(".")
            param = self.layers[int(index)].weight
            rows = weight[:2] if int(number) < 2 else weight[1:]
            param.weight_loader(param, rows, "w", expert=int(number) % 2)


def test_of_a_call_that_was_made_twice_nobody_knows_the_source():
    model = OverlappingModel([Layer() for _ in range(2)])
    names = [f"layers.0.{i}" for i in (0, 1, 2)] + [f"layers.1.{i}" for i in (0, 1, 3)]
    sent = {name: torch.arange(9.0).view(3, 3) + i for i, name in enumerate(names)}
    staged = first_sync(model, sent)
    planned = PlannedCopies(first_routes(staged), staged, lambda _: None)
    assert planned.take("layers.1.0", sent["layers.1.0"])
    assert torch.equal(staged[1].memory[0], sent["layers.1.0"][:2])
    assert not planned.take("layers.1.3", sent["layers.1.3"])


class Unwatched(torch.nn.Module):
    """A model that writes one matrix past its loader and its count of versions."""

    def __init__(self):
        super().__init__()
        for name in ("watched", "unwatched"):
            layer = torch.nn.Linear(128, 128, bias=False)
            layer.weight.weight_loader = torch.Tensor.copy_
            self.add_module(name, layer)

    @torch.no_grad()
    def load_weights(self, weights):
        for name, weight in weights:
            param = self.get_parameter(name)
            if name == "watched.weight":
                param.weight_loader(param, weight)
            else:
                param.data.copy_(weight)


def test_a_matrix_that_its_loader_was_not_given_is_owed():
    model = Unwatched()
    record_metadata_for_reloading(model)
    weights = [(name, torch.ones(128, 128)) for name, _ in model.named_parameters()]
    model.load_weights(iter(weights))
    finish_first_load(model)
    mark_inconsistent(model, "a sleep dropped the weights")
    initialize_layerwise_reload(model)
    model.load_weights(weights[:1])
    with pytest.raises(WeightSyncError, match="unwatched.weight: never sent"):
        finalize_layerwise_reload(model, None)


def by_index(param, weight):
    param.data[torch.arange(len(param))] = weight


def by_sum(param, weight):
    param.data.zero_()
    param.data.add_(weight)


def by_array(param, weight):
    param.data.numpy()[:] = weight.numpy()


@pytest.mark.parametrize("loader", [by_index, by_sum, by_array])
def test_a_loader_that_does_not_copy_is_no_loader_that_does_nothing(loader):
    model = Unwatched()
    model.watched.weight.weight_loader = loader
    record_metadata_for_reloading(model)
    model.load_weights([("watched.weight", torch.ones(128, 128))])
    initialize_layerwise_reload(model)
    model.load_weights([("watched.weight", torch.zeros(128, 128))])
    with pytest.raises(WeightSyncError, match="watched.weight: never sent"):
        finalize_layerwise_reload(model, None)
