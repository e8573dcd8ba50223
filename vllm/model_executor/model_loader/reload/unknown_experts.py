# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Tensors for experts that a model does not have.

Models pass over what they do not know, and so do those of other ranks: that a tensor
went nowhere says nothing. But how many experts a layer has every rank knows.
"""

import math
from collections.abc import Iterable, Iterator

import torch

from .errors import Finding

__all__ = ["unknown_experts"]


def unknown_experts(model: torch.nn.Module, names: Iterable[str]) -> list[Finding]:
    """Find the tensors of a checkpoint that belong to no expert of `model`.

    Args:
        model: the model.
        names: of the tensors, in the checkpoint.

    Returns:
        A finding for each; none for names that do not number an expert.

    """
    names = list(names)
    counts = dict(_expert_counts(model)) if names else {}
    found = (_unknown(counts, name, _mapped(model, name)) for name in names)
    return [finding for finding in found if finding is not None]


def _expert_counts(model: torch.nn.Module) -> Iterator[tuple[str, int]]:
    """Yield qualified names of layers, and how many experts their checkpoints have."""
    for name, layer in model.named_modules():
        config = getattr(layer, "moe_config", None)
        if config is not None:
            yield name, config.num_logical_experts


def _mapped(model: torch.nn.Module, name: str) -> str:
    """The name by the model's own account, where its modules are named otherwise."""
    mapper = getattr(model, "hf_to_vllm_mapper", None)
    names = [name] if mapper is None else mapper.apply_list([name])
    return names[0] if names else name


def _unknown(counts: dict[str, int], name: str, mapped: str) -> Finding | None:
    parts = mapped.split(".")
    for place, part in enumerate(parts):
        layer = ".".join(parts[:place])
        if part.isdecimal() and int(part) >= counts.get(layer, math.inf):
            detail = f"no such expert, the layer has {counts[layer]}"
            return Finding(layer, name, detail, expert=int(part))
    return None
