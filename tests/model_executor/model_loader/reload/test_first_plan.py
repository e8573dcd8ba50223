# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The first sync takes the ways of the cold load, where it is sure of them."""

import pytest
import torch

from vllm.model_executor.model_loader.reload.first_load import (
    finish_recording,
    start_recording,
)
from vllm.model_executor.model_loader.reload.first_plan import first_routes
from vllm.model_executor.model_loader.reload.planned import PlannedCopies
from vllm.model_executor.model_loader.reload.staging import StagedTensor
from vllm.model_executor.model_loader.reload.staging_area import stage_model

TENSOR = torch.arange(24.0).view(4, 6)


def load(param, weight, start=0):
    param.data.narrow(0, start, len(weight)).copy_(weight)


class Model(torch.nn.Module):
    """A model of one parameter, [4, 6], that is loaded by a function."""

    def __init__(self, loading, loader=load):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(4, 6), requires_grad=False)
        self.weight.weight_loader = loader
        self._loading = loading

    def load_weights(self, weights):
        self._loading(self.weight, weights)


def staged_after(model: torch.nn.Module, **tensors: torch.Tensor) -> list[StagedTensor]:
    """The model's tensors in the first sync after a load of `tensors`."""
    start_recording(model)
    model.load_weights(iter(tensors.items()))
    assert finish_recording(model)
    assert "load_weights" not in vars(model)
    layers = stage_model(dict(model.named_modules()), True, lambda *_: None)
    return [tensor for layer in layers for tensor in layer.tensors]


def whole(param, weights):
    for _, weight in weights:
        param.weight_loader(param, weight)


def by_keyword(param, weights):
    for _, weight in weights:
        param.weight_loader(param=param, weight=weight)


def transposed(param, weights):
    for _, weight in weights:
        param.weight_loader(param, weight.view(6, 4).t())


def halves(param, weights):
    for _, weight in weights:
        for start in (0, 2):
            param.weight_loader(param, weight.narrow(0, 2 - start, 2), start=start)


@pytest.mark.parametrize("loading", [whole, by_keyword, transposed, halves])
def test_a_route_is_what_the_first_load_did(loading):
    model = Model(loading)
    staged = staged_after(model, a=TENSOR)
    routes = first_routes(staged)
    assert PlannedCopies(routes, staged, lambda _: None).take("a", TENSOR)
    assert staged[0].ledger.complete
    assert torch.equal(staged[0].memory, model.weight)


def changed_in_the_loader(param, weight):
    param.data.copy_(weight * 2)


def read_in_the_loader(param, weight):
    param.data.copy_(weight if weight.max() > 0 else -weight)


def doubled_in_place(param, weight):
    param.data.copy_(weight)
    param.data.mul_(2)


def padded(param, weight):
    param.data[: len(weight)].copy_(weight)
    param.data[len(weight) :].fill_(0)


def test_padding_that_is_none_does_not_matter():
    assert first_routes(staged_after(Model(whole, padded), a=TENSOR))
    assert not first_routes(staged_after(Model(whole, padded), a=TENSOR[:3]))


@pytest.mark.parametrize(
    "loader", [changed_in_the_loader, read_in_the_loader, doubled_in_place]
)
def test_what_a_loader_did_more_than_copy_has_no_route(loader):
    assert not first_routes(staged_after(Model(whole, loader), a=TENSOR))


def by_row(param, weights):
    for _, weight in weights:
        param.weight_loader(param, weight if weight.dim() > 1 else weight[None])


def overlapping(param, weights):
    for start, (_, weight) in enumerate(weights):
        param.weight_loader(param, weight, start=start)


def test_tensors_that_write_in_part_the_same_have_no_route():
    tensors = dict(a=TENSOR[:3], b=TENSOR[:3] + 1)
    assert not first_routes(staged_after(Model(overlapping), **tensors))


@pytest.mark.parametrize(
    "tensors",
    [
        dict(a=TENSOR, b=TENSOR + 1),
        dict(a=TENSOR, strided=TENSOR.t().contiguous().t()),
        dict(vector=torch.arange(6.0)),
    ],
)
def test_what_is_not_sure_has_no_route(tensors):
    assert not first_routes(staged_after(Model(by_row), **tensors))


def one_after_the_other(param, weights):
    for start, (_, weight) in zip((0, 2), weights):
        param.weight_loader(param, weight, start=start)


def test_a_name_that_was_sent_twice_has_no_route():
    bucket = TENSOR[:2].clone()
    model = Model(one_after_the_other)
    start_recording(model)
    model.load_weights(iter([("a", bucket), ("a", bucket)]))
    finish_recording(model)
    layers = stage_model(dict(model.named_modules()), True, lambda *_: None)
    assert not first_routes([tensor for layer in layers for tensor in layer.tensors])


def kept(param, weights):
    for _, weight in list(weights):
        param.weight_loader(param, weight)


def changed(param, weights):
    for _, weight in weights:
        param.weight_loader(param, weight + 1)


def changed_in_place(param, weights):
    for _, weight in weights:
        weight[1:].add_(1)
        param.weight_loader(param, weight)


@pytest.mark.parametrize("loading", [kept, changed, changed_in_place])
def test_nothing_has_a_route_if_loaders_were_given_something_else(loading):
    assert not first_routes(staged_after(Model(loading), a=TENSOR.clone()))


class Outer(torch.nn.Module):
    """A model around a model, to which it passes shorter names."""

    def __init__(self, inner: Model):
        super().__init__()
        start_recording(inner)
        self.inner = inner

    def load_weights(self, weights):
        self.inner.load_weights((n.removeprefix("inner."), t) for n, t in weights)


def test_a_model_inside_a_model_goes_by_the_names_of_the_checkpoint():
    staged = staged_after(Outer(Model(whole)), **{"inner.a": TENSOR})
    assert list(first_routes(staged)) == ["inner.a"]
