# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Which scales may be served.

    E - experts
    N, K - rows and columns of a weight
    n, k - rows and columns of its scale: one value for each block of the weight

A scale is valid if it is finite and positive, however small: experts that never fire
have scales below 1e-23 in released checkpoints. A zero is valid only where its whole
weight block is zero. In E8M0, which has an exponent and nothing else, 0xFF is NaN.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache

import regex as re
import torch

from vllm.triton_utils import HAS_TRITON

from .errors import Finding
from .ledger import Box
from .regions import describe

__all__ = [
    "WrittenScales",
    "bad_blocks",
    "describe_blocks",
    "describe_first",
    "invalid_scales",
    "is_activation_quantity",
    "is_scale",
    "suspect_scales",
    "weight_of_scale",
]

_SCALE = re.compile(r"(?:^|_)scale(?:_inv|_2)?$")
_QUANTITY = re.compile(r"(?<!weight)_(?:scale|zero_point)$|^scale$")
_WEIGHT_SCALE = re.compile(
    r"(?P<weight>(?:^|.*_)weight)(?:_global)?_scale(?:_inv|_2)?$"
)
_FP8 = {torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2}
_UNPACKED = _FP8 | {torch.int8}
# A tensor full of NaN needs no list of all of them.
_MAX_FINDINGS = 64


@lru_cache(maxsize=1024)
def is_scale(name: str) -> bool:
    """Whether a tensor of this name holds scales of any kind."""
    return _SCALE.search(name) is not None


def weight_of_scale(name: str) -> str | None:
    """Name of the weight that a weight scale belongs to, or None."""
    match = _WEIGHT_SCALE.match(name)
    return match["weight"] if match else None


@lru_cache(maxsize=1024)
def is_activation_quantity(name: str) -> bool:
    """Whether a checkpoint may lack this: scales and zero points of activations."""
    return _QUANTITY.search(name) is not None and weight_of_scale(name) is None


@dataclass(frozen=True)
class WrittenScales:
    """The scales of a layer that a sync wrote.

    Attributes:
        layer: qualified name of the layer.
        tensors: all its tensors in checkpoint format, by name.
        written: names of those that the sync wrote.

    """

    layer: str
    tensors: Mapping[str, torch.Tensor]
    written: Collection[str]


def invalid_scales(layers: Iterable[WrittenScales]) -> Iterator[Finding]:
    """What is wrong with the scales of these layers."""
    places = {
        f"{layer.layer}.{name}": (layer, name)
        for layer in layers
        for name in filter(is_scale, layer.written)
    }
    scales = {path: layer.tensors[name] for path, (layer, name) in places.items()}
    for path in suspect_scales(scales):
        layer, name = places[path]
        scale, bad = bad_blocks(layer.tensors, name)
        yield from describe_blocks(layer.layer, name, scale, bad)


def suspect_scales(scales: Mapping[str, torch.Tensor]) -> list[str]:
    """Names, sorted, of the scales to look at closely: those that a kernel finds bad.

    One launch and one synchronisation for all; where no kernel can tell, all names.
    """
    if not HAS_TRITON:
        return sorted(scales)
    from vllm.model_executor.layers.fused_moe.scale_scan import (
        SCALE_DTYPES,
        scan_scales,
    )

    scanned = {
        name: scale
        for name, scale in scales.items()
        if not scale.is_cpu and scale.dtype in SCALE_DTYPES
    }
    bad = {faults.name for faults in scan_scales(scanned)}
    return sorted((scales.keys() - scanned.keys()) | bad)


def bad_blocks(
    tensors: Mapping[str, torch.Tensor], name: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Values of a scale among a layer's tensors, and which of them are invalid."""
    scale = _as_float(tensors[name])
    weight = tensors.get(weight_of_scale(name) or "")
    bad = ~(torch.isfinite(scale) & (scale > 0))
    if weight is None or not bad.any():
        return scale, bad
    if weight.dtype in _UNPACKED:
        return scale, bad & ~((scale == 0) & _zero_blocks(weight, scale))
    return scale, bad & (scale != 0)  # packed: which values a block has is not seen


def _as_float(scale: torch.Tensor) -> torch.Tensor:
    """Values of a scale; exponents stored as bytes are read as E8M0."""
    if scale.dtype == torch.uint8:
        scale = scale.view(torch.float8_e8m0fnu)
    return (
        scale.float() if scale.is_floating_point() else torch.ones_like(scale).float()
    )


def describe_blocks(
    layer: str, name: str, scale: torch.Tensor, bad: torch.Tensor
) -> Iterator[Finding]:
    """A finding about each invalid value of a scale, up to a number worth reading."""
    for index in bad.nonzero()[:_MAX_FINDINGS].tolist():
        value = scale[tuple(index)].item()
        box = Box(tuple(index), tuple(i + 1 for i in index))
        reason = f"scale is {value}, must be finite and positive"
        yield describe(layer, name, scale, box, reason)


def describe_first(
    layer: str, name: str, scale: torch.Tensor, bad: torch.Tensor
) -> Iterator[Finding]:
    """A finding about the first invalid value, if there is one, with their count."""
    for finding in describe_blocks(layer, name, scale, bad):
        count = f"{int(bad.sum())} of {bad.numel()} values are invalid, the first: "
        yield replace(finding, detail=count + finding.detail)
        return


def _zero_blocks(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Which blocks of `weight` are zero throughout, in the shape of `scale`."""
    if weight.dim() == 3:  # expert by expert, and only where it matters
        zero = torch.zeros(scale.shape, dtype=torch.bool, device=scale.device)
        of_expert = (scale == 0).reshape(len(scale), -1)  # also where each has one
        for e in of_expert.any(1).nonzero().flatten().tolist():
            zero[e] = _zero_blocks(weight[e], scale[e])
        return zero
    sign = 0x7F if weight.dtype in _FP8 else 0xFF  # -0.0 is zero, and -128 is not
    nonzero = (weight.view(torch.uint8) & sign) != 0
    grid = scale.reshape(*scale.shape, *(1,) * (weight.dim() - scale.dim()))
    if grid.shape[0] not in (1, weight.shape[0]) and scale.dim() < 2 < grid.shape[0]:
        return ~nonzero.any().expand(scale.shape)  # shards of unknown widths
    counts = nonzero.int()
    for dim, blocks in enumerate(grid.shape):
        index = _block_of(counts.shape[dim], blocks, weight.device)
        shape = (*counts.shape[:dim], blocks, *counts.shape[dim + 1 :])
        counts = counts.new_zeros(shape).index_add_(dim, index, counts)
    return (counts == 0).reshape(scale.shape)


def _block_of(size: int, blocks: int, device: torch.device) -> torch.Tensor:
    """Block of each of `size` rows; a last short block rounds up to a power of two."""
    rows = -(-size // blocks)
    power = 1 << (rows - 1).bit_length()
    if -(-size // power) == blocks:
        rows = power
    return torch.arange(size, device=device).div(rows, rounding_mode="floor")
