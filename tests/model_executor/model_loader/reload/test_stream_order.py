# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""What a sync's calls do is done in their order, on whichever streams they come.

Streams are stand-ins: each has a clock of what was queued and what that waits for.
"""

from dataclasses import dataclass, field

import pytest
import torch

from vllm.model_executor.model_loader.reload import (
    finalize_layerwise_reload,
    initialize_layerwise_reload,
    record_metadata_for_reloading,
)
from vllm.model_executor.model_loader.reload.stream_order import StreamOrder


@dataclass
class Stream:
    """A stream that knows which work comes before what is queued next."""

    stream_id: int
    before: set[str] = field(default_factory=set)

    def wait_stream(self, other: "Stream") -> None:
        self.before |= other.before

    def queue(self, work: str) -> set[str]:
        """Queue work, and return all that is done before it."""
        before = set(self.before)
        self.before.add(work)
        return before


class Device:
    """Streams by name, of which one is current."""

    def __init__(self):
        self.streams = {name: Stream(i) for i, name in enumerate(("own", "a", "b"))}
        self.current = "own"
        self.order = StreamOrder(lambda: self.streams[self.current])

    def call(self, stream: str, work: str) -> set[str]:
        self.current = stream
        with self.order.call():
            return self.streams[stream].queue(work)


@pytest.fixture
def device() -> Device:
    return Device()


def test_a_call_comes_after_those_before_it(device):
    assert device.call("a", "chunk 1") == set()
    assert device.call("b", "chunk 2") == {"chunk 1"}
    assert device.call("a", "chunk 3") == {"chunk 1", "chunk 2"}
    assert device.call("own", "finish") == {"chunk 1", "chunk 2", "chunk 3"}


def test_memory_that_a_call_let_go_is_not_written_before_it_was_read(device):
    device.call("a", "stage")
    device.call("b", "commit")
    assert "commit" in device.streams["a"].queue("a buffer in the memory of staging")


def test_steps_of_the_model_see_all_of_a_commit_or_nothing(device):
    device.streams["own"].queue("step 1")
    assert device.call("a", "commit") == {"step 1"}
    assert "commit" in device.streams["own"].queue("step 2")


def test_a_call_that_fails_is_waited_for(device):
    with pytest.raises(ValueError), device.order.call():
        device.call("a", "commit")
        raise ValueError
    assert "commit" in device.streams["own"].queue("step")


class Model(torch.nn.Module):
    """Queues work on its device's current stream, as loading and its hook do.

    Attributes:
        before: of each, what is done before it.

    """

    def __init__(self, device: Device):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(2, 2), requires_grad=False)
        self.device = device
        self.before: dict[str, set[str]] = {}

    def load_weights(self, weights) -> None:
        for name, tensor in weights:
            self.weight.data.copy_(tensor)
            self._queue(name)

    def process_weights_after_loading(self) -> None:
        self._queue("commit")

    def _queue(self, work: str) -> None:
        stream = self.device.streams[self.device.current]
        self.before[work] = stream.queue(work)


def test_a_sync_does_its_calls_in_order(device, monkeypatch):
    monkeypatch.setattr(StreamOrder, "on", lambda devices: device.order)
    monkeypatch.setenv("VLLM_RELOAD_COMMIT", "model")
    model = Model(device)
    record_metadata_for_reloading(model)
    initialize_layerwise_reload(model)
    for stream in ("a", "b"):
        device.current = stream
        model.load_weights([(stream, torch.ones(2, 2))])
    device.current = "own"
    finalize_layerwise_reload(model, None)
    assert model.before == {"a": set(), "b": {"a"}, "commit": {"a", "b"}}


def test_a_cpu_has_no_streams():
    with StreamOrder.on([torch.device("cpu")]).call():
        pass


class Pair(torch.nn.Module):
    """A layer of two tensors."""

    def __init__(self, device: str):
        super().__init__()
        for name in ("first", "second"):
            param = torch.nn.Parameter(torch.zeros(256, 256, device=device), False)
            self.register_parameter(name, param)

    def load_weights(self, weights) -> None:
        for name, tensor in weights:
            getattr(self, name).data.copy_(tensor)


def keep_busy(device: str) -> None:
    """Queue work that takes longer than Python needs for a sync."""
    values = torch.ones(8192, 8192, device=device)
    for _ in range(30):
        values = values @ values


@pytest.mark.skipif(not torch.accelerator.is_available(), reason="a CPU has no streams")
def test_a_commit_waits_for_what_another_stream_has_yet_to_stage():
    accelerator = torch.accelerator.current_accelerator()
    assert accelerator is not None
    device = accelerator.type
    model = Pair(device)
    with accelerator:
        record_metadata_for_reloading(model)
    streams = [torch.Stream(device=device) for _ in range(2)]
    for value in (1.0, 2.0, 3.0):  # of which the first is no sync
        sent = torch.full((256, 256), value, device=device)
        torch.accelerator.synchronize()
        if value > 1:
            initialize_layerwise_reload(model)
        with streams[0]:
            keep_busy(device)
            model.load_weights([("first", sent)])
        with streams[1]:
            model.load_weights([("second", sent)])
        if value > 1:
            finalize_layerwise_reload(model, None)
        served = model.first.clone(), model.second.clone()
        torch.accelerator.synchronize()
        assert value == 1 or all(tensor.eq(value).all() for tensor in served)
