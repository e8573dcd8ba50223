# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Operators on staged tensors reach their memory, and what they write is noted."""

import copy
import inspect

import pytest
import torch

from vllm.model_executor.model_loader.reload.calls import LoaderCall
from vllm.model_executor.model_loader.reload.checks import is_castable
from vllm.model_executor.model_loader.reload.errors import WeightSyncError
from vllm.model_executor.model_loader.reload.ledger import Box, Ledger
from vllm.model_executor.model_loader.reload.recording import FirstLoad
from vllm.model_executor.model_loader.reload.staging import (
    StagedLayer,
    StagedLoader,
    StagedTensor,
    StagingMode,
    close,
)
from vllm.model_executor.model_loader.reload.types import LayerReloadingInfo


def staged(shape=(4, 6), dtype=torch.float32, initial=None) -> StagedTensor:
    meta = torch.empty(shape, dtype=dtype, device="meta")
    ledger = Ledger([Box.whole(shape)])
    device = torch.device("cpu")
    return StagedTensor("layer", "weight", meta, device, FirstLoad(), ledger, initial)


def staged_layer(tensor: StagedTensor) -> StagedLayer:
    info = LayerReloadingInfo(({}, {}), torch.device("cpu"))
    parts = {"weight": tensor}, {}, [tensor]
    return StagedLayer("layer", torch.nn.Module(), info, *parts)


def test_a_tensor_without_memory_is_named():
    with pytest.raises(MemoryError, match=r"layer\.weight: .*alloc"):
        staged(shape=(1 << 50,)).materialize()


VALUES = torch.arange(24.0).reshape(4, 6)


def by_data(meta: torch.Tensor) -> None:
    meta.data.copy_(VALUES)


def by_narrow(meta: torch.Tensor) -> None:
    for start in (0, 3):
        meta.data.narrow(1, start, 3).copy_(VALUES[:, start : start + 3])


def by_index(meta: torch.Tensor) -> None:
    for row in range(4):
        meta[row] = VALUES[row]


def by_transpose(meta: torch.Tensor) -> None:
    meta.t().copy_(VALUES.t())


def by_device(meta: torch.Tensor) -> None:
    meta.data.copy_(VALUES.to(meta.device))


def by_element(meta: torch.Tensor) -> None:
    for index in range(24):
        meta.view(-1)[index].fill_(float(index))


@pytest.mark.parametrize(
    "load", [by_data, by_narrow, by_index, by_transpose, by_device, by_element]
)
def test_loads_are_staged(load):
    tensor = staged()
    with StagingMode([tensor]) as mode:
        load(tensor.meta)
    assert torch.equal(tensor.memory, VALUES)
    assert tensor.ledger.complete
    assert mode.take_touched() == {tensor}


def test_filling_with_one_value_is_not_loading():
    tensor = staged()
    with StagingMode([tensor]):
        tensor.meta.data.fill_(1)
    assert not tensor.written


def by_indices(meta: torch.Tensor) -> None:
    meta.data[torch.arange(4)] = VALUES


def by_group(meta: torch.Tensor) -> None:
    torch._foreach_copy_([meta.data], [VALUES])


def by_output(meta: torch.Tensor) -> None:
    torch.add(VALUES, VALUES, out=meta.data)


@pytest.mark.parametrize("load", [by_indices, by_group, by_output])
def test_what_is_loaded_by_other_operators_is_missing(load):
    tensor = staged()
    layer = staged_layer(tensor)
    assert not layer.received
    with StagingMode([tensor]):
        load(tensor.meta)
    assert layer.received and not layer.changed
    assert [finding.detail for finding in layer.missing()] == ["never sent"]
    with StagingMode([tensor]):
        by_data(tensor.meta)
    assert layer.changed and not layer.missing()


@pytest.mark.parametrize("look", [torch.Tensor.detach, lambda meta: meta.data[0]])
def test_what_was_only_looked_at_is_not_received(look):
    tensor = staged()
    layer = staged_layer(tensor)
    with StagingMode([tensor]):
        look(tensor.meta)
    assert not layer.received


def test_what_another_one_was_made_of_is_received():
    tensor, other = staged(), staged()
    layer = staged_layer(tensor)
    with StagingMode([tensor, other]):
        other.meta.data.copy_(tensor.meta)
    assert layer.received and other.written


def test_loaders_see_values_as_created():
    tensor = staged((2,), initial=torch.tensor([1.0, -1.0]))
    with StagingMode([tensor]):
        assert tensor.meta[1].item() == -1


def test_a_committed_tensor_takes_nothing_new():
    tensor = staged()
    close([tensor])
    with StagingMode([tensor]), pytest.raises(WeightSyncError, match="committed"):
        tensor.meta.copy_(VALUES)


def test_a_wrong_type_is_refused():
    tensor = staged(dtype=torch.float8_e4m3fn)
    with StagingMode([tensor]), pytest.raises(WeightSyncError, match="bfloat16"):
        tensor.meta.copy_(VALUES.bfloat16())


@pytest.mark.parametrize(
    "source, target, castable",
    [
        ("bfloat16", "float32", True),
        ("float32", "bfloat16", True),
        ("float8_e8m0fnu", "float32", True),
        ("bfloat16", "float8_e4m3fn", False),
        ("float8_e4m3fn", "bfloat16", False),
        ("float8_e5m2", "float8_e4m3fn", False),
        ("int32", "float32", False),
        ("uint8", "float8_e4m3fn", False),
        ("int32", "int64", True),
        ("int64", "int32", False),
        ("bool", "bool", True),
    ],
)
def test_types_that_may_stand_for_others(source, target, castable):
    assert is_castable(getattr(torch, source), getattr(torch, target)) == castable


def load_through(tensor: StagedTensor, first: torch.Tensor, came: torch.Tensor) -> None:
    """Load `came` where the first load was given a tensor like `first`."""
    call, _ = LoaderCall.split((tensor.meta, first), {})
    tensor.first_load.note(call, first)

    def loader(param: torch.Tensor, weight: torch.Tensor) -> None:
        param.data.copy_(weight)

    run = StagedLoader(loader, tensor, lambda self, a, k: self.load(a, k))
    with StagingMode([tensor]):
        run(tensor.meta, came)


def test_a_loader_under_staging_looks_like_the_original():
    def loader(param: torch.Tensor, weight: torch.Tensor, shard_id: str) -> None:
        pass

    loader.supports_moe_loading = True
    run = StagedLoader(loader, staged(), lambda *_: None)
    assert run == loader and run.__name__ == "loader" and run.supports_moe_loading
    assert [*inspect.signature(run).parameters] == ["param", "weight", "shard_id"]
    assert not hasattr(run, "is_something_else")
    assert copy.copy(run) == loader  # which asks an object without attributes


def test_another_shape_is_refused():
    with pytest.raises(WeightSyncError, match=r"expected \[4, 6\].*got \[6\]"):
        load_through(staged(), VALUES, VALUES[0])


def test_a_scalar_may_have_any_shape():
    tensor = staged((1,))
    load_through(tensor, torch.ones(()), torch.full((1,), 2.0))
    assert tensor.memory is not None and tensor.memory.tolist() == [2]


def test_one_element_for_a_vector_is_refused():
    with pytest.raises(WeightSyncError):
        load_through(staged((4,)), torch.ones(4), torch.ones(1))


def test_memory_is_on_the_tensors_device_whatever_the_default_is():
    tensor = staged()
    tensor.device = torch.device("meta")
    with torch._C.DisableTorchFunction():  # the default device is a mode of this kind
        assert tensor.materialize().device == tensor.device
