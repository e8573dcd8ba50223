# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""A model is asked to load nothing only until it is known to do nothing then."""

from collections.abc import Callable, Iterable

import pytest
import torch
from torch import nn

from vllm.model_executor.model_loader.reload import (
    WeightSyncError,
    finalize_layerwise_reload,
    initialize_layerwise_reload,
    record_metadata_for_reloading,
)

Weights = Iterable[tuple[str, torch.Tensor]]
NAMES = [f"layers.{i}.weight" for i in range(4)]
LAST = "last.weight"


class Model(nn.Module):
    """Doubles what it loads last, which therefore has no route.

    Attributes:
        at_the_end: what else each call does.
        given: how many tensors each call was given.

    """

    def __init__(self, at_the_end: Callable[["Model"], None]):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4, bias=False) for _ in NAMES)
        self.last = nn.Linear(4, 4, bias=False)
        self.tied = nn.Linear(4, 4, bias=False)
        self.at_the_end = at_the_end
        self.given: list[int] = []

    def load_weights(self, weights: Weights) -> set[str]:
        params = dict(self.named_parameters())
        loaded = set()
        for name, tensor in weights:
            params[name].data.copy_(tensor * 2 if name == LAST else tensor)
            loaded.add(name)
        self.at_the_end(self)
        self.given.append(len(loaded))
        return loaded


def nothing(model: Model) -> None:
    pass


def tie(model: Model) -> None:
    model.tied.weight.data.copy_(model.layers[3].weight.data)


def sync(model: Model, value: float, chunks: list[list[str]]) -> list[set[str]]:
    """Send matrices of this value, and return what each call has returned."""
    model.given.clear()
    initialize_layerwise_reload(model)
    sent = [[(name, torch.full((4, 4), value)) for name in names] for names in chunks]
    loaded = [model.load_weights(chunk) for chunk in sent]
    finalize_layerwise_reload(model, None)
    return loaded


@pytest.fixture
def synced(monkeypatch):
    """Makes models that had a sync, so that tensors have their routes."""
    monkeypatch.setenv("VLLM_RELOAD_PLAN", "1")
    monkeypatch.setenv("VLLM_RELOAD_COMMIT", "model")

    def build(at_the_end: Callable[[Model], None]) -> Model:
        model = Model(at_the_end).requires_grad_(False)
        record_metadata_for_reloading(model)
        sync(model, 0.0, [[*NAMES, LAST, "tied.weight"]])
        return model

    return build


def test_a_model_that_does_nothing_is_asked_once(synced):
    model = synced(nothing)
    loaded = sync(model, 1.0, [[name] for name in NAMES])
    assert model.given == [0]
    assert loaded == [set(NAMES[: count + 1]) for count in range(4)]
    assert all(layer.weight.eq(1).all() for layer in model.layers)


def test_it_is_asked_again_once_it_was_given_weights(synced):
    model = synced(nothing)
    first, second, third, fourth = NAMES
    sync(model, 1.0, [[first], [second], [LAST], [third], [fourth]])
    assert model.given == [0, 1, 0]
    assert model.last.weight.eq(2).all()
    assert all(layer.weight.eq(1).all() for layer in model.layers)


def test_a_model_that_writes_is_asked_each_time(synced):
    model = synced(tie)
    sync(model, 1.0, [[name] for name in NAMES])
    assert model.given == [0, 0, 0, 0]
    assert model.tied.weight.eq(1).all()


def test_what_is_made_of_a_tensor_that_was_not_sent_is_not_served(synced):
    model = synced(tie)
    with pytest.raises(WeightSyncError, match=r"layers.3.weight: never sent"):
        sync(model, 1.0, [NAMES[:1]])
    assert model.tied.weight.eq(0).all()


class Collecting(Model):
    """Looks at all of a chunk before it loads any of it."""

    def load_weights(self, weights: Weights) -> set[str]:
        return super().load_weights(list(weights))


def test_a_model_that_collects_its_weights_loads_them_in_each_sync():
    model = Collecting(nothing).requires_grad_(False)
    record_metadata_for_reloading(model)
    for value in (0.0, 1.0, 2.0):
        sync(model, value, [NAMES])
        assert all(layer.weight.eq(value).all() for layer in model.layers)


class Tying(Model):
    """Ties a matrix to another unless it was given that one."""

    def load_weights(self, weights: Weights) -> set[str]:
        loaded = super().load_weights(weights)
        if "tied.weight" not in loaded:
            tie(self)
        return loaded


def test_what_came_past_the_model_is_not_written_over(monkeypatch):
    monkeypatch.setenv("VLLM_RELOAD_COMMIT", "model")
    model = Tying(nothing).requires_grad_(False)
    record_metadata_for_reloading(model)
    both = [[*NAMES, LAST, "tied.weight"]]
    sync(model, 1.0, both)
    with pytest.raises(WeightSyncError, match="tied.weight: .* VLLM_RELOAD_PLAN=0"):
        sync(model, 2.0, both)
    assert model.tied.weight.eq(1).all()
    monkeypatch.setenv("VLLM_RELOAD_PLAN", "0")
    sync(model, 2.0, both)
    assert model.tied.weight.eq(2).all()
