# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Which experts are called dead."""

import pytest

from tests.harness.damage import found, fuse

CASE = "qwen3_moe-fp8_block"
EXPERT = "model.layers.1.mlp.experts.3"


def of_expert(tensors, leaf):
    return [
        t for n, t in tensors.items() if n.startswith(f"{EXPERT}.") and n.endswith(leaf)
    ]


def tiny_scales(tensors):
    for scale in of_expert(tensors, "_scale_inv"):
        scale.fill_(1e-30)


def zero_weights(tensors):
    for weight in of_expert(tensors, "weight"):
        weight.fill_(-0.0)


def zero_weights_and_scales(tensors):
    zero_weights(tensors)
    for scale in of_expert(tensors, "_scale_inv"):
        scale.fill_(0)


@pytest.mark.parametrize("change", [tiny_scales, zero_weights, zero_weights_and_scales])
@pytest.mark.parametrize("fused", [False, True])
def test_dead(change, fused, write, check):
    def kill(tensors):
        change(tensors)
        if fused:
            fuse(tensors)

    report = check(write(CASE, kill))
    assert report.dead == (EXPERT,)
    assert found(report) == []  # a dead expert is no error


@pytest.mark.parametrize("case", ["qwen3_moe-bf16", "mixtral-fp8_tensor_static"])
def test_without_blocks(case, write, check):
    module = "mlp" if case.startswith("qwen3") else "block_sparse_moe"
    expert = f"model.layers.0.{module}.experts.5"

    def kill(tensors):
        for name in tensors:
            if name.startswith(f"{expert}.") and name.endswith("weight"):
                tensors[name].zero_()

    assert check(write(case, kill)).dead == (expert,)


def test_one_value_is_life(write, check):
    def nearly(tensors):
        zero_weights(tensors)
        of_expert(tensors, "weight")[1][-1, -1] = 1

    assert check(write(CASE, nearly)).dead == ()
