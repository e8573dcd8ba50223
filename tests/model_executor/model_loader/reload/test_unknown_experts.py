# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Tensors for experts that a model does not have are refused by name."""

from types import SimpleNamespace

import pytest
from torch import nn

from tests.checkpoints import CASES
from tests.harness.snapshot import assert_same, snapshot
from vllm.model_executor.model_loader.reload import (
    WeightSyncError,
    abort_layerwise_reload,
    initialize_layerwise_reload,
)
from vllm.model_executor.model_loader.reload.unknown_experts import unknown_experts

CASE = CASES["qwen3_moe-fp8_block"]
KNOWN = "model.layers.0.mlp.experts.0.down_proj.weight"
UNKNOWN = "model.layers.0.mlp.experts.8.down_proj.weight"


class Mapper:
    """As a model's own, whose modules have other names than its checkpoint."""

    def apply_list(self, names: list[str]) -> list[str]:
        return [name.removeprefix("wrapped.") for name in names]


def model_with(experts: int) -> nn.Module:
    model = nn.ModuleDict({"experts": nn.Identity()})
    model["experts"].moe_config = SimpleNamespace(num_logical_experts=experts)
    return model


@pytest.mark.parametrize(
    "name, found",
    [
        ("experts.1.down_proj.weight", False),
        ("experts.2.down_proj.weight", True),
        ("experts.w2_weight", False),
        ("layers.7.norm.weight", False),
        ("others.9.weight", False),
    ],
)
def test_experts_are_counted_by_layer(name, found):
    assert bool(unknown_experts(model_with(2), [name])) is found


def test_a_finding_names_all_of_it():
    name = "experts.5.down_proj.weight"
    (finding,) = unknown_experts(model_with(2), [name])
    assert (finding.layer, finding.parameter, finding.expert) == ("experts", name, 5)
    assert "the layer has 2" in finding.detail


def test_names_are_taken_as_the_model_takes_them():
    model = model_with(2)
    model.hf_to_vllm_mapper = Mapper()
    assert unknown_experts(model, ["wrapped.experts.2.weight"])


def test_a_sync_refuses_it(make_model):
    model, _ = built = make_model(CASE, 1)
    before = snapshot(model)
    tensors = dict(CASE.tensors(2))
    with built.worker_context():
        initialize_layerwise_reload(model)
        with pytest.raises(WeightSyncError, match="expert 8: no such expert"):
            model.load_weights([(UNKNOWN, tensors[KNOWN])])
        abort_layerwise_reload(model, "refused")
    assert_same(snapshot(model), before)
