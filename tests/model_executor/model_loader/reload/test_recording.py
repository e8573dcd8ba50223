# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The regions that a first load's calls wrote, derived on the meta device."""

import gc
from collections.abc import Generator

import torch

from vllm.model_executor.model_loader.reload.calls import (
    CallNotes,
    LoaderCall,
    TensorSpec,
    WatchedWeights,
)
from vllm.model_executor.model_loader.reload.ledger import Box
from vllm.model_executor.model_loader.reload.recording import FirstLoad, RecordingLoader
from vllm.model_executor.model_loader.reload.view import View


def shard_loader(param, weight, shard, scale=None):
    param.data.narrow(0, 2 * shard, 2).copy_(weight)


def peeking_loader(param, weight, shard, scale=None):
    if param.data.sum().item() >= 0:
        param.data.copy_(weight)


def first_load(loader, *arguments) -> FirstLoad:
    first = FirstLoad()
    param = torch.zeros(6, 3)
    recording = RecordingLoader(loader, first, param._version).loader()
    for weight, shard in arguments:
        recording(param, weight, shard)
    return first


def boxes(loader, first: FirstLoad) -> list[Box] | None:
    return first.boxes(loader, torch.empty(6, 3, device="meta"))


def test_replayed_calls_give_the_boxes_written():
    weight = torch.ones(2, 3)
    first = first_load(shard_loader, (weight, 0), (weight, 2))
    assert boxes(shard_loader, first) == [Box((0, 0), (2, 3)), Box((4, 0), (6, 3))]


def test_loaders_that_read_values_are_unknown():
    first = first_load(peeking_loader, (torch.ones(6, 3), 0))
    assert boxes(peeking_loader, first) is None


def test_same_call_with_two_shapes_is_ambiguous():
    weight = torch.ones(2, 3)
    first = first_load(shard_loader, (weight, 0), (weight[:1], 0))
    assert first.ambiguous
    assert boxes(shard_loader, first) is None


def test_unhashable_arguments_are_ambiguous():
    first = FirstLoad()
    recording = RecordingLoader(shard_loader, first, 0).loader()
    recording(torch.zeros(6, 3), torch.ones(2, 3), 0, scale=[1])
    assert first.ambiguous and first.seen


def test_calls_of_one_loader_may_differ_in_all_but_the_weight():
    notes, weights = CallNotes(), WatchedWeights()
    param, weight, scale = torch.zeros(6, 3), torch.ones(2, 3), torch.ones(1)
    calls = [
        ((param, weight, 0), {}),
        ((param, weight, scale), {}),  # a tensor where there was none
        ((param, weight), dict(shard=0)),
        ((param, weight), dict(other=0)),
        ((), dict(loaded_weight=weight, param=param)),
        ((param, param), {}),  # nothing to load
        ((param, weight.t(), 0), {}),
    ]
    for args, kwargs in calls:
        notes.add(args, kwargs, weights)
    del calls[5]
    noted = [(call, spec) for call, spec, _, _ in notes]
    expected = [LoaderCall.split(args, kwargs) for args, kwargs in calls]
    assert noted == [(call, TensorSpec.of(weight)) for call, weight in expected]


def test_what_was_sent_and_views_of_it_are_told_apart():
    notes, weights = CallNotes(), WatchedWeights()
    whole = View((2, 2), (2, 1), 0)
    ones, column = torch.ones(2, 2), torch.ones(3, 4)[:2, :2]
    sent = [
        (ones, ones, whole),
        (ones, ones, whole),
        (torch.ones(3, 2), torch.ones(3, 2)[1:], None),  # of another tensor
        (ones, ones, whole),
        (ones, ones.t(), View((2, 2), (1, 2), 0)),
        (ones, ones, whole),
        (column, column, None),  # of a tensor that is none by itself
        (ones.double(), None, whole),
        (torch.ones(4, 2), None, View((4, 2), (2, 1), 0)),
    ]
    param = torch.zeros(6, 3)
    for n, (tensor, view, _) in enumerate(sent):
        for _, current in weights.watch([(str(n), tensor)]):
            weight = current if view is None else view
            notes.add((param, weight), dict(expert_id=n), weights)
    noted = list(notes)
    assert [view for *_, view in noted] == [view for *_, view in sent]
    assert [call.named for call, *_ in noted] == [dict(expert_id=n) for n in range(9)]
    specs = [TensorSpec.of(t if w is None else w) for t, w, _ in sent]
    assert [spec for _, spec, *_ in noted] == specs
    assert [s.spec for *_, s, _ in noted if s] == [TensorSpec.of(t) for t, *_ in sent]
    assert [s.name for *_, s, _ in noted if s] == [str(n) for n in range(9)]


def test_a_recorded_loader_looks_like_the_original():
    def loader(param, weight):
        """Load."""

    vars(loader)["supports_moe_loading"] = True
    recording = RecordingLoader(loader, FirstLoad(), 0)
    recorded = recording.loader()
    assert vars(recorded)["supports_moe_loading"] and recorded.__doc__ == "Load."
    assert RecordingLoader.of(recorded) is recording
    assert RecordingLoader.of(loader) is None


def test_the_garbage_collector_does_not_see_single_calls():
    notes, weights = CallNotes(), WatchedWeights()
    param, weight = torch.zeros(6, 3), torch.ones(2, 3)
    seen = []
    for _ in range(2):
        for name, tensor in weights.watch((str(i), weight) for i in range(100)):
            notes.add((param, tensor, f"w{name}"), dict(expert=int(name)), weights)
        gc.collect()
        seen.append(len(gc.get_objects()))
    assert len(list(notes)) == 200
    assert seen[1] - seen[0] < 10
    assert len({id(spec) for _, spec, *_ in notes}) == 1


def test_a_caller_that_stops_early_is_left_its_tensor():
    weights = WatchedWeights()
    watched = weights.watch([("a", torch.ones(1)), ("b", torch.ones(1))])
    next(watched)
    assert isinstance(watched, Generator)
    watched.close()
    assert weights.current is None


def test_written_past_its_loader_is_noticed():
    first, param = FirstLoad(), torch.zeros(6, 3)
    recording = RecordingLoader(shard_loader, first, param._version)
    param.copy_(torch.ones(6, 3))
    recording.close(param._version)
    assert first.bypassed
