# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Whether a weight in blocks and its scale have the shapes and dtypes they should.

    E - experts
N, K - rows and columns of a weight
bn, bk - rows and columns of a block
"""

from collections.abc import Iterator, Mapping
from typing import Any

from vllm.model_executor.model_loader.reload.errors import Finding
from vllm.model_executor.model_loader.reload.scales import is_scale

from .checkpoint import Checkpoint
from .pairs import FP8, Pair

__all__ = ["block_size", "check_blocks", "check_config"]

# U8 is E8M0 by another name.
_SCALE_DTYPES = {"F32", "F16", "BF16", "F8_E8M0", "U8"}


def block_size(quantization: Mapping[str, Any]) -> tuple[int, int] | None:
    """Rows and columns of a block, if config.json says that all weights are in blocks.

    Args:
        quantization: its `quantization_config`.

    """
    sizes = [quantization.get("weight_block_size")]
    if groups := quantization.get("config_groups"):  # compressed-tensors
        weights = [group.get("weights") or {} for group in groups.values()]
        sizes = [weight.get("block_structure") for weight in weights]
    if not sizes[0] or sizes.count(sizes[0]) < len(sizes):
        return None
    bn, bk = sizes[0]
    return bn, bk


def check_config(checkpoint: Checkpoint) -> Iterator[Finding]:
    """A finding if only one of config.json and the weights is quantised to FP8."""
    tensors = checkpoint.tensors.values()
    fp8 = [t for t in tensors if t.dtype in FP8 and not is_scale(t.name)]
    if fp8 and not checkpoint.quantization:
        detail = f"has no quantization_config, but {fp8[0].name} is {fp8[0]}"
        yield Finding("", "config.json", detail)
    if block_size(checkpoint.quantization) and not fp8:
        yield Finding("", "config.json", "has FP8 in blocks, but no weight is FP8")


def check_blocks(pairs: list[Pair], block: tuple[int, int]) -> Iterator[Finding]:
    """A finding about each weight or scale of another dtype or shape.

    Args:
        pairs: weights [N, K] or [E, N, K], and their scales.
        block: [bn, bk].

    """
    for pair in pairs:
        weight, scale = pair.weight, pair.scale
        if weight.dtype not in FP8:
            detail = f"expected FP8, as it has a scale in blocks, got {weight}"
            yield Finding(weight.layer, weight.parameter, detail)
        if scale.dtype not in _SCALE_DTYPES:
            detail = f"expected one of {', '.join(sorted(_SCALE_DTYPES))}, got {scale}"
            yield Finding(scale.layer, scale.parameter, detail)
        if scale.shape != (expected := _grid(weight.shape, block)):
            swapped = (*scale.shape[:-2], *reversed(scale.shape[-2:]))
            note = " (its transpose)" if swapped == expected else ""
            detail = f"expected {list(expected)} for {weight}, got {scale}{note}"
            yield Finding(scale.layer, scale.parameter, detail)


def _grid(shape: tuple[int, ...], block: tuple[int, int]) -> tuple[int, ...]:
    """Shape of the scale: [ceil(N / bn), ceil(K / bk)], or [E, ...] for [E, N, K]."""
    blocks = [-(-size // b) for size, b in zip(shape[-2:], block)]
    return (*shape[:-2], *blocks)
