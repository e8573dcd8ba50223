# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Each thing that can be wrong with a checkpoint is found, and called by its name."""

import math
from functools import partial

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from tests.checkpoints import CASES
from tests.harness.damage import found, fuse, remove, replace

FP8 = torch.float8_e4m3fn
CASE = "qwen3_moe-fp8_block"
EXPERT = "model.layers.1.mlp.experts.3"
WEIGHT = f"{EXPERT}.gate_proj.weight"  # [128, 256]
SCALE = f"{WEIGHT}_scale_inv"  # [1, 2]
IN_FILE = "in model.safetensors"


def put(tensors, value, name=SCALE):
    tensors[name][0, 1] = value


@pytest.mark.parametrize("case", CASES)
def test_sound(case, original, check):
    report = check(original(case))
    assert found(report) == []
    assert report.dead == ()


def test_sound_when_fused(write, check):
    report = check(write(CASE, fuse))
    assert found(report) == []
    assert (report.experts, report.pairs) == (16, 12)


@pytest.mark.parametrize(
    "damage, expected",
    [
        pytest.param(
            lambda tensors: tensors.pop(SCALE),
            f"{SCALE}: not stored, but its weight is: F8_E4M3 [128, 256] {IN_FILE}",
            id="no scale",
        ),
        pytest.param(
            partial(remove, part="_scale_inv"),
            "model.layers.0.mlp.experts.0.down_proj.weight_scale_inv: not stored, but",
            id="no scales",
        ),
        pytest.param(
            lambda tensors: tensors.pop(WEIGHT),
            f"{WEIGHT}: not stored, but its scale is: F32 [1, 2] {IN_FILE}",
            id="no weight",
        ),
        pytest.param(
            partial(remove, part=f"{EXPERT}.gate_proj."),
            f"{WEIGHT}: not stored",
            id="no projection",
        ),
        pytest.param(
            partial(remove, part=f"{EXPERT}."),
            f"{EXPERT}: not stored; config.json has 8 experts",
            id="no expert",
        ),
        pytest.param(
            partial(remove, part="layers.1.mlp.experts."),
            "model.layers.1.mlp.experts: none is stored; config.json has 8",
            id="no experts",
        ),
        pytest.param(
            partial(remove, part="model.layers.1."),
            "model.layers.1: not stored; config.json has 2 layers",
            id="no layer",
        ),
        pytest.param(
            partial(replace, name=SCALE, make=lambda scale: scale.T),
            f"{SCALE}: expected [1, 2] for F8_E4M3 [128, 256] {IN_FILE}, "
            f"got F32 [2, 1] {IN_FILE} (its transpose)",
            id="transposed scale",
        ),
        pytest.param(
            partial(replace, name=SCALE, make=lambda scale: scale[:, :1]),
            f"{SCALE}: expected [1, 2] for F8_E4M3",
            id="short scale",
        ),
        pytest.param(
            partial(replace, name=SCALE, make=lambda scale: scale.to(torch.int32)),
            f"{SCALE}: expected one of BF16, F16, F32, F8_E8M0, U8, got I32 [1, 2]",
            id="packed scale",
        ),
        pytest.param(
            partial(replace, name=WEIGHT, make=lambda weight: weight[:3, :3]),
            f"{WEIGHT}: expected F8_E4M3 [128, 256] as most have, got F8_E4M3 [3, 3]",
            id="short weight",
        ),
        pytest.param(
            partial(replace, name=WEIGHT, make=lambda weight: weight.bfloat16()),
            f"{WEIGHT}: expected FP8, as it has a scale in blocks, got BF16 [128, 256]",
            id="weight not quantised",
        ),
    ],
)
def test_damage(damage, expected, write, check):
    assert any(line.startswith(expected) for line in found(check(write(CASE, damage))))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, -1.0, -1e-40, 0.0])
def test_a_value_that_is_no_scale(value, write, check):
    (line,) = found(check(write(CASE, partial(put, value=value))))
    assert line == (
        f"{SCALE}: 1 of 2 values are invalid, the first: scale is "
        f"{torch.tensor(value).item()}, must be finite and positive at [0:1, 1:2] "
        "(model.safetensors)"
    )


@pytest.mark.parametrize("value", [1e-30, 1e-40, 1e30])
def test_any_size_is_valid(value, write, check):
    assert found(check(write(CASE, partial(put, value=value)))) == []


def test_zero_over_a_zero_block(write, check):
    def change(tensors):
        put(tensors, 0)
        tensors[WEIGHT][:, 128:] = 0

    assert found(check(write(CASE, change))) == []


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float8_e8m0fnu])
@pytest.mark.parametrize("exponent, count", [(127, 0), (255, 1)])
def test_exponents(dtype, exponent, count, write, check):
    def change(tensors):
        for name in [name for name in tensors if name.startswith("model.layers.1.mlp")]:
            if name.endswith("scale_inv"):
                exponents = torch.full(tensors[name].shape, 120, dtype=torch.uint8)
                tensors[name] = exponents.view(dtype)
        tensors[SCALE].view(torch.uint8)[0, 1] = exponent

    lines = found(check(write(CASE, change)))
    assert len(lines) == count
    assert all(line.startswith(f"{SCALE}: 1 of 2 values") for line in lines)


@pytest.mark.parametrize("name", ["input_scale", "k_scale"])
def test_activation_scales(name, write, check):
    full = f"model.layers.0.self_attn.o_proj.{name}"
    report = check(write(CASE, lambda t: t.update({full: torch.tensor(math.nan)})))
    assert len(found(report)) == 1
    assert found(report)[0].startswith(f"{full}: 1 of 1 values are invalid")


FUSED = "model.layers.1.mlp.experts.gate_up_proj"


@pytest.mark.parametrize(
    "damage, expected",
    [
        pytest.param(
            lambda tensors: tensors[f"{FUSED}_scale_inv"][5, 1].fill_(math.nan),
            f"{FUSED}_scale_inv expert 5: 2 of 4 values are invalid, the first: scale "
            "is nan, must be finite and positive at [1:2, 0:1]",
            id="value",
        ),
        pytest.param(
            lambda tensors: tensors.pop(f"{FUSED}_scale_inv"),
            f"{FUSED}_scale_inv: not stored, but its weight is: F8_E4M3 [8, 256, 256]",
            id="no scale",
        ),
        pytest.param(
            lambda tensors: tensors.pop(FUSED),
            f"{FUSED}: not stored, but its scale is",
            id="no weight",
        ),
        pytest.param(
            partial(remove, part=FUSED),
            "model.layers.1.mlp.experts.0.gate_up_proj: not stored",
            id="no projection",
        ),
        pytest.param(
            partial(replace, name=f"{FUSED}_scale_inv", make=lambda scale: scale[:7]),
            f"{FUSED}_scale_inv: expected [8, 2, 2] for F8_E4M3 [8, 256, 256]",
            id="no scale of an expert",
        ),
        pytest.param(
            partial(replace, name=FUSED, make=lambda weight: weight[:7]),
            "model.layers.1.mlp.experts.7.gate_up_proj: not stored",
            id="no expert",
        ),
    ],
)
def test_damage_of_fused_experts(damage, expected, write, check):
    def change(tensors):
        fuse(tensors)
        damage(tensors)

    lines = found(check(write(CASE, change)))
    assert any(line.startswith(expected) for line in lines), lines


def test_more_experts_than_the_config_has(write, check, configure):
    folder = write(CASE, lambda tensors: None)
    configure(folder, num_experts=7)
    assert "model.layers.0.mlp.experts.7: stored, but config.json has 7 experts" in (
        found(check(folder))
    )


def test_config_without_quantization(write, check, configure):
    folder = write(CASE, lambda tensors: None)
    configure(folder, quantization_config=None)
    (line,) = found(check(folder))
    assert line.startswith("config.json: has no quantization_config, but model.layers.")


def test_config_of_a_quantised_model(write, check, configure):
    folder = write("qwen3_moe-bf16", lambda tensors: None)
    configure(folder, **CASES[CASE].config())
    assert found(check(folder)) == [
        "config.json: has FP8 in blocks, but no weight is FP8"
    ]


def test_config_with_a_part_for_text(write, check, configure):
    folder = write(CASE, partial(remove, part=f"{EXPERT}."))
    config = CASES[CASE].config()
    configure(folder, text_config=config, **dict.fromkeys(config))
    assert found(check(folder)) == [f"{EXPERT}: not stored; config.json has 8 experts"]


@pytest.mark.parametrize("case", [c for c in CASES if "fp8" in c or "compressed" in c])
def test_any_scale_of_any_case(case, original, write, check):
    """Whatever a scale is called, it is missed, and a NaN in it is seen."""
    stored = load_file(original(case) / "model.safetensors")
    last = [name for name in stored if "weight_scale" in name][-1]
    (line,) = found(check(write(case, lambda t: t.pop(last))))
    assert line.startswith(f"{last}: not stored, but its weight is")
    (line,) = found(check(write(case, lambda t: t[last].fill_(math.nan))))
    assert line.startswith(f"{last}: {stored[last].numel()} of {stored[last].numel()}")


@settings(
    max_examples=25,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_one_bad_value_anywhere(data, original, write, check):
    stored = load_file(original(CASE) / "model.safetensors")
    scales = sorted(name for name in stored if name.endswith("_scale_inv"))
    name = data.draw(st.sampled_from(scales))
    index = tuple(data.draw(st.integers(0, n - 1)) for n in stored[name].shape)
    value = data.draw(st.sampled_from([math.nan, math.inf, -math.inf]))
    value = data.draw(st.floats(max_value=0, width=32) | st.just(value))

    def change(tensors):
        tensors[name][index] = value

    (line,) = found(check(write(CASE, change)))
    where = ", ".join(f"{i}:{i + 1}" for i in index)
    assert line.startswith(f"{name}: 1 of {stored[name].numel()} values")
    assert f"[{where}]" in line or stored[name].numel() == 1


@settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_another_shape_or_dtype_anywhere(data, original, write, check):
    """Of any tensor of an expert; and nothing that is stored breaks the check."""
    stored = load_file(original(CASE) / "model.safetensors")
    name = data.draw(st.sampled_from(sorted(n for n in stored if ".experts." in n)))
    dtypes = [torch.int64, torch.bool, torch.complex64, torch.float64, FP8]
    dtype = data.draw(st.sampled_from(dtypes))
    shape = data.draw(st.lists(st.integers(0, 3), max_size=4))
    value = data.draw(st.integers(0, 1))

    def change(tensors):
        tensors[name] = torch.full(shape, value, dtype=dtype)

    assert any(
        line.startswith(f"{name}: ") for line in found(check(write(CASE, change)))
    )
