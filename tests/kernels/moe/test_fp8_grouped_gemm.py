# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The FP8 grouped matrix product against a dequantised one in float64.

M - tokens
T - experts each token is routed to
E - experts
N, K - output and input features
"""

from dataclasses import dataclass

import pytest
import torch

from vllm.model_executor.layers.fused_moe.fp8_grouped_gemm import (
    Routing,
    fp8_grouped_gemm,
)
from vllm.model_executor.layers.fused_moe.scale_watch import ScaleWatch
from vllm.model_executor.layers.fused_moe.tile import Tile

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
pytestmark = [pytest.mark.forked] if DEVICE.type == "cuda" else []
FP8 = torch.float8_e4m3fn
E, T = 4, 2
TOKENS = (1, 7, 33) if DEVICE.type == "cpu" else (1, 7, 33, 257, 2048, 8192)


@dataclass
class Problem:
    """Inputs of a product, and how its scales are laid out."""

    a: torch.Tensor
    b: torch.Tensor
    a_scale: torch.Tensor
    b_scale: torch.Tensor
    experts: torch.Tensor  # [M, T], global expert of each slot
    weights: torch.Tensor  # [M, T]
    block_shape: tuple[int, int] | None

    def expected(self) -> torch.Tensor:
        """[M * T, N] in float64, without routing weights."""
        a, b = self.a.double(), self.b.double()
        if self.block_shape is None:
            a = a * self.a_scale.double().reshape(-1, 1)
            b = b * self.b_scale.double().reshape(E, -1, 1)
        else:
            n, k = self.block_shape
            a = a * _spread(self.a_scale, 1, k, a.shape[1])
            b = b * _spread(_spread(self.b_scale, 1, n, b.shape[1]), 2, k, b.shape[2])
        rows = a.repeat_interleave(T, 0)
        return torch.einsum("sk,snk->sn", rows, b[self.experts.flatten()])


def _spread(scale: torch.Tensor, dim: int, block: int, size: int) -> torch.Tensor:
    return scale.double().repeat_interleave(block, dim).narrow(dim, 0, size)


def problem(m: int, n: int, k: int, scaling, seed: int = 0) -> Problem:
    """Random inputs; `scaling` is a block shape, "channel" or "tensor"."""
    random = torch.Generator(DEVICE).manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.rand(shape, generator=random, device=DEVICE)

    shapes = {"channel": ((m, 1), (E, n, 1)), "tensor": ((1,), (E,))}
    block_shape = None if scaling in shapes else scaling
    if block_shape is not None:
        n_blocks, k_blocks = -(-n // scaling[0]), -(-k // scaling[1])
        shapes[scaling] = (m, k_blocks), (E, n_blocks, k_blocks)
    a_shape, b_shape = shapes[scaling]
    return Problem(
        a=((draw(m, k) - 0.5) * 8).to(FP8),
        b=((draw(E, n, k) - 0.5) * 8).to(FP8),
        a_scale=draw(*a_shape) + 0.1,
        b_scale=draw(*b_shape) + 0.1,
        experts=draw(m, E).topk(T, 1).indices,
        weights=draw(m, T),
        block_shape=block_shape,
    )


def route(experts: torch.Tensor, block_m: int, mapping: torch.Tensor) -> Routing:
    """Sort slots by expert and pad each expert's to whole blocks."""
    blocks, owners = [], []
    total = experts.numel()
    for expert in range(E):
        slots = (experts.flatten() == expert).nonzero().flatten()
        padding = slots.new_full((-slots.numel() % block_m,), total)
        blocks.append(torch.cat([slots, padding]))
        owners += [int(mapping[expert])] * (blocks[-1].numel() // block_m)
    slots = torch.cat(blocks).int()
    in_use = torch.tensor([slots.numel()], dtype=torch.int32, device=DEVICE)
    unused = slots.new_full((2 * block_m,), total)  # what a worst case leaves over
    owner = torch.tensor([*owners, -1, -1], dtype=torch.int32, device=DEVICE)
    return Routing(torch.cat([slots, unused]), owner, in_use, T, block_m)


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
    mapping = torch.arange(E) if mapping is None else mapping
    routing = route(p.experts, routed_block_m or cut.block_m, mapping)
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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_bias_and_routing_weights(dtype):
    p = problem(9, 96, 128, (32, 64))
    bias = torch.rand(E, 96, device=DEVICE)
    out = run(p, tile(16), dtype=dtype, bias=bias, topk_weights=p.weights)
    expected = p.expected() + bias.double()[p.experts.flatten()]
    assert_close(out, expected * p.weights.double().reshape(-1, 1))


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
    for index in torch.ones(problem(8, 160, 208, scaling).b_scale.shape).nonzero():
        p = problem(8, 160, 208, scaling)
        p.experts[:, 0] = index[0]  # so that this expert is active
        p.experts[:, 1] = (index[0] + 1) % E
        p.b_scale[tuple(index)] = float(value)
        watch = ScaleWatch(DEVICE)
        run(p, tile(16, 64 * slices_n, slices_n=slices_n), watch=watch)
        torch.cuda.synchronize() if DEVICE.type == "cuda" else None
        found = watch.poll()
        assert found is not None
        assert found.address == p.b_scale.data_ptr()
        assert [found.expert, found.block_n, found.block_k] == index.tolist()


@pytest.mark.parametrize("scaling", ["channel", "tensor"])
def test_a_bad_scale_without_blocks_is_named(scaling):
    p = problem(8, 160, 208, scaling)
    p.experts[:, 0], p.experts[:, 1] = 1, 2
    p.b_scale[1] = float("nan")
    watch = ScaleWatch(DEVICE)
    run(p, tile(16), watch=watch)
    torch.cuda.synchronize() if DEVICE.type == "cuda" else None
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
    torch.cuda.synchronize() if DEVICE.type == "cuda" else None
    assert watch.poll() is None


def test_a_watch_can_be_reset():
    p = problem(8, 128, 128, (64, 64))
    p.b_scale.fill_(float("nan"))
    watch = ScaleWatch(DEVICE)
    run(p, tile(16), watch=watch)
    torch.cuda.synchronize() if DEVICE.type == "cuda" else None
    assert watch.poll() is not None
    watch.reset()
    assert watch.poll() is None


@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs CUDA graphs")
def test_a_replayed_graph_reports_what_was_planted_later():
    p = problem(33, 256, 256, (128, 128))
    watch = ScaleWatch(DEVICE)
    routing = route(p.experts, 16, torch.arange(E))
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
    torch.cuda.synchronize()
    assert watch.poll() is None
    p.b_scale[int(p.experts[0, 0]), 1, 1] = float("nan")
    graph.replay()
    torch.cuda.synchronize()
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
