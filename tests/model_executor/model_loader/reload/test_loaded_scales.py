# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Bad scales in a checkpoint: which are refused when it is loaded, and how."""

import logging
import math

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.checkpoints import CASES, write_checkpoint
from tests.harness.models import build
from vllm.logger import init_logger
from vllm.model_executor.model_loader import loaded_scales
from vllm.model_executor.model_loader.loaded_scales import check_loaded_scales
from vllm.model_executor.model_loader.reload import WeightSyncError, mark_inconsistent

FP8 = torch.float8_e4m3fn
UNSET = torch.finfo(torch.float32).min


def layer(**tensors: torch.Tensor) -> torch.nn.Module:
    module = torch.nn.Module()
    for name, tensor in tensors.items():
        module.register_parameter(name, torch.nn.Parameter(tensor, requires_grad=False))
    return module


def moe() -> torch.nn.Module:
    """A model of one layer: 4 experts, whose w13 has 2 x 2 blocks of 128 x 128."""
    weight = torch.ones(4, 256, 256).to(FP8)
    experts = layer(w13_weight=weight, w13_weight_scale_inv=torch.ones(4, 2, 2))
    return torch.nn.ModuleDict({"experts": experts})


@pytest.fixture(autouse=True)
def mode(monkeypatch):
    monkeypatch.setenv("VLLM_MOE_SCALE_CHECK", "raise")


def refused(**tensors: torch.Tensor) -> bool:
    try:
        check_loaded_scales(layer(**tensors))
    except WeightSyncError:
        return True
    return False


def test_names_the_first_of_each_tensor():
    model = moe()
    scale = model["experts"].w13_weight_scale_inv
    scale[2, 1, 0] = math.nan
    scale[3, 0, 1] = -1
    with pytest.raises(WeightSyncError) as error:
        check_loaded_scales(model)
    (finding,) = error.value.invalid
    assert str(finding) == (
        "experts.w13_weight_scale_inv expert 2 up: 2 of 16 values are invalid, the "
        "first: scale is nan, must be finite and positive at [1:2, 0:1]"
    )


def test_warn_logs_it(monkeypatch, caplog):
    monkeypatch.setenv("VLLM_MOE_SCALE_CHECK", "warn")
    logger = init_logger(loaded_scales.__name__)
    monkeypatch.setattr(logger, "propagate", True)
    model = moe()
    model["experts"].w13_weight_scale_inv[0, 0, 0] = math.inf
    with caplog.at_level(logging.ERROR):
        logger.addHandler(caplog.handler)
        check_loaded_scales(model)
        logger.removeHandler(caplog.handler)
    assert "experts.w13_weight_scale_inv expert 0 gate" in caplog.text


def test_off_does_not_look(monkeypatch):
    monkeypatch.setenv("VLLM_MOE_SCALE_CHECK", "off")
    model = moe()
    model["experts"].w13_weight_scale_inv[0] = math.nan
    check_loaded_scales(model)


def test_dummy_weights_pass():
    model = moe()
    model["experts"].w13_weight_scale_inv.fill_(-1)
    mark_inconsistent(model, "dummy weights", fenced=False)
    check_loaded_scales(model)


@pytest.mark.parametrize("value, bad", [(1, True), (0, False)])
def test_zero_scale(value, bad):
    weight = torch.full((128, 128), value).to(FP8)
    assert refused(weight=weight, weight_scale=torch.zeros(1, 1)) == bad


def test_scales_of_one_fused_weight():
    weight = torch.ones(12, 4).to(FP8)
    scale = torch.tensor([1, UNSET, UNSET])
    assert not refused(weight=weight, weight_scale=scale)
    assert refused(weight=weight, weight_scale=-scale)
    assert refused(weight=weight, weight_scale=scale.reshape(3, 1))


@pytest.mark.parametrize("name", ["input_scale", "k_scale", "w13_input_scale"])
def test_no_scale_of_a_weight(name):
    tensors = {"weight": torch.ones(4, 4).to(FP8), name: torch.tensor(math.nan)}
    assert not refused(**tensors)


def test_tensors_without_memory():
    weight = torch.ones(4, 4, device="meta")
    assert not refused(weight=weight, weight_scale=torch.ones(1, device="meta"))


@pytest.mark.usefixtures("make_model")
def test_a_cold_load_looks(tmp_path):
    case = CASES["qwen3_moe-fp8_block"]
    file = write_checkpoint(case, 1, tmp_path) / "model.safetensors"
    tensors = load_file(file)
    name = "model.layers.1.mlp.experts.3.up_proj.weight_scale_inv"
    tensors[name][0, 0] = math.nan
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(WeightSyncError, match="w13_weight_scale_inv expert 3 up: 1 of"):
        build(case, tmp_path)
