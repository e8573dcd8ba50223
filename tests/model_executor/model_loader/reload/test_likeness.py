# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Layers are alike if only their names tell them apart."""

from copy import deepcopy
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from vllm.model_executor.model_loader.reload.likeness import Likeness


def alike(one, other) -> bool:
    return Likeness("model.layers.0.mlp", "model.layers.1.mlp")(one, other)


class Layer:
    def __init__(self, index, **more):
        self.name = f"model.layers.{index}.mlp"
        self.map = torch.tensor([0, 1, -1])
        self.weight = torch.full((2, 2), float(index))
        self.more = more
        self.itself = self

    def load(self, param, weight):
        pass


def shifted_by(offset):
    return lambda index: index + offset


@pytest.mark.parametrize(
    "one, other",
    [
        ("layers.0.mlp.w13_weight", "layers.1.mlp.w13_weight"),
        (Layer(0), Layer(1)),
        (Layer(0).load, Layer(1).load),
        (partial(Layer(0).load, 1), partial(Layer(1).load, 1)),
        (shifted_by(1), shifted_by(1)),
        ([torch.ones(2), (1, {"a": None})], [torch.zeros(2), (1, {"a": None})]),
    ],
)
def test_names_and_weights_may_differ(one, other):
    assert alike(one, other)


def with_attribute(tensor, **attributes):
    vars(tensor).update(attributes)
    return tensor


@pytest.mark.parametrize(
    "one, other",
    [
        ("layers.0.mlp.w13_weight", "layers.1.mlp.w2_weight"),
        ("layers.0.mlp.w13_weight", "layers.2.mlp.w13_weight"),
        ("layers.0", "layers.1.mlp"),
        ("layers.0.mlp.experts.0.weight", "layers.1.mlp.experts.1.weight"),
        (1, 2),
        (1, True),
        ([1], [1, 2]),
        ({"a": 1}, {"b": 1}),
        (torch.tensor([0, 1]), torch.tensor([1, 0])),
        (torch.ones(2), torch.ones(2, dtype=torch.float16)),
        (torch.ones(2, 3), torch.ones(3, 2).t()),
        (with_attribute(torch.ones(2), dim=0), with_attribute(torch.ones(2), dim=1)),
        (shifted_by(1), shifted_by(2)),
        (shifted_by(1), lambda index: index),
        (partial(print, 1), partial(print, 2)),
        (object(), object()),
        (SimpleNamespace(a=1), SimpleNamespace(a=1, b=2)),
        (Layer(0).load, Layer(1, expert_offset=1).load),
    ],
)
def test_nothing_else_may_differ(one, other):
    assert not alike(one, other)
    assert alike(one, deepcopy(one)) or type(one) is object


def test_what_was_found_different_stays_so():
    compare = Likeness("a", "b")
    one, other = SimpleNamespace(inner=[1, 2]), SimpleNamespace(inner=[1, 3])
    assert not compare(one, other)
    assert not compare(one, other)
    assert not compare(one.inner, other.inner)


def with_empty_cell():
    late: int

    def load():
        return late

    if load is None:
        late = 0
    return load


def nested_too_deep() -> list[Any]:
    nested: list[Any] = []
    for _ in range(10_000):
        nested = [nested]
    return nested


@pytest.mark.parametrize(
    "make",
    [
        lambda: SimpleNamespace(order=np.arange(3)),
        with_empty_cell,
        nested_too_deep,
    ],
)
def test_what_cannot_be_compared_is_not_alike(make):
    assert not alike(make(), make())
