# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Layers are processed in a sync as a cold load processes them."""

import gc
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.harness.memory import allocated
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.model_loader.reload import (
    WeightSyncError,
    finalize_layerwise_reload,
    initialize_layerwise_reload,
    record_metadata_for_reloading,
)
from vllm.model_executor.model_loader.reload.layerwise import (
    finish_first_load,
    initialize_online_processing,
    prepare_layerwise_reload,
)
from vllm.utils.torch_utils import set_default_torch_dtype

DTYPE = torch.bfloat16
CONFIG: Any = SimpleNamespace(dtype=DTYPE)


class Projection(torch.nn.Module):
    weight: Any

    def __init__(self, *shape: int):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(shape), requires_grad=False)
        self.weight.weight_loader = lambda param, loaded: param.data.copy_(loaded)


class Implementation:
    """Packs the projection that it was given, as latent attention with AMX does."""

    packed: torch.Tensor

    def __init__(self, projection: Projection):
        self.projection = projection

    def process_weights_after_loading(self, act_dtype):
        self.packed = self.projection.weight.data.T.contiguous()


class PackingAttention(torch.nn.Module, AttentionLayerBase):
    """Leaves an empty parameter of the default type where it has packed one."""

    def __init__(self):
        super().__init__()
        self.projection = Projection(2, 3)
        self.impl = Implementation(self.projection)
        self.register_buffer("scale", torch.ones(()))

    def get_attn_backend(self):
        raise NotImplementedError

    def get_kv_cache_spec(self, vllm_config):
        return None

    def process_weights_after_loading(self, act_dtype):
        self.impl.process_weights_after_loading(act_dtype)
        self.projection.weight = torch.nn.Parameter(torch.empty(0), requires_grad=False)


class DerivingAttention(PackingAttention):
    """Derives a parameter, from the second time on in place, as 0.33's MLA does."""

    derived: torch.nn.Parameter

    def process_weights_after_loading(self, act_dtype):
        derived = self.projection.weight.data.T.to(act_dtype)
        if hasattr(self, "derived"):
            self.derived.data.copy_(derived)
        else:
            self.derived = torch.nn.Parameter(derived.contiguous(), False)


class Transpose(QuantizeMethodBase):
    def create_weights(self, layer, *args, **kwargs):
        raise NotImplementedError

    def apply(self, layer, *args, **kwargs):
        raise NotImplementedError

    def process_weights_after_loading(self, layer):
        layer.weight = torch.nn.Parameter(layer.weight.data.T.contiguous(), False)


class Model(torch.nn.Module):
    def __init__(self, **layers: torch.nn.Module):
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)

    def load_weights(self, weights):
        params: dict[str, Any] = dict(self.named_parameters())
        for name, tensor in weights:
            params[name].weight_loader(params[name], tensor)


def load(model: Model, value: float) -> dict[str, torch.Tensor]:
    """Load a model cold, up to its processing; return what was loaded."""
    record_metadata_for_reloading(model)
    weights = {n: torch.full_like(p, value) for n, p in model.named_parameters()}
    model.load_weights(weights.items())
    finish_first_load(model)
    return weights


def sync(model: Model, weights: dict[str, torch.Tensor]) -> None:
    initialize_layerwise_reload(model)
    model.load_weights(weights.items())
    finalize_layerwise_reload(model, CONFIG)


@pytest.mark.parametrize("policy", ["layer", "model"])
def test_attention_may_pack_a_projection_and_leave_it_empty(policy, monkeypatch):
    monkeypatch.setenv("VLLM_RELOAD_COMMIT", policy)
    with set_default_torch_dtype(DTYPE):
        model: Any = Model(attention=PackingAttention())
        loaded = load(model, 1.0)
        model.attention.process_weights_after_loading(DTYPE)
    packed, left = model.attention.impl.packed, model.attention.projection.weight
    for value in (2.0, 3.0):
        sync(model, {name: torch.full_like(t, value) for name, t in loaded.items()})
        assert torch.equal(packed, torch.full((3, 2), value, dtype=DTYPE))
    assert model.attention.impl.packed is packed
    assert model.attention.impl.projection is model.attention.projection
    assert model.attention.projection.weight is left


def test_attention_derives_nothing_in_place_before_it_is_committed(monkeypatch):
    monkeypatch.setenv("VLLM_RELOAD_COMMIT", "model")
    model: Any = Model(attention=DerivingAttention())
    loaded = load(model, 1.0)
    model.attention.process_weights_after_loading(DTYPE)
    initialize_layerwise_reload(model)
    model.load_weights((n, torch.full_like(t, 2.0)) for n, t in loaded.items())
    serving = model.attention.derived
    prepare_layerwise_reload(model, CONFIG)
    assert (serving == 1.0).all()
    finalize_layerwise_reload(model, CONFIG)
    assert model.attention.derived is serving
    assert (serving == 2.0).all()


def test_what_is_processed_takes_the_place_of_what_was_staged(monkeypatch):
    """All of a model is staged, and with it one layer twice."""
    monkeypatch.setenv("VLLM_RELOAD_COMMIT", "model")
    layers: dict[str, Any] = {f"layer{i}": Projection(1024, 512) for i in range(8)}
    for layer in layers.values():
        layer.quant_method = Transpose()
    model: Any = Model(**layers)
    loaded = load(model, 1.0)
    for layer in layers.values():
        layer.quant_method.process_weights_after_loading(layer)
    for _ in range(2):
        with allocated() as count:
            sync(model, loaded)
        assert count.peak <= 9.1 * loaded["layer0.weight"].nbytes


class Packing(Transpose):
    """Keeps the transposed weight beside the one that was loaded."""

    def process_weights_after_loading(self, layer):
        layer.packed = layer.weight.data.T.contiguous()


class TiedModel(torch.nn.Module):
    """Its output projection packs what it shares with the embedding, and has a bias."""

    def __init__(self):
        super().__init__()
        self.embedding = Projection(2, 3)
        self.output = Projection(2, 3)
        self.output.weight = self.embedding.weight
        self.output.bias = Projection(2).weight
        self.output.quant_method = Packing()

    def load_weights(self, weights):
        params = dict(self.named_parameters())
        for name, tensor in weights:
            params[name].weight_loader(params[name], tensor)


@pytest.mark.parametrize("policy", ["layer", "model"])
def test_what_shares_a_parameter_that_came_is_owed_as_a_whole(policy, monkeypatch):
    monkeypatch.setenv("VLLM_RELOAD_COMMIT", policy)
    monkeypatch.setenv("VLLM_RELOAD_ROLLBACK", "host")
    model = TiedModel()
    record_metadata_for_reloading(model)
    zeros = {n: torch.zeros(p.shape) for n, p in model.named_parameters()}
    model.load_weights(zeros.items())
    finish_first_load(model)
    model.output.quant_method.process_weights_after_loading(model.output)
    new = {name: tensor + 1 for name, tensor in zeros.items()}
    initialize_layerwise_reload(model)
    model.load_weights([("embedding.weight", new["embedding.weight"])])
    with pytest.raises(WeightSyncError, match="output.bias: never sent"):
        finalize_layerwise_reload(model, CONFIG)
    assert not model.embedding.weight.any() and not model.output.packed.any()
    initialize_layerwise_reload(model)
    model.load_weights(new.items())
    finalize_layerwise_reload(model, CONFIG)
    assert model.embedding.weight.all() and model.output.packed.all()


@pytest.mark.parametrize("exposed", [False, True])
@pytest.mark.parametrize("plan", ["0", "1"])
def test_nothing_is_loaded_into_what_serves(plan, exposed, monkeypatch):
    monkeypatch.setenv("VLLM_RELOAD_PLAN", plan)
    model = TiedModel()
    record_metadata_for_reloading(model)
    zeros = {n: torch.zeros(p.shape) for n, p in model.named_parameters()}
    model.load_weights(zeros.items())
    finish_first_load(model)
    model.output.quant_method.process_weights_after_loading(model.output)
    ones = {name: tensor + 1 for name, tensor in zeros.items()}
    initialize_layerwise_reload(model, exposed)
    model.load_weights(ones.items())
    assert model.embedding.weight.all() and model.output.packed.all()
    model.load_weights(ones.items())
    with pytest.raises(WeightSyncError, match="came again with other values"):
        model.load_weights(zeros.items())
    assert model.embedding.weight.all() and model.output.packed.all()


class OfItsOwnClass(torch.nn.Parameter):
    output_dim: int
    weight_loader: Any


class Seeing(Transpose):
    """Notes the weights that it is to process."""

    def __init__(self):
        self.seen: list[Any] = []

    def process_weights_after_loading(self, layer):
        self.seen.append(layer.weight)


def test_what_is_processed_while_loading_is_of_the_class_it_was_created_as():
    layer: Any = Projection(2, 3)
    loader = layer.weight.weight_loader
    layer.weight = OfItsOwnClass(layer.weight.data.to("meta"), requires_grad=False)
    layer.weight.weight_loader, layer.weight.output_dim = loader, 1
    layer.quant_method = Seeing()
    initialize_online_processing(layer)
    layer.weight.weight_loader(layer.weight, torch.ones(2, 3))
    (weight,) = layer.quant_method.seen
    assert weight is layer.weight and type(weight) is OfItsOwnClass
    assert weight.output_dim == 1 and weight.weight_loader is loader
    assert weight.eq(1).all()


def test_what_was_loaded_is_let_go_once_it_is_processed():
    layer: Any = Projection(256, 256)
    loader = layer.weight.weight_loader
    layer.weight = torch.nn.Parameter(layer.weight.data.to("meta"), False)
    layer.weight.weight_loader = loader
    layer.quant_method = Transpose()
    loaded = torch.ones(256, 256)
    gc.disable()
    try:
        with allocated() as count:
            initialize_online_processing(layer)
            layer.weight.weight_loader(layer.weight, loaded)
    finally:
        gc.enable()
    assert count.peak < 2.5 * loaded.nbytes
    assert count.left < 1.5 * loaded.nbytes


def test_a_loader_that_is_watched_twice_looks_like_the_original():
    """As where experts are quantised while they are loaded."""

    def load_expert(param: torch.Tensor, weight: torch.Tensor) -> None:
        param.data.copy_(weight)

    load_expert.supports_moe_loading = True  # of which models make a choice
    layer: Any = Projection(2, 3)
    layer.weight.weight_loader = load_expert
    initialize_online_processing(layer)
    record_metadata_for_reloading(layer)
    assert layer.weight.weight_loader.__name__ == "load_expert"
    assert layer.weight.weight_loader.supports_moe_loading


def test_a_model_around_one_that_was_noted_ends_its_first_load():
    """Who makes the outer model himself may have vLLM make the inner one."""
    model: Any = Model(inner=Model(projection=Projection(2, 3)))
    weight = model.inner.projection.weight
    loader = weight.weight_loader
    record_metadata_for_reloading(model.inner)
    model.load_weights([("inner.projection.weight", torch.ones(2, 3))])
    finish_first_load(model)
    assert weight.weight_loader is loader
    assert "load_weights" not in vars(model.inner)
