# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""What a sync needs besides the weights that serve."""

import gc
import random
from collections.abc import Iterable, Iterator
from dataclasses import replace

import pytest
import torch

from tests.checkpoints import CASES, chunks
from tests.harness.memory import allocated
from tests.harness.models import Built
from vllm.model_executor.model_loader.reload import (
    finalize_layerwise_reload,
    initialize_layerwise_reload,
    transaction,
)
from vllm.model_executor.model_loader.reload.layerwise import take_reports

CASE = CASES["qwen3_moe-fp8_block"]
# Layers so large that what has a fixed size does not count.
LARGE = replace(
    CASE,
    sizes=replace(CASE.sizes, layers=3, experts=16, hidden=512, intermediate=512),
)


@pytest.fixture
def no_collection() -> Iterator[None]:
    """What only the garbage collector would free is in use as far as anybody knows."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


class Trainer:
    """Sends one checkpoint, as often as it is called, through a reused bucket.

    Attributes:
        model: what they are sent to.
        tensors: names and tensors in the order in which they are sent.
        layers: bytes of each layer's own parameters.

    """

    def __init__(self, built: Built):
        self.model = built.model
        self._built = built
        self._bucket = torch.empty(1 << 21, dtype=torch.uint8)
        self.tensors = list(LARGE.tensors(2))
        self.layers = [
            sum(param.nbytes for param in layer.parameters(recurse=False))
            for layer in built.model.modules()
        ]

    def __call__(self) -> None:
        self.send(chunks(self.tensors, len(self._bucket), self._bucket))

    def send(self, parts: Iterable[list[tuple[str, torch.Tensor]]]) -> None:
        """Send these parts of a checkpoint."""
        model, vllm_config = self._built
        with self._built.worker_context():
            initialize_layerwise_reload(model)
            for part in parts:
                model.load_weights(part)
            finalize_layerwise_reload(model, vllm_config.model_config)


@pytest.fixture
def sync(no_packing, make_model) -> Trainer:
    return Trainer(make_model(LARGE, seed=1))


@pytest.mark.parametrize("kind", ["first", "later"])
def test_in_order_a_sync_needs_one_layer(kind, sync, no_collection, monkeypatch):
    monkeypatch.setenv("VLLM_RELOAD_COMMIT", "layer")
    if kind == "later":
        sync()
    with allocated() as count:
        sync()
    assert count.peak <= 1.1 * max(sync.layers)
    assert count.left <= 0.05 * max(sync.layers)


def test_a_list_may_begin_with_the_end_of_a_layer(sync, no_collection, monkeypatch):
    monkeypatch.setenv("VLLM_RELOAD_COMMIT", "layer")
    last = "model.layers.0.mlp.experts.15.down_proj.weight_scale_inv"
    end = [name for name, _ in sync.tensors].index(last)
    parts = sync.tensors[:end], sync.tensors[end:]
    sync.send(parts)
    with allocated() as count:
        sync.send(parts)
    assert count.peak <= 1.1 * max(sync.layers)


@pytest.mark.parametrize("policy", ["layer", "model"])
def test_in_any_order_a_sync_needs_one_model(policy, sync, no_collection, monkeypatch):
    monkeypatch.setenv("VLLM_RELOAD_COMMIT", policy)
    random.Random(0).shuffle(sync.tensors)
    with allocated() as count:
        sync()
    assert count.peak <= 1.1 * sum(sync.layers)
    assert count.left <= 0.05 * max(sync.layers)


def test_nothing_grows_from_sync_to_sync(sync, monkeypatch):
    # pytest keeps each line that a sync logs.
    monkeypatch.setattr(transaction.logger, "disabled", True)
    left = []
    for _ in range(10):
        sync()
        take_reports(sync.model)
        gc.collect()
        left.append(len(gc.get_objects()))
    # Fewer than one a sync: a process has other things to remember now and then.
    assert left[-1] - left[1] < len(left) - 2
