# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""FP8 arithmetic in plain torch, for machines without FP8 kernels.

Shape suffixes:
    N   rows of a weight, its output features
    K   columns of a weight, its input features
    MK  tokens by features

A weight may stack several matrices along N (the gate and up projections of an
expert); each then starts a block of its own, as the checkpoint has it.
"""

import torch

from vllm.model_executor.layers.quantization.utils.quant_utils import QuantKey

FP8_MAX = torch.finfo(torch.float8_e4m3fn).max
SCALE_DTYPES = (torch.float32, torch.float8_e8m0fnu)


def can_dequantize(key: QuantKey | None) -> bool:
    """Tell whether `dequantize_fp8` serves weights of this kind."""
    return (
        key is not None
        and key.dtype is torch.float8_e4m3fn
        and key.scale.static
        and key.scale.dtype in SCALE_DTYPES
    )


def dequantize_fp8(
    weight_NK: torch.Tensor,
    scale: torch.Tensor,
    dtype: torch.dtype,
    block_shape: tuple[int, int] | None = None,
    stacked: int = 1,
) -> torch.Tensor:
    """Return an FP8 weight times its scale, rounded once.

    A NaN or infinite scale is multiplied like any other, so that it shows in the
    result.

    Example: a [3, 4] weight in blocks of 2x2 has a [2, 2] scale; rows 0 and 1 use
    its first row, row 2 its second.

    Args:
        weight_NK: [N, K], float8_e4m3fn, rows in checkpoint order.
        scale: with `block_shape`, [stacked * ceil(N / stacked / bn), ceil(K / bk)];
            without, one value for the weight, or one for each of any number of
            equal runs of rows ([2] for gate and up, [N, 1] for channels).
            float32, bfloat16, float16 or float8_e8m0fnu.
        dtype: of the result.
        block_shape: (bn, bk), the rows and columns that share a scale.
        stacked: how many equal matrices lie above one another in the weight.

    Raises:
        ValueError: the scale has another shape.
    """
    if block_shape is None:
        scale_NK = _expand_rows(scale, weight_NK.shape[0])
    else:
        scale_NK = _expand_blocks(scale, weight_NK.shape, block_shape, stacked)
    return (weight_NK.float() * scale_NK).to(dtype)


def _expand_rows(scale: torch.Tensor, n: int) -> torch.Tensor:
    """[R] or [R, 1] to [N, 1], R a divisor of N; [] and [1] to [1, 1]."""
    runs = max(scale.numel(), 1)
    if n % runs:
        raise ValueError(
            f"FP8 weight scale of shape {tuple(scale.shape)}: expected one value, or "
            f"one for each of equal runs of the weight's {n} rows."
        )
    column = scale.float().reshape(-1, 1)
    return column if runs == 1 else column.repeat_interleave(n // runs, dim=0)


def _expand_blocks(
    scale: torch.Tensor,
    weight_shape: torch.Size,
    block_shape: tuple[int, int],
    stacked: int,
) -> torch.Tensor:
    """Block scales to [N, K], the last block of a row or column cut to fit."""
    (n, k), (bn, bk) = weight_shape, block_shape
    rows_each = n // stacked
    blocks_each = -(-rows_each // bn)
    expected = (stacked * blocks_each, -(-k // bk))
    if scale.shape != expected:
        raise ValueError(
            f"FP8 weight scale of shape {tuple(scale.shape)}: expected {expected}, one "
            f"value for each {bn}x{bk} block of a {tuple(weight_shape)} weight"
            f"{f' of {stacked} matrices' if stacked > 1 else ''}."
        )
    row = torch.arange(n, device=scale.device)
    row_block = row // rows_each * blocks_each + row % rows_each // bn
    column_block = torch.arange(k, device=scale.device) // bk
    return scale.float()[row_block][:, column_block]


def quantize_fp8(
    x_MK: torch.Tensor, scale: torch.Tensor | None = None, per_token: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Divide by a scale, saturate at the largest FP8 value and round.

    Args:
        x_MK: [M, K], any float dtype.
        scale: one value. Made from the largest magnitude if omitted.
        per_token: make one scale a row instead of one for all.

    Returns:
        [M, K] float8_e4m3fn, and the scale: as given, or [1] or [M, 1] float32.

    Raises:
        ValueError: a scale of more than one value.
    """
    if scale is None:
        amax = x_MK.float().abs().amax(-1, keepdim=True)
        scale = (amax if per_token else amax.amax().reshape(1)) / FP8_MAX
        # All zeros would otherwise be divided by zero.
        scale = scale.clamp(min=torch.finfo(torch.float32).tiny)
    elif scale.numel() != 1:
        raise ValueError(
            f"FP8 quantisation of a {tuple(x_MK.shape)} tensor on a CPU: expected a "
            f"scale of one value, got one of shape {tuple(scale.shape)}."
        )
    scaled = x_MK.float() / scale.float()
    return scaled.clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn), scale
