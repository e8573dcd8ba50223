# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The FP8 grouped matrix product against a dequantised one in float64.

M - tokens
T - experts each token is routed to
E - experts
N, K - output and input features
"""

import pytest
import torch

from tests.kernels.moe import problems
from tests.kernels.moe.problems import Problem, route
from vllm.model_executor.layers.fused_moe.fp8_grouped_gemm import (
    Routing,
    fp8_grouped_gemm,
)
from vllm.model_executor.layers.fused_moe.scale_watch import ScaleWatch
from vllm.model_executor.layers.fused_moe.tile import Tile

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
pytestmark = [pytest.mark.forked] if DEVICE.type == "cuda" else []
E, T = 4, 2
TOKENS = (1, 7, 33) if DEVICE.type == "cpu" else (1, 7, 33, 257, 2048, 8192)


def problem(m: int, n: int, k: int, scaling, seed: int = 0) -> Problem:
    return problems.problem(m, n, k, scaling, seed, device=DEVICE)


def tile(block_m: int, block_n: int = 64, **more) -> Tile:
    options = dict(num_warps=4, num_stages=3)
    return Tile(block_m, block_n, block_k=64, group_m=4, options=options, **more)


def run(
    p: Problem,
    cut: Tile,
    mapping: torch.Tensor | None = None,
    dtype: torch.dtype = torch.bfloat16,
    watch: ScaleWatch | None = None,
    routed_block_m: int | None = None,
    **more,
) -> torch.Tensor:
    m, n = p.a.shape[0], p.b.shape[1]
    c = torch.full((m, T, n), float("nan"), dtype=dtype, device=DEVICE)
    routing = route(p, routed_block_m or cut.block_m, mapping)
    scales = p.a_scale, p.b_scale
    fp8_grouped_gemm(
        p.a, p.b, c, *scales, routing, cut, p.block_shape, watch=watch, **more
    )
    return c.flatten(0, 1)


def assert_close(out: torch.Tensor, expected: torch.Tensor) -> None:
    error = (out.double() - expected).norm() / expected.norm().clamp_min(1e-9)
    assert error < 4e-3, f"relative error {error:.2e}"


SCALINGS = ["channel", "tensor", (128, 128), (64, 128), (32, 32), (48, 96)]


@pytest.mark.parametrize("scaling", SCALINGS, ids=str)
@pytest.mark.parametrize("block_m", [16, 64])
@pytest.mark.parametrize("m", TOKENS)
def test_product_equals_the_dequantised_one(m, block_m, scaling):
    p = problem(m, 160, 208, scaling)  # neither is a multiple of a tile
    assert_close(run(p, tile(block_m)), p.expected())


@pytest.mark.parametrize("scaling", SCALINGS, ids=str)
@pytest.mark.parametrize("tma_b", [False, True])
@pytest.mark.parametrize("block_m", [16, 64])
@pytest.mark.parametrize("m", TOKENS)
def test_a_tile_may_be_two_slices(m, block_m, tma_b, scaling):
    p = problem(m, 160, 208, scaling)  # a slice ends at 160, or begins after it
    out = run(p, tile(block_m, 128, slices_n=2, tma_b=tma_b))
    assert_close(out, p.expected())
    assert torch.equal(out, run(p, tile(block_m))), "slices change no sum"


def test_a_tile_may_be_a_part_of_a_block():
    p = problem(33, 128, 128, (128, 128))
    out = run(p, tile(16), routed_block_m=64)
    assert torch.equal(out, run(p, tile(16)))


@pytest.mark.parametrize("routed_block_m", [128, 256])
@pytest.mark.parametrize("tma_b", [False, True])
def test_a_tile_with_few_slots_is_cut_in_half(tma_b, routed_block_m):
    p = problem(100, 128, 128, (128, 128))
    p.experts[:, 0] = 0  # a tile with more than half of its slots
    p.experts[:, 1] = torch.tensor([1] * 64 + [2] * 35 + [3], device=DEVICE)
    cut = tile(128, 128, slices_n=2, tma_b=tma_b)
    out = run(p, cut, routed_block_m=routed_block_m)
    assert_close(out, p.expected())
    assert torch.equal(out, run(p, tile(64))), "a tile's height changes no sum"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_bias_and_routing_weights(dtype):
    p = problem(9, 96, 128, (32, 64))
    bias = torch.rand(E, 96, device=DEVICE)
    out = run(p, tile(16), dtype=dtype, bias=bias, topk_weights=p.weights)
    expected = p.expected() + bias.double()[p.experts.flatten()]
    assert_close(out, expected * p.weights.double().reshape(-1, 1))


@pytest.mark.parametrize("block_m", [16, 64])
@pytest.mark.parametrize("m", TOKENS)
def test_a_gated_product_is_activated_and_quantized(m, block_m):
    p = problem(m, 256, 208, (64, 64))
    c = torch.empty(m, T, 128, dtype=torch.float8_e4m3fn, device=DEVICE)
    c_scale = torch.full((m, T, 2), float("nan"), device=DEVICE)
    cut, scales = tile(block_m, 128, slices_n=2), (p.a_scale, p.b_scale)
    routing = route(p, block_m)
    fp8_grouped_gemm(p.a, p.b, c, *scales, routing, cut, p.block_shape, c_scale=c_scale)
    gate, up = p.expected().chunk(2, 1)
    expected = torch.nn.functional.silu(gate) * up
    groups = expected.reshape(m, T, 2, 64)
    largest = groups.abs().amax(-1)
    torch.testing.assert_close(c_scale.double(), largest / 448, rtol=2e-3, atol=0)
    exact = groups / c_scale.double()[..., None]
    rounded = exact.float().to(torch.float8_e4m3fn).double()
    step = rounded.abs() / 8 + 0.5  # the sums have an error, too
    wrong = (c.double().reshape(groups.shape) - rounded).abs() > step
    assert not wrong.any(), f"{wrong.sum()} are off by more than a step"


def test_outputs_of_experts_elsewhere_are_zero():
    p = problem(33, 128, 128, (128, 128))
    mapping = torch.tensor([0, -1, 2, -1])
    out, expected = run(p, tile(16), mapping), p.expected()
    elsewhere = (p.experts.flatten() % 2 == 1)[:, None]
    assert_close(out, expected.masked_fill(elsewhere, 0.0))


def test_each_block_may_hold_one_slot():
    p = problem(3, 128, 128, (128, 128))
    slots = p.experts.numel()
    padded = torch.tensor([slots * 16], dtype=torch.int32, device=DEVICE)
    c = torch.full((3, T, 128), float("nan"), dtype=torch.bfloat16, device=DEVICE)
    routing = Routing(None, p.experts.flatten(), padded, T, 16)
    scales = p.a_scale, p.b_scale
    fp8_grouped_gemm(p.a, p.b, c, *scales, routing, tile(16), p.block_shape)
    assert_close(c.flatten(0, 1), p.expected())


@pytest.mark.parametrize("slices_n", [1, 2])
@pytest.mark.parametrize(
    "scaling, value", [((64, 64), "nan"), ((128, 64), "inf"), ((32, 128), "-1")]
)
def test_a_bad_scale_is_named_wherever_it_is(scaling, value, slices_n):
    places = torch.ones_like(problem(8, 160 * slices_n, 208, scaling).b_scale)
    places[1:-1] = 0  # of the first expert and the last
    for index in places.nonzero():
        p = problem(8, 160 * slices_n, 208, scaling)
        p.experts[:, 0] = index[0]  # so that this expert is active
        p.experts[:, 1] = (index[0] + 1) % E
        p.b_scale[tuple(index)] = float(value)
        watch = ScaleWatch(DEVICE)
        run(p, tile(16, 64 * slices_n, slices_n=slices_n), watch=watch)
        torch.accelerator.synchronize() if DEVICE.type == "cuda" else None
        found = watch.poll()
        assert found is not None
        assert found.address == p.b_scale.data_ptr()
        assert [found.expert, found.block_n, found.block_k] == index.tolist()


@pytest.mark.parametrize("row", [0, 255, 256, 559])
def test_scales_of_many_programs_are_all_checked(row):
    p = problem(8, 560, 64, "channel")
    p.experts[:, 0], p.experts[:, 1] = 1, 2
    p.b_scale[1, row] = float("nan")
    watch = ScaleWatch(DEVICE)
    run(p, tile(16), watch=watch)
    torch.accelerator.synchronize() if DEVICE.type == "cuda" else None
    found = watch.poll()
    assert found is not None and (found.expert, found.block_n) == (1, row)


@pytest.mark.parametrize("scaling", ["channel", "tensor"])
def test_a_bad_scale_without_blocks_is_named(scaling):
    p = problem(8, 160, 208, scaling)
    p.experts[:, 0], p.experts[:, 1] = 1, 2
    p.b_scale[1] = float("nan")
    watch = ScaleWatch(DEVICE)
    run(p, tile(16), watch=watch)
    torch.accelerator.synchronize() if DEVICE.type == "cuda" else None
    found = watch.poll()
    assert found is not None and (found.expert, found.block_k) == (1, 0)


def test_a_bad_scale_of_an_inactive_expert_is_not_seen():
    p = problem(8, 128, 128, (64, 64))
    p.experts[:, 0], p.experts[:, 1] = 0, 1
    p.b_scale[2:] = float("nan")
    watch = ScaleWatch(DEVICE)
    assert_close(run(p, tile(16), watch=watch), p.expected())
    assert watch.poll() is None


def test_good_scales_are_never_reported():
    watch = ScaleWatch(DEVICE)
    for seed in range(10 if DEVICE.type == "cpu" else 1000):
        p = problem(5, 128, 128, (64, 64), seed)
        p.b_scale[0, 0] = torch.tensor([0.0, -0.0])
        p.b_scale[1, 0, 0] = 1e-40
        run(p, tile(16), watch=watch)
    torch.accelerator.synchronize() if DEVICE.type == "cuda" else None
    assert watch.poll() is None


def test_a_watch_can_be_reset():
    p = problem(8, 128, 128, (64, 64))
    p.b_scale.fill_(float("nan"))
    watch = ScaleWatch(DEVICE)
    run(p, tile(16), watch=watch)
    torch.accelerator.synchronize() if DEVICE.type == "cuda" else None
    assert watch.poll() is not None
    watch.reset()
    assert watch.poll() is None


@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs CUDA graphs")
def test_a_replayed_graph_reports_what_was_planted_later():
    p = problem(33, 256, 256, (128, 128))
    watch = ScaleWatch(DEVICE)
    routing = route(p, 16)
    c = torch.empty(33, T, 256, dtype=torch.bfloat16, device=DEVICE)

    def launch():
        scales = p.a_scale, p.b_scale
        fp8_grouped_gemm(
            p.a, p.b, c, *scales, routing, tile(16), p.block_shape, watch=watch
        )

    launch()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        launch()
    graph.replay()
    torch.accelerator.synchronize()
    assert watch.poll() is None
    p.b_scale[int(p.experts[0, 0]), 1, 1] = float("nan")
    graph.replay()
    torch.accelerator.synchronize()
    found = watch.poll()
    assert found is not None and (found.block_n, found.block_k) == (1, 1)


@pytest.mark.parametrize(
    "name, change, message",
    [
        ("a", lambda t: t.float(), "a: expected one of .*got torch.float32"),
        ("a", lambda t: t[:, :64], "a: expected shape"),
        ("b_scale", lambda t: t[:, :1], "b_scale: expected shape"),
        ("a_scale", lambda t: t.half(), "a_scale: expected one of"),
        ("b", lambda t: t.mT.contiguous().mT, "b: expected its last dimension"),
    ],
)
def test_wrong_inputs_are_refused_before_a_launch(name, change, message):
    p = problem(8, 128, 128, (64, 64))
    setattr(p, name, change(getattr(p, name)))
    with pytest.raises(ValueError, match=message):
        run(p, tile(16))
