# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The cases are fit to judge a sync: nothing in them may be lost without showing."""

from collections.abc import Iterator

import pytest
import torch

from tests.checkpoints import CASES, Case, chunks
from tests.harness.snapshot import Snapshot, assert_same, differences, snapshot

# One, in some releases as a parameter, where the checkpoint brings none.
ATTENTION_SCALES = {"_q_scale", "_k_scale", "_v_scale", "_prob_scale"}

every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


@every_case
def test_every_tensor_shows(case: Case):
    """No tensor is a constant, and no two hold the same values."""
    seen = set()
    for name, tensor in case.tensors(seed=1):
        assert tensor.float().isfinite().all(), name
        assert tensor.numel() == 1 or tensor.float().unique().numel() > 1, name
        # Projections that read the same activation share its scale.
        if not name.endswith("input_scale"):
            values = tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
            assert values not in seen, name
            seen.add(values)


@every_case
def test_another_seed_changes_every_tensor(case: Case):
    other = dict(case.tensors(seed=2))
    assert [
        name for name, t in case.tensors(seed=1) if torch.equal(t, other[name])
    ] == []


@every_case
def test_same_seed_loads_the_same_bits(case: Case, make_model, cold_load):
    assert_same(snapshot(make_model(case, seed=1).model), cold_load(case, 1))


@every_case
def test_another_seed_loads_other_values_everywhere(case: Case, make_model, cold_load):
    """Also in every row, so that no expert and no shard of one goes unnoticed."""
    loaded, other = cold_load(case, 2), cold_load(case, 1)
    for path in _parameter_paths(make_model(case, seed=2).model):
        same = (loaded[path] == other[path]).reshape(-1, *loaded[path].shape[-1:])
        # Unwritten memory reads NaN here: a row of zeros is padding, written as such.
        padding = (loaded[path] == 0).reshape(same.shape)
        assert (same & ~padding).reshape(len(same), -1).all(dim=1).sum() == 0, path


def _parameter_paths(model: torch.nn.Module) -> Iterator[str]:
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owner, _, leaf = name.rpartition(".")
        if leaf in ATTENTION_SCALES:
            continue
        # A CPU kernel that packs a weight leaves an empty parameter behind.
        if parameter.numel():
            yield name
        elif owner.endswith("kv_b_proj"):  # latent attention on a CPU with AMX
            attention, _, _ = owner.partition(".self_attn.")
            impl = f"{attention}.self_attn.mla_attn.mla_attn.impl"
            yield from (f"{impl}._w_uk_packed", f"{impl}._w_uv_packed")
        else:
            yield f"{owner}.cpu_linear(identity)"


def test_another_seed_loads_other_kv_scales(cold_load):
    case = CASES["qwen3_moe-fp8_block-fp8_kv"]
    changed = _changed(cold_load(case, 2), cold_load(case, 1))
    for layer in range(case.sizes.layers):
        attention = f"model.layers.{layer}.self_attn.attn"
        names = ("_k_scale", "_v_scale", "_k_scale_float", "_v_scale_float")
        assert changed >= {f"{attention}.{name}" for name in names}


@every_case
def test_loading_leaves_nothing_unwritten(case: Case, cold_load):
    """Memory is NaN before it is written, so what stays NaN was not loaded."""
    assert _with_nan(cold_load(case, 1)) == []


def _with_nan(loaded: Snapshot) -> list[str]:
    return [
        path
        for path, tensor in loaded.items()
        if tensor.is_floating_point() and tensor.float().isnan().any()
    ]


def test_snapshot_sees_a_change_wherever_it_hides(make_model):
    """A parameter, a float beside it, and a weight that a kernel has packed."""
    model = make_model(CASES["llama-bf16"], seed=1).model
    before = snapshot(model)
    attention = model.model.layers[0].self_attn
    attention.attn._k_scale_float += 1.0
    model.model.norm.weight.data[3] += 1.0
    packed = attention.o_proj.cpu_linear
    attention.o_proj.cpu_linear = lambda *arguments: -packed(*arguments)
    changed = _changed(snapshot(model), before)
    assert changed >= {
        "model.layers.0.self_attn.attn._k_scale_float",
        "model.layers.0.self_attn.o_proj.cpu_linear(identity)",
        "model.norm.weight",
    }


def _changed(actual: Snapshot, expected: Snapshot) -> set[str]:
    return {line.split(":")[0] for line in differences(actual, expected)}


def test_mismatch_names_how_many_where_and_both_values():
    expected = {"layer.scale": torch.tensor([[1.0, 2.0], [3.0, 4.0]])}
    actual = {"layer.scale": torch.tensor([[1.0, 2.0], [5.0, float("nan")]])}
    with pytest.raises(AssertionError) as error:
        assert_same(actual, expected)
    assert "layer.scale: 2 of 4 differ, first at (1, 0): got 5.0, expected 3.0" in str(
        error.value
    )


def test_bucket_gives_every_tensor_and_keeps_none():
    tensors = dict(CASES["qwen3_moe-fp8_block-fp8_kv"].tensors(seed=1))
    bucket = torch.empty(1 << 20, dtype=torch.uint8)
    kept = []
    for chunk in chunks(tensors.items(), bytes_per_chunk=1 << 18, bucket=bucket):
        for name, view in chunk:
            assert torch.equal(view, tensors[name]), name
            kept.append(view)
    assert len(kept) == len(tensors)
    assert all(view.isnan().all() for view in kept)


def test_bucket_that_is_too_small_is_refused():
    tensors = {"weight": torch.zeros(64, 64)}
    bucket = torch.empty(1024, dtype=torch.uint8)
    with pytest.raises(
        ValueError, match="weight needs 16384 bytes, the bucket has 1024"
    ):
        list(chunks(tensors.items(), bytes_per_chunk=1024, bucket=bucket))


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e8m0fnu]
)
def test_nan_memory_fills_every_float_format(dtype, nan_memory):
    like = torch.ones(4, 4).to(dtype)
    for tensor in (
        torch.empty(4, 4, dtype=dtype),
        torch.empty_like(like),
        like.new_empty(4, 4),
        torch.empty_strided((4, 4), (1, 4), dtype=dtype),
    ):
        assert tensor.float().isnan().all()
