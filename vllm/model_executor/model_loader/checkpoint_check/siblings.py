# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Whether the experts of a layer are stored alike: a kernel has one layout for all."""

from collections import Counter, defaultdict
from collections.abc import Iterator

from vllm.model_executor.model_loader.reload.errors import Finding

from .experts import Expert

__all__ = ["check_siblings"]

_Kind = tuple[str, tuple[int, ...]]


def check_siblings(experts: list[Expert]) -> Iterator[Finding]:
    """A finding about each tensor of another dtype or shape than most in its layer.

    Args:
        experts: those that have tensors of their own, of all layers.

    """
    kinds: dict[tuple[str, str], Counter[_Kind]] = defaultdict(Counter)
    for expert in experts:
        for name, tensor in expert.tensors.items():
            kinds[expert.module, name][tensor.dtype, tensor.shape] += 1
    usual = {key: kind.most_common(1)[0][0] for key, kind in kinds.items()}
    for expert in experts:
        for name, tensor in expert.tensors.items():
            dtype, shape = usual[expert.module, name]
            if (tensor.dtype, tensor.shape) != (dtype, shape):
                detail = f"expected {dtype} {list(shape)} as most have, got {tensor}"
                yield Finding(tensor.layer, tensor.parameter, detail)
