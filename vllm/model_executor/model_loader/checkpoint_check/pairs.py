# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Which scale belongs to which weight, and which of the two is missing."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import regex as re

from vllm.model_executor.model_loader.reload.errors import Finding
from vllm.model_executor.model_loader.reload.scales import is_scale, weight_of_scale

from .checkpoint import StoredTensor

__all__ = ["FP8", "Pair", "find_lone", "find_pairs"]

FP8 = {"F8_E4M3", "F8_E4M3FNUZ", "F8_E5M2"}
_FUSED_SCALE = re.compile(r"_scale(?:_inv)?$")

_Tensors = Mapping[str, StoredTensor]


@dataclass(frozen=True)
class Pair:
    """A weight and its scale."""

    weight: StoredTensor
    scale: StoredTensor

    def experts(self) -> Iterator["Pair"]:
        """The pair of each expert of a fused one; any other as it is."""
        weight, scale = self.weight, self.scale
        if len(weight.shape) < 3 or scale.shape[:1] != weight.shape[:1]:
            yield self
            return
        for expert in range(weight.shape[0]):
            yield Pair(weight.of_expert(expert), scale.of_expert(expert))


def find_pairs(tensors: _Tensors) -> list[Pair]:
    """Every scale that is stored with its weight."""
    weights = {name: _weight_name(name, tensors) for name in tensors}
    return [
        Pair(tensors[weight], tensors[name])
        for name, weight in weights.items()
        if weight is not None and weight in tensors
    ]


def find_lone(tensors: _Tensors) -> Iterator[Finding]:
    """A finding about each scale without a weight, and FP8 weight without a scale."""
    scaled: set[str] = set()
    suffix = "_scale_inv"
    for name, tensor in tensors.items():
        weight = _weight_name(name, tensors)
        if weight is None:
            continue
        scaled.add(weight)
        if weight not in tensors:
            layer, _, parameter = weight.rpartition(".")
            yield Finding(layer, parameter, f"not stored, but its scale is: {tensor}")
        elif tensors[weight].dtype in FP8:
            suffix = tensor.parameter.removeprefix(tensors[weight].parameter)
    for name, tensor in tensors.items():
        if tensor.dtype in FP8 and name not in scaled and not is_scale(name):
            detail = f"not stored, but its weight is: {tensor}"
            yield Finding(tensor.layer, tensor.parameter + suffix, detail)


def _weight_name(name: str, tensors: _Tensors) -> str | None:
    """Name of the weight that a tensor is the scale of; None if it is none."""
    if not is_scale(name):
        return None
    layer, dot, parameter = name.rpartition(".")
    plain = weight_of_scale(parameter)
    weight = layer + dot + (plain or _FUSED_SCALE.sub("", parameter))
    stored = [w for w in (weight, f"{weight}_packed") if w in tensors]
    is_certain = plain is not None or parameter.endswith("_scale_inv")
    return stored[0] if stored else weight if is_certain else None
