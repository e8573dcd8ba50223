# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The experts of a checkpoint, and which of them are dead.

    E - experts

Dead is an expert that adds nothing to what its layer puts out. That is no error.
"""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

import regex as re
import torch

from vllm.model_executor.model_loader.reload.scales import is_scale

from .checkpoint import StoredTensor

__all__ = ["Expert", "find_experts", "find_fused_experts", "is_dead"]

_OWN = re.compile(r"(?P<module>.*\.experts)\.(?P<index>\d+)\.(?P<name>.+)")
_FUSED = re.compile(r"(?P<module>.*\.experts)\.(?P<name>[^.]+)")
# Released checkpoints have such scales for experts that no token was routed to.
_TINY = 1e-23
# Bytes that tell that a weight is not zero, nearly always.
_PEEK = 4096


@dataclass(frozen=True)
class Expert:
    """One expert of one layer.

    Attributes:
        module: name of the module that holds the layer's experts.
        index: its number in that module.
        tensors: its tensors by their names within the expert.

    """

    module: str
    index: int
    tensors: Mapping[str, StoredTensor]

    def __str__(self) -> str:
        return f"{self.module}.{self.index}"

    @property
    def weights(self) -> dict[str, StoredTensor]:
        """What is neither scale nor bias."""
        return {
            name: tensor
            for name, tensor in self.tensors.items()
            if len(tensor.shape) > 1 and not is_scale(name)
        }

    @property
    def scales(self) -> dict[str, StoredTensor]:
        """The scales of its weights."""
        return {
            name: tensor
            for name, tensor in self.tensors.items()
            if is_scale(name) and not name.endswith("input_scale")
        }

    @property
    def projections(self) -> set[str]:
        """What it has weights of: up_proj.weight, whatever it is packed as."""
        modules = {name: name.rpartition(".")[0] for name in self.weights}
        return {f"{m}.weight" if m else name for name, m in modules.items()}


def find_experts(tensors: Mapping[str, StoredTensor]) -> list[Expert]:
    """The experts that have tensors of their own, in order."""
    grouped: dict[tuple[str, int], dict[str, StoredTensor]] = defaultdict(dict)
    for name, tensor in tensors.items():
        if match := _OWN.fullmatch(name):
            grouped[match["module"], int(match["index"])][match["name"]] = tensor
    return [Expert(*key, grouped[key]) for key in sorted(grouped)]


def find_fused_experts(tensors: Mapping[str, StoredTensor]) -> list[Expert]:
    """The experts of fused tensors [E, ...], in order, each with its parts of them."""
    grouped: dict[tuple[str, int], dict[str, StoredTensor]] = defaultdict(dict)
    for name, tensor in tensors.items():
        if (match := _FUSED.fullmatch(name)) and len(tensor.shape) > 1:
            for index in range(tensor.shape[0]):
                part = tensor.of_expert(index)
                grouped[match["module"], index][match["name"]] = part
    return [Expert(*key, grouped[key]) for key in sorted(grouped)]


def is_dead(expert: Expert) -> bool:
    """Whether an expert adds nothing: its scales are all tiny, or its weights zero.

    Stops to read at the first value that says no.
    """
    scales, weights = expert.scales.values(), expert.weights.values()
    if scales and all(_is_tiny(scale) for scale in scales):
        return True
    return bool(weights) and all(_is_zero(weight) for weight in weights)


def _is_tiny(scale: StoredTensor) -> bool:
    values = scale.read()
    if values.dtype == torch.uint8:
        values = values.view(torch.float8_e8m0fnu)
    return bool((values.float().abs() <= _TINY).all())


def _is_zero(weight: StoredTensor) -> bool:
    for chunk in weight.chunks(_PEEK):
        values = torch.frombuffer(bytearray(chunk), dtype=weight.torch_dtype)
        if (values.float() != 0).any():
            return False
    return True
