# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The FP8 matrix product of a mixture of experts, which tests the scales it uses.

    M - tokens
    T - experts each token is routed to (top-k)
    E - local experts
    K - input features
    N - output features
    n, k - blocks of N and of K that share a scale

Each program computes one tile of the output: `BLOCK_M` token slots that were sorted to
the same expert, and `BLOCK_N` of its output features.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from vllm.model_executor.layers.fused_moe.scale_watch import ScaleWatch

__all__ = ["Routing", "fp8_grouped_gemm", "fp8_grouped_gemm_kernel"]

_FP8 = (torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2)


@dataclass(frozen=True)
class Routing:
    """Which token slots each program computes; a slot is a token's turn at an expert.

    Attributes:
        slots: [blocks * BLOCK_SIZE_M] int32, sorted by expert and padded with M * T, or
            None if block i holds slot i alone.
        experts: [blocks] int32 or int64, local expert of each block; -1 if it is on
            another rank, and its outputs are zero.
        padded: [1] int32, how many of `slots` are in use.
        top_k: T; 1 if there is a row of A for each slot.

    """

    slots: torch.Tensor | None
    experts: torch.Tensor
    padded: torch.Tensor
    top_k: int


def fp8_grouped_gemm(
    a: torch.Tensor,
    b: torch.Tensor,
    c: torch.Tensor,
    a_scale: torch.Tensor,
    b_scale: torch.Tensor,
    routing: Routing,
    config: Mapping[str, int],
    block_shape: tuple[int, int] | None = None,
    bias: torch.Tensor | None = None,
    topk_weights: torch.Tensor | None = None,
    watch: ScaleWatch | None = None,
) -> None:
    """Multiply each token by the weights of its experts.

    Args:
        a: [M, K] FP8; [M * T, K] if `routing.top_k` is 1.
        b: [E, N, K] FP8.
        c: [M, T, N] bfloat16 or float16, written.
        a_scale: float32; [rows of a, ceil(K / k)] with blocks, else [rows of a, 1] for
            a scale a token or one value for all.
        b_scale: float32; [E, ceil(N / n), ceil(K / k)] with blocks, else [E, N] or
            [E, N, 1] for a scale an output feature, or [E].
        routing: which slots go to which expert.
        config: the tile: BLOCK_SIZE_M, _N and _K, GROUP_SIZE_M, num_warps, num_stages.
        block_shape: (n, k), the block of weights that shares a scale.
        bias: [E, N], added before routing weights are applied.
        topk_weights: [M, T] float32; outputs are multiplied by them.
        watch: where a bad weight scale is recorded; None to look at none.

    Raises:
        ValueError: a tensor has another shape, dtype, stride or device.

    """
    num_experts, n, k = b.shape
    _check(a, b, c, a_scale, b_scale, routing, block_shape, bias)
    group_n, group_k = block_shape or (1 if b_scale.dim() > 1 else 0, 0)
    tile = dict(config)
    tile.pop("SPLIT_K", None)
    if group_k:
        tile["BLOCK_SIZE_K"] = min(tile["BLOCK_SIZE_K"], group_k & -group_k)
    size_m = tile["BLOCK_SIZE_M"]
    num_slots = c.shape[0] * c.shape[1]
    if routing.slots is None:
        blocks_m = num_slots
    else:  # tokens of one expert are distinct, so few tokens fill few blocks
        blocks_m = triton.cdiv(routing.slots.numel(), size_m)
        if a.shape[0] < size_m:
            blocks_m = min(blocks_m, num_slots)
    grid = (blocks_m * triton.cdiv(n, tile["BLOCK_SIZE_N"]),)
    fp8_grouped_gemm_kernel[grid](
        a,
        b,
        c,
        bias,
        a_scale,
        b_scale,
        topk_weights,
        routing.slots,
        routing.experts,
        routing.padded,
        watch and watch.device_word,
        watch and watch.host_word,
        watch.slot(b_scale) if watch else 0,
        n,
        k,
        blocks_m,
        num_slots,
        a.stride(0),
        b.stride(0),
        b.stride(1),
        c.stride(1),
        a_scale.stride(0) if a_scale.numel() > 1 else 0,
        a_scale.stride(1) if group_k else 0,
        b_scale.stride(0),
        b_scale.stride(1) if group_n else 0,
        b_scale.stride(2) if group_k else 0,
        bias.stride(0) if bias is not None else 0,
        GROUP_N=group_n,
        GROUP_K=group_k,
        TOP_K=routing.top_k,
        SWAP_AB=size_m < 64 <= tile["BLOCK_SIZE_N"],
        **tile,
    )


def _check(a, b, c, a_scale, b_scale, routing, block_shape, bias) -> None:
    num_experts, n, k = b.shape
    rows = c.shape[0] * (c.shape[1] if routing.top_k == 1 else 1)
    a_shapes: list[tuple[int, ...]] = [(), (1,), (1, 1), (rows, 1)]
    b_shapes: list[tuple[int, ...]] = [(num_experts,), (num_experts, n)]
    b_shapes.append((num_experts, n, 1))
    if block_shape is not None:
        n_blocks, k_blocks = (-(-x // g) for x, g in zip((n, k), block_shape))
        a_shapes, b_shapes = [(rows, k_blocks)], [(num_experts, n_blocks, k_blocks)]
    _expect("a", a, [(rows, k)], _FP8, b)
    _expect("b", b, [tuple(b.shape)], _FP8, b)
    _expect("c", c, [(*c.shape[:2], n)], (torch.bfloat16, torch.float16), b)
    _expect("b_scale", b_scale, b_shapes, (torch.float32,), b)
    _expect("a_scale", a_scale, a_shapes, (torch.float32,), b)
    if bias is not None:
        _expect("bias", bias, [(num_experts, n)], (bias.dtype,), b)
    for name, tensor in (("a", a), ("b", b), ("c", c)):
        if tensor.stride(-1) != 1:
            raise ValueError(
                f"{name}: expected its last dimension contiguous, got strides "
                f"{tensor.stride()}"
            )


def _expect(name, tensor, shapes, dtypes, like) -> None:
    if tuple(tensor.shape) not in shapes:
        raise ValueError(f"{name}: expected shape {shapes}, got {tuple(tensor.shape)}")
    if tensor.dtype not in dtypes:
        raise ValueError(f"{name}: expected one of {dtypes}, got {tensor.dtype}")
    if tensor.device != like.device:
        raise ValueError(f"{name}: expected it on {like.device}, got {tensor.device}")


@triton.jit
def _is_bad(bits):
    """NaN, infinite and negative floats are those of the largest bit patterns."""
    return bits >= 0x7F800000


@triton.jit
def _record_bad_scale(
    scale_ptr,
    stride_n,
    stride_k,
    first_n,
    last_n,
    blocks_k,
    expert,
    slot,
    device_word_ptr,
    host_word_ptr,
):
    """Find a bad scale in rows `first_n` to `last_n` of an expert, and record it.

    Off the road of good scales, so it may be slow. -0.0 is zero, and not bad.
    """
    zero = tl.zeros((), dtype=tl.int64)
    word = zero
    for block_n in range(first_n, last_n + 1):
        for block_k in range(0, blocks_k):
            scale = tl.load(scale_ptr + block_n * stride_n + block_k * stride_k)
            bits = scale.to(tl.float32).to(tl.uint32, bitcast=True)
            if _is_bad(bits) & (bits != 0x80000000) & (word == 0):
                where_n = (zero + block_n) << 16
                where = (zero + slot) << 46 | (zero + expert) << 34 | where_n
                word = where | (zero + block_k)
    if word != 0:
        claimed = tl.atomic_cas(device_word_ptr, zero, word)
        if claimed == 0:
            tl.store(host_word_ptr, word)


@triton.jit(do_not_specialize=["slot"])
def fp8_grouped_gemm_kernel(
    a_ptr,
    b_ptr,
    c_ptr,
    bias_ptr,
    a_scale_ptr,
    b_scale_ptr,
    topk_weights_ptr,
    slots_ptr,
    experts_ptr,
    padded_ptr,
    device_word_ptr,
    host_word_ptr,
    slot,
    N,
    K,
    num_blocks_m,
    num_slots,
    stride_am,
    stride_be,
    stride_bn,
    stride_cm,
    stride_asm,
    stride_ask,
    stride_bse,
    stride_bsn,
    stride_bsk,
    stride_bias_e,
    GROUP_N: tl.constexpr,
    GROUP_K: tl.constexpr,
    TOP_K: tl.constexpr,
    SWAP_AB: tl.constexpr,
    BLOCK_SIZE_M: tl.constexpr,
    BLOCK_SIZE_N: tl.constexpr,
    BLOCK_SIZE_K: tl.constexpr,
    GROUP_SIZE_M: tl.constexpr,
):
    """Compute one tile of C; the launcher above says what the tensors are.

    Args:
        GROUP_N: n; 1 for a scale an output feature, 0 for one an expert.
        GROUP_K: k, a multiple of BLOCK_SIZE_K; 0 without blocks.
        SWAP_AB: multiply weights by tokens: the matrix units take no fewer than 64
            rows on the left, and any small number of columns on the right.

    Example, of 3 tokens for 2 experts with T = 1 and BLOCK_SIZE_M = 2:

        experts of tokens 0, 1, 2: 1, 0, 1
        slots = [1, 3, 0, 2], experts = [0, 1], padded = [4]    (3 is padding)

    """
    pid = tl.program_id(0)
    num_blocks_n = tl.cdiv(N, BLOCK_SIZE_N)
    # Blocks of one expert follow each other, and share its weights in the L2 cache.
    first_m = pid // (GROUP_SIZE_M * num_blocks_n) * GROUP_SIZE_M
    group_m = min(num_blocks_m - first_m, GROUP_SIZE_M)
    in_group = pid % (GROUP_SIZE_M * num_blocks_n)
    pid_m = first_m + in_group % group_m
    pid_n = in_group // group_m
    if pid_m * BLOCK_SIZE_M >= tl.load(padded_ptr):
        return
    offs_m = tl.arange(0, BLOCK_SIZE_M)
    if slots_ptr is None:
        slots = tl.where(offs_m == 0, pid_m, num_slots)
    else:
        slots = tl.load(slots_ptr + pid_m * BLOCK_SIZE_M + offs_m)
    is_token = slots < num_slots
    offs_n = pid_n * BLOCK_SIZE_N + tl.arange(0, BLOCK_SIZE_N)
    c_ptrs = c_ptr + slots.to(tl.int64)[:, None] * stride_cm + offs_n[None, :]
    c_mask = is_token[:, None] & (offs_n < N)[None, :]
    expert = tl.load(experts_ptr + pid_m).to(tl.int64)
    if expert == -1:
        zeros = tl.zeros((BLOCK_SIZE_M, BLOCK_SIZE_N), dtype=c_ptr.dtype.element_ty)
        tl.store(c_ptrs, zeros, mask=c_mask)
        return

    tokens = slots // TOP_K
    rows_n = offs_n % N
    offs_k = tl.arange(0, BLOCK_SIZE_K)
    a_rows = a_ptr + tokens.to(tl.int64) * stride_am
    b_rows = b_ptr + expert * stride_be + rows_n.to(tl.int64) * stride_bn
    if SWAP_AB:
        a_ptrs = a_rows[None, :] + offs_k[:, None]
        b_ptrs = b_rows[:, None] + offs_k[None, :]
        acc = tl.zeros((BLOCK_SIZE_N, BLOCK_SIZE_M), dtype=tl.float32)
    else:
        a_ptrs = a_rows[:, None] + offs_k[None, :]
        b_ptrs = b_rows[None, :] + offs_k[:, None]
        acc = tl.zeros((BLOCK_SIZE_M, BLOCK_SIZE_N), dtype=tl.float32)

    # A tile inside one block of N has one scale; elsewhere each row has its own.
    ONE_B_SCALE: tl.constexpr = GROUP_N == 0 or GROUP_N % BLOCK_SIZE_N == 0
    if GROUP_N == 0:
        scale_n = pid_n * 0
    elif ONE_B_SCALE:
        scale_n = pid_n * BLOCK_SIZE_N // GROUP_N
    else:
        scale_n = rows_n // GROUP_N
    b_scale_base = b_scale_ptr + expert * stride_bse
    b_scale_ptrs = b_scale_base + scale_n * stride_bsn
    a_scale_ptrs = a_scale_ptr + tokens * stride_asm
    a_scale = tl.load(a_scale_ptrs, mask=is_token, other=0.0)
    b_scale = tl.load(b_scale_ptrs)
    worst = b_scale.to(tl.uint32, bitcast=True)

    for k in range(0, K, BLOCK_SIZE_K):
        in_k = offs_k < K - k
        if SWAP_AB:
            a = tl.load(a_ptrs, mask=in_k[:, None] & is_token[None, :], other=0.0)
            b = tl.load(b_ptrs, mask=in_k[None, :], other=0.0)
        else:
            a = tl.load(a_ptrs, mask=in_k[None, :] & is_token[:, None], other=0.0)
            b = tl.load(b_ptrs, mask=in_k[:, None], other=0.0)
        if GROUP_K > 0:
            block_k = k // GROUP_K
            a_scale = tl.load(
                a_scale_ptrs + block_k * stride_ask, mask=is_token, other=0.0
            )
            b_scale = tl.load(b_scale_ptrs + block_k * stride_bsk)
            if device_word_ptr is not None:
                worst = tl.maximum(worst, b_scale.to(tl.uint32, bitcast=True))
            product = tl.dot(b, a) if SWAP_AB else tl.dot(a, b)
            acc += product * _scales(a_scale, b_scale, ONE_B_SCALE, SWAP_AB)
        else:
            acc = tl.dot(b, a, acc) if SWAP_AB else tl.dot(a, b, acc)
        a_ptrs += BLOCK_SIZE_K
        b_ptrs += BLOCK_SIZE_K

    if GROUP_K == 0:
        acc *= _scales(a_scale, b_scale, ONE_B_SCALE, SWAP_AB)
    if SWAP_AB:
        acc = tl.trans(acc)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + expert * stride_bias_e + rows_n)
        acc += bias.to(tl.float32)[None, :]
    if topk_weights_ptr is not None:
        weights = tl.load(topk_weights_ptr + slots, mask=is_token, other=0.0)
        acc *= weights.to(tl.float32)[:, None]
    tl.store(c_ptrs, acc.to(c_ptr.dtype.element_ty), mask=c_mask)
    if device_word_ptr is not None:
        most = worst if ONE_B_SCALE else tl.max(worst)
        if _is_bad(most):
            first = tl.min(scale_n) if not ONE_B_SCALE else scale_n
            last = tl.max(scale_n) if not ONE_B_SCALE else scale_n
            _record_bad_scale(
                b_scale_base,
                stride_bsn,
                stride_bsk,
                first,
                last,
                tl.cdiv(K, GROUP_K) if GROUP_K > 0 else 1,
                expert,
                slot,
                device_word_ptr,
                host_word_ptr,
            )


@triton.jit
def _scales(a_scale, b_scale, ONE_B_SCALE: tl.constexpr, SWAP_AB: tl.constexpr):
    """Products of scales that broadcast over a tile, in few operations."""
    if ONE_B_SCALE:
        scale = a_scale * b_scale
        return scale[None, :] if SWAP_AB else scale[:, None]
    elif SWAP_AB:
        return a_scale[None, :] * b_scale[:, None]
    else:
        return a_scale[:, None] * b_scale[None, :]
