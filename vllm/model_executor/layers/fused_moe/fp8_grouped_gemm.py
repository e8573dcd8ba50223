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
the same expert, and `BLOCK_N` of its output features. A few more look at the scales of
the experts that have tokens.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from vllm.model_executor.layers.fused_moe.scale_watch import ScaleWatch, scale_watch
from vllm.model_executor.layers.fused_moe.tile import Tile
from vllm.triton_utils import tl, triton

if TYPE_CHECKING:
    from triton.tools.tensor_descriptor import TensorDescriptor

__all__ = ["Routing", "fp8_grouped_gemm", "fp8_grouped_gemm_kernel"]

# A program checks scales of the experts of some blocks, all at once: a loop would go on
# when all that is multiplied is done. As many as its registers hold.
_CHECKED_BLOCKS = 16
_CHECKED_SCALES = 256
_FP8 = (torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2)


@dataclass(frozen=True)
class Routing:
    """Which token slots each program computes; a slot is a token's turn at an expert.

    Attributes:
        slots: [blocks * block_m] int32, sorted by expert and padded with M * T, or None
            if block i holds slot i alone.
        experts: [blocks] int32 or int64, local expert of each block; -1 if it is on
            another rank, and its outputs are zero.
        padded: [1] int32, how many of `slots` are in use.
        top_k: T; 1 if there is a row of A for each slot.
        block_m: slots in a block; all go to one expert.

    """

    slots: torch.Tensor | None
    experts: torch.Tensor
    padded: torch.Tensor
    top_k: int
    block_m: int


def fp8_grouped_gemm(
    a: torch.Tensor,
    b: torch.Tensor,
    c: torch.Tensor,
    a_scale: torch.Tensor,
    b_scale: torch.Tensor,
    routing: Routing,
    tile: Tile,
    block_shape: tuple[int, int] | None = None,
    bias: torch.Tensor | None = None,
    topk_weights: torch.Tensor | None = None,
    watch: ScaleWatch | None = None,
    c_scale: torch.Tensor | None = None,
) -> None:
    """Multiply each token by the weights of its experts.

    With `c_scale` the product is that of a gate and an up projection, one after the
    other in N, and c becomes silu(gate) * up in FP8, with a scale for k features.

    Args:
        a: [M, K] FP8; [M * T, K] if `routing.top_k` is 1.
        b: [E, N, K] FP8.
        c: [M, T, N] bfloat16 or float16, written; [M, T, N / 2] FP8 with `c_scale`.
        a_scale: float32; [rows of a, ceil(K / k)] with blocks, else [rows of a, 1] for
            a scale a token or one value for all.
        b_scale: float32; [E, ceil(N / n), ceil(K / k)] with blocks, else [E, N] or
            [E, N, 1] for a scale an output feature, or [E].
        routing: which slots go to which expert.
        tile: what one program computes; its `block_m` divides that of `routing`.
        block_shape: (n, k), the block of weights that shares a scale.
        bias: [E, N], added before routing weights are applied.
        topk_weights: [M, T] float32; outputs are multiplied by them.
        watch: where a bad weight scale is recorded; None to look at none.
        c_scale: [M, T, N / 2 / k] float32, written. The tile has two slices of k.

    Raises:
        ValueError: a tensor has another shape, dtype, stride or device.

    """
    _check(a, b, c, a_scale, b_scale, routing, block_shape, bias, c_scale)
    if c_scale is not None:
        _check_gated(b, tile, block_shape)
    n, k = b.shape[1:]
    group_n, group_k = block_shape or (1 if b_scale.dim() > 1 else 0, 0)
    block_k = min(tile.block_k, group_k & -group_k) if group_k else tile.block_k
    num_slots = c.shape[0] * c.shape[1]
    blocks_m = _blocks_in_m(num_slots, routing, tile)
    blocks_n = triton.cdiv(n, tile.block_n)
    scale_columns = triton.next_power_of_2(triton.cdiv(k, group_k or k))
    scale_rows = max(_CHECKED_SCALES // scale_columns, 1)
    strips = triton.cdiv(triton.cdiv(n, group_n or n), scale_rows)
    checkers = triton.cdiv(blocks_m, _CHECKED_BLOCKS) * strips if watch else 0
    words = watch or scale_watch(b.device)  # one binary, whether there are checkers
    fp8_grouped_gemm_kernel[blocks_m * blocks_n + checkers,](
        a,
        b,
        _descriptor(b, tile, block_k),
        c,
        c_scale,
        bias,
        a_scale,
        b_scale,
        topk_weights,
        routing.slots,
        routing.experts,
        routing.padded,
        words.device_word,
        words.host_word,
        watch.slot(b_scale) if watch else 0,
        n,
        k,
        blocks_m,
        num_slots,
        tile.group_m,
        routing.block_m,
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
        SWAP_AB=tile.block_m < 64 <= tile.block_n,
        BLOCK_SIZE_M=tile.block_m,
        BLOCK_SIZE_N=tile.block_n,
        BLOCK_SIZE_K=block_k,
        SLICES_N=tile.slices_n,
        CHECKED_BLOCKS=_CHECKED_BLOCKS,
        SCALE_ROWS=scale_rows,
        SCALE_COLUMNS=scale_columns,
        **tile.options,
    )


def _blocks_in_m(num_slots: int, routing: Routing, tile: Tile) -> int:
    """Return how many tiles in M may hold tokens."""
    if routing.slots is None:
        return num_slots
    # A block that is in use holds a slot, so few slots fill few blocks.
    most = num_slots * (routing.block_m // tile.block_m)
    return min(triton.cdiv(routing.slots.numel(), tile.block_m), most)


def _descriptor(b: torch.Tensor, tile: Tile, block_k: int) -> "TensorDescriptor | None":
    """Describe the weights to the tensor memory accelerator, if the tile wants it.

    It takes rows that start at multiples of 16 bytes.
    """
    num_experts, n, k = b.shape
    if not tile.tma_b or not b.is_contiguous() or k % 16 or b.data_ptr() % 16:
        return None
    from triton.tools.tensor_descriptor import TensorDescriptor

    box = [tile.block_n // tile.slices_n, block_k]
    return TensorDescriptor(b, [num_experts * n, k], [k, 1], box)


def _check_gated(b, tile, block_shape) -> None:
    n, group = b.shape[1], block_shape and block_shape[1]
    if tile.slices_n != 2 or tile.block_n != 2 * (group or 0):
        raise ValueError(
            f"tile: expected two slices of a block of {group} input features, as "
            f"c_scale is given, got {tile.slices_n} in {tile.block_n}"
        )
    if n % (2 * max(tile.block_n // 2, block_shape[0])):
        raise ValueError(
            f"b: expected whole blocks of {block_shape} and whole slices of "
            f"{tile.block_n // 2} in each half of N, got N = {n}"
        )


def _check(a, b, c, a_scale, b_scale, routing, block_shape, bias, c_scale) -> None:
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
    if c_scale is None:
        _expect("c", c, [(*c.shape[:2], n)], (torch.bfloat16, torch.float16), b)
    else:
        blocks = n // 2 // block_shape[1] if block_shape else 0
        _expect("c", c, [(*c.shape[:2], n // 2)], (torch.float8_e4m3fn,), b)
        _expect("c_scale", c_scale, [(*c.shape[:2], blocks)], (torch.float32,), b)
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


# Sizes that no vector of addresses depends on: one binary serves them all.
_UNSPECIALIZED = (
    "slot",
    "num_blocks_m",
    "num_slots",
    "group_size_m",
    "routed_block_m",
    "stride_asm",
    "stride_bse",
    "stride_bsn",
    "stride_bias_e",
)


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def fp8_grouped_gemm_kernel(  # noqa: D417
    a_ptr,
    b_ptr,
    b_desc,
    c_ptr,
    c_scale_ptr,
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
    group_size_m,
    routed_block_m,
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
    SLICES_N: tl.constexpr,
    CHECKED_BLOCKS: tl.constexpr,
    SCALE_ROWS: tl.constexpr,
    SCALE_COLUMNS: tl.constexpr,
):
    """Compute one tile of C, or check scales; the launcher says what the tensors are.

    Args:
        b_desc: b as [E * N, K] for the tensor memory accelerator, or None.
        GROUP_N: n; 1 for a scale an output feature, 0 for one an expert.
        GROUP_K: k, a multiple of BLOCK_SIZE_K; 0 without blocks.
        SWAP_AB: multiply weights by tokens: the matrix units take no fewer than 64
            rows on the left, and any small number of columns on the right.
        CHECKED_BLOCKS: blocks of slots of whose experts one program checks scales.
        SCALE_ROWS: how many blocks of N it checks.
        SCALE_COLUMNS: a power of two, at least the blocks of K.

    Example, of 3 tokens for 2 experts with T = 1 and BLOCK_SIZE_M = 2:

        experts of tokens 0, 1, 2: 1, 0, 1
        slots = [1, 3, 0, 2], experts = [0, 1], padded = [4]    (3 is padding)

    """
    pid = tl.program_id(0)
    num_blocks_n = tl.cdiv(N, BLOCK_SIZE_N)
    num_tiles = num_blocks_m * num_blocks_n
    # By programs of their own: one that multiplies has no registers left. Last in
    # the grid, they run where there is nothing left to multiply.
    if pid >= num_tiles:
        num_rows = tl.cdiv(N, GROUP_N) if GROUP_N > 0 else 1
        strips = tl.cdiv(num_rows, SCALE_ROWS)
        _check_scales(
            (pid - num_tiles) // strips * CHECKED_BLOCKS,
            (pid - num_tiles) % strips * SCALE_ROWS,
            b_scale_ptr,
            experts_ptr,
            tl.load(padded_ptr),
            routed_block_m,
            num_rows,
            tl.cdiv(K, GROUP_K) if GROUP_K > 0 else 1,
            stride_bse,
            stride_bsn,
            stride_bsk,
            slot,
            device_word_ptr,
            host_word_ptr,
            CHECKED_BLOCKS,
            BLOCK_SIZE_M,
            SCALE_ROWS,
            SCALE_COLUMNS,
        )
        return
    # Blocks of one expert follow each other, and share its weights in the L2 cache.
    first_m = pid // (group_size_m * num_blocks_n) * group_size_m
    group_m = min(num_blocks_m - first_m, group_size_m)
    in_group = pid % (group_size_m * num_blocks_n)
    first_slot = (first_m + in_group % group_m) * BLOCK_SIZE_M
    pid_n = in_group // group_m
    if first_slot >= tl.load(padded_ptr):
        return
    # Padding ends the slots of an expert: what begins with it holds nothing else.
    HEIGHTS: tl.constexpr = 2 if slots_ptr is not None and BLOCK_SIZE_M >= 128 else 1
    halvings = 0
    if slots_ptr is not None:
        slots_ptr += first_slot
        if tl.load(slots_ptr) >= num_slots:
            return
        if HEIGHTS == 2:
            is_short = tl.load(slots_ptr + BLOCK_SIZE_M // 2) >= num_slots
            halvings = is_short.to(tl.int32)
    for height in tl.static_range(HEIGHTS):
        if halvings == height:
            _multiply(
                first_slot,
                pid_n,
                a_ptr,
                b_ptr,
                b_desc,
                c_ptr,
                c_scale_ptr,
                bias_ptr,
                a_scale_ptr,
                b_scale_ptr,
                topk_weights_ptr,
                slots_ptr,
                experts_ptr,
                N,
                K,
                num_slots,
                routed_block_m,
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
                GROUP_N,
                GROUP_K,
                TOP_K,
                SWAP_AB,
                BLOCK_SIZE_M >> height,
                BLOCK_SIZE_N,
                BLOCK_SIZE_K,
                SLICES_N,
            )


@triton.jit
def _multiply(
    first_slot,
    pid_n,
    a_ptr,
    b_ptr,
    b_desc,
    c_ptr,
    c_scale_ptr,
    bias_ptr,
    a_scale_ptr,
    b_scale_ptr,
    topk_weights_ptr,
    slots_ptr,
    experts_ptr,
    N,
    K,
    num_slots,
    routed_block_m,
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
    SLICES_N: tl.constexpr,
):
    """Compute one tile of C; `slots_ptr` points to the first of its slots."""
    SLICE: tl.constexpr = BLOCK_SIZE_N // SLICES_N
    IS_GATED: tl.constexpr = c_scale_ptr is not None
    offs_m = tl.arange(0, BLOCK_SIZE_M)
    if slots_ptr is None:
        slots = tl.where(offs_m == 0, first_slot // BLOCK_SIZE_M, num_slots)
        expert = tl.load(experts_ptr + first_slot // BLOCK_SIZE_M).to(tl.int64)
    else:
        slots = tl.load(slots_ptr + offs_m)
        expert = tl.load(experts_ptr + first_slot // routed_block_m)
        expert = expert.to(tl.int64)
    is_token = slots < num_slots
    c_rows = c_ptr + slots.to(tl.int64) * stride_cm
    first_n = pid_n * (SLICE if IS_GATED else BLOCK_SIZE_N)
    offs_n = first_n + tl.arange(0, SLICE)
    if expert == -1:
        if IS_GATED:
            return  # nobody reads these
        for part in tl.static_range(SLICES_N):
            zeros = tl.zeros((BLOCK_SIZE_M, SLICE), dtype=tl.float32)
            _store(zeros, c_rows, is_token, offs_n + part * SLICE, N)
        return

    tokens = slots // TOP_K
    offs_k = tl.arange(0, BLOCK_SIZE_K)
    a_ptrs = (a_ptr + tokens.to(tl.int64) * stride_am)[:, None] + offs_k[None, :]
    b_base = b_ptr + expert * stride_be
    b_row = (expert * N).to(tl.int32) + first_n
    # A slice inside one block of N has one scale; elsewhere each row has its own.
    ONE_SCALE: tl.constexpr = GROUP_N == 0 or GROUP_N % SLICE == 0
    bs_base = b_scale_ptr + expert * stride_bse
    block_n = _block_n(first_n, offs_n, N, GROUP_N, ONE_SCALE)
    bs_ptrs = bs_base + block_n * stride_bsn
    bs = tl.load(bs_ptrs)
    as_ptrs = a_scale_ptr + tokens * stride_asm
    a_scale = tl.load(as_ptrs, mask=is_token, other=0.0)
    acc = _zeros(BLOCK_SIZE_M, SLICE, SWAP_AB)
    if SLICES_N == 2:
        to_slice1 = N // 2 if IS_GATED else SLICE
        offs_n1 = offs_n + to_slice1
        block_n1 = _block_n(first_n + to_slice1, offs_n1, N, GROUP_N, ONE_SCALE)
        bs1_ptrs = bs_base + block_n1 * stride_bsn
        bs1 = tl.load(bs1_ptrs)
        acc1 = _zeros(BLOCK_SIZE_M, SLICE, SWAP_AB)

    for k in range(0, K, BLOCK_SIZE_K):
        in_k = (offs_k < K - k)[None, :]
        a = tl.load(a_ptrs + k, mask=is_token[:, None] & in_k, other=0.0)
        b = _load_b(b_desc, b_row, b_base, stride_bn, offs_n, N, k, offs_k, in_k)
        if SLICES_N == 2:
            b1_row = b_row + to_slice1
            b1 = _load_b(b_desc, b1_row, b_base, stride_bn, offs_n1, N, k, offs_k, in_k)
        if GROUP_K == 0:
            acc = _dot(a, b, acc, SWAP_AB)
            if SLICES_N == 2:
                acc1 = _dot(a, b1, acc1, SWAP_AB)
        else:
            block_k = k // GROUP_K
            as_k_ptrs = as_ptrs + block_k * stride_ask
            a_scale = tl.load(as_k_ptrs, mask=is_token, other=0.0)
            bs = tl.load(bs_ptrs + block_k * stride_bsk)
            product = _dot(a, b, None, SWAP_AB)
            if SLICES_N == 2:
                bs1 = tl.load(bs1_ptrs + block_k * stride_bsk)
                product1 = _dot(a, b1, None, SWAP_AB)
            acc += product * _scales(a_scale, bs, ONE_SCALE, SWAP_AB)
            if SLICES_N == 2:
                acc1 += product1 * _scales(a_scale, bs1, ONE_SCALE, SWAP_AB)

    if GROUP_K == 0:
        acc *= _scales(a_scale, bs, ONE_SCALE, SWAP_AB)
        if SLICES_N == 2:
            acc1 *= _scales(a_scale, bs1, ONE_SCALE, SWAP_AB)
    if bias_ptr is not None:
        bias_ptr += expert * stride_bias_e
    if topk_weights_ptr is not None:
        weights = tl.load(topk_weights_ptr + slots, mask=is_token, other=0.0)
    else:
        weights = None
    if IS_GATED:
        gate = _finish(acc, bias_ptr, weights, offs_n, N, SWAP_AB)
        up = _finish(acc1, bias_ptr, weights, offs_n1, N, SWAP_AB)
        values, scale = _quantized(gate * tl.sigmoid(gate) * up)
        _store(values, c_rows, is_token, offs_n, N)
        c_scales = c_scale_ptr + slots.to(tl.int64) * (N // 2 // GROUP_K) + pid_n
        tl.store(c_scales, scale, mask=is_token)
    else:
        out = _finish(acc, bias_ptr, weights, offs_n, N, SWAP_AB)
        _store(out, c_rows, is_token, offs_n, N)
        if SLICES_N == 2:
            out1 = _finish(acc1, bias_ptr, weights, offs_n1, N, SWAP_AB)
            _store(out1, c_rows, is_token, offs_n1, N)


@triton.jit
def _check_scales(
    first_block,
    first_row,
    scale_ptr,
    experts_ptr,
    num_used_slots,
    routed_block_m,
    num_rows,
    num_columns,
    stride_expert,
    stride_row,
    stride_column,
    slot,
    device_word_ptr,
    host_word_ptr,
    BLOCKS: tl.constexpr,
    BLOCK_SIZE_M: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Record a bad scale of the experts whose first blocks of slots are among these.

    Of each expert a strip of ROWS rows of its scales is looked at.

    NaN, infinite and negative floats are those of the largest bit patterns. -0.0 is
    zero, and not bad.
    """
    starts = (first_block + tl.arange(0, BLOCKS)) * BLOCK_SIZE_M
    is_used = starts < num_used_slots
    expert = tl.load(experts_ptr + starts // routed_block_m, is_used, other=-1)
    earlier_ptrs = experts_ptr + (starts - BLOCK_SIZE_M) // routed_block_m
    earlier = tl.load(earlier_ptrs, is_used & (starts > 0), other=-1)
    is_first = ((expert != -1) & (expert != earlier))[:, None]
    experts = expert.to(tl.int64)[:, None]
    places = tl.arange(0, ROWS * COLUMNS)[None, :]
    columns = places % COLUMNS
    rows = first_row + places // COLUMNS
    is_scale = is_first & (rows < num_rows) & (columns < num_columns)
    ptrs = scale_ptr + experts * stride_expert
    ptrs += rows * stride_row + columns * stride_column
    bits = tl.load(ptrs, is_scale, other=0.0).to(tl.uint32, bitcast=True)
    is_bad = (bits >= 0x7F800000) & (bits != 0x80000000)
    if tl.max(tl.max(is_bad.to(tl.int32), 1), 0) > 0:
        words = experts << 34 | rows.to(tl.int64) << 16 | columns
        first = tl.min(tl.min(tl.where(is_bad, words, 1 << 46), 1), 0)
        word = first | (tl.zeros((), dtype=tl.int64) + slot) << 46
        unclaimed = tl.zeros((), dtype=tl.int64)
        if tl.atomic_cas(device_word_ptr, unclaimed, word) == 0:
            tl.store(host_word_ptr, word)


@triton.jit
def _block_n(first_n, offs_n, N, GROUP_N: tl.constexpr, ONE_SCALE: tl.constexpr):
    """Blocks of N whose scales a slice needs; rows past the end count as the last."""
    if GROUP_N == 0:
        return 0
    elif ONE_SCALE:
        return min(first_n, N - 1) // GROUP_N
    else:
        return tl.minimum(offs_n, N - 1) // GROUP_N


@triton.jit
def _zeros(BLOCK_M: tl.constexpr, SLICE: tl.constexpr, SWAP_AB: tl.constexpr):
    if SWAP_AB:
        return tl.zeros((SLICE, BLOCK_M), dtype=tl.float32)
    else:
        return tl.zeros((BLOCK_M, SLICE), dtype=tl.float32)


@triton.jit
def _load_b(b_desc, row, b_base, stride_bn, offs_n, N, k, offs_k, in_k):
    """Rows of an expert's weights, [SLICE, BLOCK_SIZE_K]; those past N are not used."""
    if b_desc is not None:
        return b_desc.load([row, k])
    else:
        rows = tl.minimum(offs_n, N - 1).to(tl.int64) * stride_bn
        return tl.load(b_base + rows[:, None] + (k + offs_k)[None, :], in_k, other=0.0)


@triton.jit
def _dot(a, b, acc, SWAP_AB: tl.constexpr):
    if SWAP_AB:
        return tl.dot(b, a.T, acc)
    else:
        return tl.dot(a, b.T, acc)


@triton.jit
def _scales(a_scale, b_scale, ONE_SCALE: tl.constexpr, SWAP_AB: tl.constexpr):
    """Products of scales that broadcast over a slice, in few operations."""
    if ONE_SCALE:
        scale = a_scale * b_scale
        return scale[None, :] if SWAP_AB else scale[:, None]
    elif SWAP_AB:
        return a_scale[None, :] * b_scale[:, None]
    else:
        return a_scale[:, None] * b_scale[None, :]


@triton.jit
def _finish(acc, bias_ptr, weights, offs_n, N, SWAP_AB: tl.constexpr):
    """Apply bias and routing weights to a slice, tokens first."""
    if SWAP_AB:
        acc = tl.trans(acc)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + tl.minimum(offs_n, N - 1))
        acc += bias.to(tl.float32)[None, :]
    if weights is not None:
        acc *= weights.to(tl.float32)[:, None]
    return acc


@triton.jit
def _quantized(values):
    """Rows in FP8 (e4m3, at most 448) and their scales; rows of zeros have one too."""
    scale = tl.maximum(tl.max(tl.abs(values), 1), 1e-10) / 448.0
    return tl.clamp(values / scale[:, None], -448.0, 448.0), scale


@triton.jit
def _store(values, c_rows, is_token, offs_n, N):
    c_mask = is_token[:, None] & (offs_n < N)[None, :]
    c_ptrs = c_rows[:, None] + offs_n[None, :]
    tl.store(c_ptrs, values.to(c_rows.dtype.element_ty), mask=c_mask)
