# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""A model may keep a weight for a later call, and the bucket is used again meanwhile.

So does DeepSeek-V3.2 with `indexer.wk.weight`, until its scale is there.
"""

from collections.abc import Iterable

import pytest
import torch
from torch import nn

from vllm.model_executor.model_loader.reload import (
    WeightSyncError,
    abort_layerwise_reload,
    finalize_layerwise_reload,
    initialize_layerwise_reload,
    record_metadata_for_reloading,
)

Weights = Iterable[tuple[str, torch.Tensor]]
WEIGHT, SCALE, OTHER = "weight", "scale", "other"


class Model(nn.Module):
    """Loads a weight times its scale, once it has both."""

    def __init__(self):
        super().__init__()
        self.fused = nn.Linear(4, 4, bias=False)
        self.other = nn.Linear(4, 4, bias=False)
        self.pending: dict[str, torch.Tensor] = {}

    def load_weights(self, weights: Weights) -> None:
        for name, tensor in weights:
            if name == OTHER:
                self.other.weight.data.copy_(tensor)
                continue
            self.pending[name] = tensor
            if self.pending.keys() == {WEIGHT, SCALE}:
                product = self.pending[WEIGHT] * self.pending[SCALE]
                self.fused.weight.data.copy_(product)
                self.pending.clear()


def tensors(value: float) -> dict[str, torch.Tensor]:
    full = torch.full((4, 4), value)
    return {WEIGHT: full, SCALE: torch.full((4, 1), 2.0), OTHER: full + 1}


@pytest.fixture
def model() -> Model:
    model = Model()
    record_metadata_for_reloading(model)
    model.load_weights(tensors(1).items())
    return model


def send(model: Model, sent: dict[str, torch.Tensor], *names: str) -> None:
    """Send one tensor a call, each through the same bucket."""
    bucket = torch.empty(16)
    for name in names:
        lent = bucket[: sent[name].numel()].view(sent[name].shape)
        lent.copy_(sent[name])
        model.load_weights([(name, lent)])
        bucket.fill_(torch.nan)


def assert_serves(model: Model, value: float) -> None:
    assert torch.equal(model.fused.weight, torch.full((4, 4), 2 * value))
    assert torch.equal(model.other.weight, torch.full((4, 4), value + 1))


@pytest.mark.parametrize("names", [(WEIGHT, SCALE, OTHER), (SCALE, OTHER, WEIGHT)])
def test_what_is_kept_for_a_later_call_has_memory_of_its_own(model, names):
    for value in (2.0, 3.0):
        initialize_layerwise_reload(model)
        send(model, tensors(value), *names)
        finalize_layerwise_reload(model, None)
        assert_serves(model, value)


def test_what_was_sent_and_is_kept_to_the_end_is_missing(model):
    initialize_layerwise_reload(model)
    send(model, tensors(2), OTHER, WEIGHT)
    with pytest.raises(WeightSyncError, match=f"missing: {WEIGHT}: .* waits"):
        finalize_layerwise_reload(model, None)


def test_what_is_kept_of_an_aborted_sync_is_not_served(model):
    initialize_layerwise_reload(model)
    send(model, tensors(2), WEIGHT)
    abort_layerwise_reload(model, "enough was sent")
    initialize_layerwise_reload(model)
    with pytest.raises(WeightSyncError):
        send(model, tensors(3), SCALE)
    model.pending.clear()
    initialize_layerwise_reload(model)
    send(model, tensors(3), WEIGHT, SCALE, OTHER)
    finalize_layerwise_reload(model, None)
    assert_serves(model, 3)


def test_what_was_loaded_and_is_kept_too_does_not_wait(model):
    load = Model.load_weights

    def load_and_keep(self: Model, weights: Weights) -> None:
        for name, self.last in weights:
            load(self, [(name, self.last)])

    model.load_weights = load_and_keep.__get__(model)
    initialize_layerwise_reload(model)
    send(model, tensors(2), WEIGHT, SCALE, OTHER)
    finalize_layerwise_reload(model, None)
    assert_serves(model, 2)
    assert torch.equal(model.last, tensors(2)[OTHER])


def test_what_only_a_cycle_holds_is_not_kept(model):
    load = Model.load_weights

    def load_with_cycle(self: Model, weights: Weights) -> None:
        for name, tensor in weights:
            cycle = [tensor]
            cycle.append(cycle)
            load(self, [(name, tensor)])

    model.load_weights = load_with_cycle.__get__(model)
    initialize_layerwise_reload(model)
    send(model, tensors(2), WEIGHT, SCALE, OTHER)
    finalize_layerwise_reload(model, None)
    assert_serves(model, 2)
