# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Syncs by an engine that fills the layers itself, as upstream's sharded RDT does."""

import gc
from types import SimpleNamespace
from typing import Any
from weakref import ref

import pytest
import torch

from tests.checkpoints import CASES
from tests.harness.snapshot import assert_same, snapshot
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.model_loader.reload import (
    WeightSyncError,
    abort_layerwise_reload,
    finalize_layerwise_reload,
    initialize_layerwise_reload,
    mark_inconsistent,
    record_metadata_for_reloading,
    reload_status,
)
from vllm.model_executor.model_loader.reload.direct import (
    initialize_layerwise_reload as initialize_direct_reload,
)
from vllm.model_executor.model_loader.reload.layerwise import (
    _copy_and_restore_kernel_tensors,
    _place_kernel_tensors,
    finish_first_load,
)
from vllm.model_executor.model_loader.reload.meta import materialize_layer
from vllm.model_executor.model_loader.reload.registry import get_layerwise_info

# All that attention layers ask of a model's configuration.
CONFIG: Any = SimpleNamespace(dtype=torch.float32)


class Negate(QuantizeMethodBase):
    """Serves a weight of [2, 3] as its negated transpose, [3, 2]."""

    def create_weights(self, layer, *args, **kwargs):
        raise NotImplementedError

    def apply(self, layer, *args, **kwargs):
        raise NotImplementedError

    def process_weights_after_loading(self, layer):
        layer.weight = torch.nn.Parameter(-layer.weight.data.T.contiguous(), False)


class Projection(torch.nn.Module):
    """Its weight is loaded as [2, 3]."""

    weight: Any

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(2, 3), requires_grad=False)
        self.weight.weight_loader = self.load
        self.quant_method: Any = Negate()

    def load(self, param, loaded):
        param.data.copy_(loaded)


class FakeAttention(torch.nn.Module, AttentionLayerBase):
    """Derives a sum from the projection inside it."""

    total: torch.Tensor

    def __init__(self):
        super().__init__()
        self.inner = Projection()
        self.register_buffer("total", torch.zeros(()), persistent=False)

    def get_attn_backend(self):
        raise NotImplementedError

    def get_kv_cache_spec(self, vllm_config):
        return None

    def process_weights_after_loading(self, act_dtype):
        self.total.copy_(self.inner.weight.sum())


class FakeModel(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first = Projection()
        self.attention = FakeAttention()

    def load_weights(self, weights):
        params: dict[str, Any] = dict(self.named_parameters())
        for name, tensor in weights:
            params[name].weight_loader(params[name], tensor)


NAMES = ("first.weight", "attention.inner.weight")


def weights(value):
    return {name: torch.full((2, 3), float(value)) for name in NAMES}


@pytest.fixture
def model():
    """A model that serves weights of 1, loaded as a model loader does."""
    model = FakeModel()
    record_metadata_for_reloading(model)
    model.load_weights(weights(1).items())
    finish_first_load(model)
    for layer in (model.first, model.attention.inner):
        layer.quant_method.process_weights_after_loading(layer)
    model.attention.process_weights_after_loading(torch.float32)
    return model


def fill(layer, weight):
    """What the engine does for one layer of a sync."""
    info = get_layerwise_info(layer)
    assert info.can_load()
    materialize_layer(layer, info)
    layer.weight.data.copy_(weight)
    layer.quant_method.process_weights_after_loading(layer)
    _copy_and_restore_kernel_tensors(layer, info)
    info.reset()


def assert_serves(layer, value):
    assert torch.equal(layer.weight, torch.full((3, 2), -float(value)))


def test_filled_layers_serve_at_their_addresses(model):
    served = {name: param.data_ptr() for name, param in model.named_parameters()}
    initialize_direct_reload(model)
    assert all(param.is_meta for param in model.parameters())
    assert reload_status(model).state == "updating"
    fill(model.first, weights(2)["first.weight"])
    fill(model.attention.inner, weights(3)["first.weight"])
    finalize_layerwise_reload(model, CONFIG)
    assert_serves(model.first, 2)
    assert_serves(model.attention.inner, 3)
    assert model.attention.total == -18
    assert served == {name: p.data_ptr() for name, p in model.named_parameters()}
    status = reload_status(model)
    assert (status.state, status.version) == ("serving", 1)
    assert status.unchecked == "layers that the engine filled itself"


def test_layers_left_out_keep_what_served(model):
    initialize_direct_reload(model)
    fill(model.first, weights(2)["first.weight"])
    finalize_layerwise_reload(model, CONFIG)
    assert_serves(model.first, 2)
    assert_serves(model.attention.inner, 1)
    assert "total" in model.attention._non_persistent_buffers_set


def dry_run(model):
    """Open a sync, hang a loader on each parameter and put everything back."""
    initialize_direct_reload(model)
    for param in model.parameters():
        param.weight_loader = lambda *_: model
    for layer in model.modules():
        info = get_layerwise_info(layer)
        _place_kernel_tensors(layer, info)
        info.reset()


def test_dry_run_leaves_no_trace(model):
    before = dict(model.named_parameters())
    dry_run(model)
    after = dict(model.named_parameters())
    assert before.keys() == after.keys()
    assert all(after[name] is before[name] for name in before)
    assert reload_status(model).state == "serving"
    initialize_direct_reload(model)
    assert model.first.weight.weight_loader.__self__ is model.first
    fill(model.first, weights(2)["first.weight"])
    finalize_layerwise_reload(model, CONFIG)
    assert_serves(model.first, 2)


def test_dry_run_keeps_no_model_alive():
    model = FakeModel()
    record_metadata_for_reloading(model)
    dry_run(model)
    gone = ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_aborted_before_a_layer_was_filled(model):
    initialize_direct_reload(model)
    materialize_layer(model.first, get_layerwise_info(model.first))
    abort_layerwise_reload(model, "the trainer died")
    assert_serves(model.first, 1)
    assert reload_status(model).state == "serving"


def test_aborted_after_a_layer_was_filled_is_fenced(model):
    initialize_direct_reload(model)
    fill(model.first, weights(2)["first.weight"])
    abort_layerwise_reload(model, "the trainer died")
    assert_serves(model.attention.inner, 1)
    status = reload_status(model)
    assert status.state == "inconsistent" and status.fenced
    assert "the trainer died" in status.detail


def test_fence_is_lifted_by_a_complete_sync_only(model):
    mark_inconsistent(model, "a level 2 sleep dropped the weights")
    initialize_direct_reload(model)
    fill(model.first, weights(2)["first.weight"])
    with pytest.raises(WeightSyncError) as raised:
        finalize_layerwise_reload(model, CONFIG)
    named = [(f.layer, f.parameter) for f in raised.value.missing]
    assert named == [("attention.inner", "weight")]
    assert reload_status(model).fenced
    initialize_direct_reload(model)
    for layer in (model.first, model.attention.inner):
        fill(layer, weights(2)["first.weight"])
    finalize_layerwise_reload(model, CONFIG)
    assert reload_status(model).state == "serving"


def test_tied_parameter_is_filled_once():
    model = FakeModel()
    model.attention.inner.weight = model.first.weight
    for layer in (model.first, model.attention.inner):
        layer.quant_method = None
    record_metadata_for_reloading(model)
    finish_first_load(model)
    mark_inconsistent(model, "a level 2 sleep dropped the weights")
    initialize_direct_reload(model)
    info = get_layerwise_info(model.first)
    materialize_layer(model.first, info)
    model.first.weight.data.fill_(2)
    _copy_and_restore_kernel_tensors(model.first, info)
    info.reset()
    finalize_layerwise_reload(model, CONFIG)
    assert model.first.weight is model.attention.inner.weight
    assert torch.equal(model.first.weight, torch.full((2, 3), 2.0))
    assert reload_status(model).state == "serving"


def test_refused_while_another_kind_of_sync_is_open(model):
    initialize_layerwise_reload(model)
    with pytest.raises(WeightSyncError, match="another weight sync is open"):
        initialize_direct_reload(model)
    model.load_weights(weights(2).items())
    finalize_layerwise_reload(model, CONFIG)
    assert_serves(model.first, 2)


def test_another_start_aborts_it(model):
    initialize_direct_reload(model)
    initialize_layerwise_reload(model)
    assert_serves(model.first, 1)
    model.load_weights(weights(2).items())
    finalize_layerwise_reload(model, CONFIG)
    assert_serves(model.attention.inner, 2)
    initialize_direct_reload(model)
    initialize_direct_reload(model)
    finalize_layerwise_reload(model, CONFIG)
    assert_serves(model.first, 2)


@pytest.mark.parametrize("name", ["llama-fp8_block", "qwen3_moe-fp8_block"])
def test_sharded_rdt_equals_cold_load(name, make_model, cold_load, nan_memory):
    """Its dry run and its replay, with local tensors in the place of what it pulls."""
    package = "vllm.distributed.weight_transfer"
    rdt = pytest.importorskip(f"{package}.sharded_rdt_engine")
    case = CASES[name]
    checkpoint = dict(case.tensors(2))
    model, vllm_config = built = make_model(case, seed=1)
    engine = object.__new__(rdt.ShardedRDTWeightTransferEngine)
    engine.model, engine.device = model, torch.device("cpu")
    engine._name_to_plan, engine._live_names = {}, set()
    engine.model_config = vllm_config.model_config
    engine.drain_pending = lambda: None
    before = snapshot(model)
    with built.worker_context():
        engine._bake(
            rdt.ShardedRDTWeightTransferInitInfo(
                names=list(checkpoint),
                dtype_names=[str(t.dtype)[6:] for t in checkpoint.values()],
                shapes=[list(t.shape) for t in checkpoint.values()],
            )
        )
        assert_same(snapshot(model), before)
        assert engine._name_to_plan.keys() == checkpoint.keys()
        engine.start_weight_update()
        for scatters in {id(s): s for s in engine._name_to_plan.values()}.values():
            replay(scatters, checkpoint)
        engine.finish_weight_update()
    assert_same(on_any_device(snapshot(model)), on_any_device(cold_load(case, 2)))
    assert reload_status(model).version == 1


def on_any_device(served):
    """Leave out what oneDNN packed: the engine processes layers that serve, and it
    needs CUDA, where nothing is packed."""
    return {path: value for path, value in served.items() if "cpu_linear" not in path}


def replay(scatters, checkpoint):
    """Fill one layer from the slices that the dry run recorded."""
    layer = scatters[0].layer
    info = get_layerwise_info(layer)
    materialize_layer(layer, info)
    for scatter in scatters:
        source, operations = scatter.src
        tensor = checkpoint[source]
        for operation, args, kwargs in operations:
            tensor = getattr(tensor, operation)(*args, **dict(kwargs))
        target = getattr(layer, scatter.param_name).data
        target.as_strided(scatter.shape, scatter.stride, scatter.offset).copy_(tensor)
    if isinstance(getattr(layer, "quant_method", None), QuantizeMethodBase):
        layer.quant_method.process_weights_after_loading(layer)
    _copy_and_restore_kernel_tensors(layer, info)
    info.reset()
