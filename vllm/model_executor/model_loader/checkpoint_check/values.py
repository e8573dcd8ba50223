# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Whether every scale of a checkpoint may be served."""

from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch

from vllm.model_executor.model_loader.reload.errors import Finding
from vllm.model_executor.model_loader.reload.scales import bad_blocks, describe_first

from .checkpoint import StoredTensor
from .pairs import Pair

__all__ = ["activation_scales", "check_activation_scale", "check_scale"]

_ACTIVATIONS = {"input_scale", "q_scale", "k_scale", "v_scale"}


def check_scale(pair: Pair) -> Iterator[Finding]:
    """The first invalid value of a weight's scale and how many there are.

    Reads the weight only where a value is zero: over a block of zeros that is good.
    """
    for part in pair.experts():
        tensors = {"weight_scale": part.scale.read()}
        scale, bad = bad_blocks(tensors, "weight_scale")
        fits = len(part.weight.shape) >= scale.dim()
        if fits and (bad & (scale == 0)).any():
            tensors["weight"] = part.weight.read()
        yield from _first_bad(part.scale, tensors)


def activation_scales(tensors: Mapping[str, StoredTensor]) -> list[StoredTensor]:
    """The static scales of activations and of the KV cache."""
    return [t for t in tensors.values() if t.parameter in _ACTIVATIONS]


def check_activation_scale(scale: StoredTensor) -> Iterator[Finding]:
    """The first invalid value of such a scale and how many there are."""
    return _first_bad(scale, {"weight_scale": scale.read()})


def _first_bad(
    stored: StoredTensor, tensors: Mapping[str, torch.Tensor]
) -> Iterator[Finding]:
    scale, bad = bad_blocks(tensors, "weight_scale")
    for finding in describe_first(stored.layer, stored.parameter, scale, bad):
        detail = f"{finding.detail} ({stored.file.name})"
        yield replace(finding, detail=detail, expert=stored.expert)
