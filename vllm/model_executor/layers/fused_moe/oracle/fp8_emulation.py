# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The last resort of the FP8 MoE oracle."""

import functools
from collections.abc import Callable
from enum import Enum
from typing import Any, TypeVar

from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig
from vllm.model_executor.layers.fused_moe.experts.fp8_emulation_moe import (
    Fp8EmulationExperts,
)
from vllm.model_executor.layers.quantization.utils.quant_utils import QuantKey

BackendT = TypeVar("BackendT", bound=Enum)
Selection = tuple[BackendT, type | None]


def or_emulation(
    emulation: BackendT,
) -> Callable[[Callable[..., Selection]], Callable[..., Selection]]:
    """Decorate a backend selection: where it finds no experts, try the emulation.

    Args:
        emulation: the backend that stands for `Fp8EmulationExperts`.

    Returns:
        A decorator. What the decorated selection finds or raises passes unchanged;
        so does "nothing found" where the emulation does not fit either.
    """

    def decorate(select: Callable[..., Selection]) -> Callable[..., Selection]:
        @functools.wraps(select)
        def select_or_emulate(
            config: FusedMoEConfig,
            weight_key: QuantKey | None,
            activation_key: QuantKey | None,
            **options: Any,
        ) -> Selection:
            found = select(config, weight_key, activation_key, **options)
            if found[1] is None and _fits(config, weight_key, activation_key):
                return emulation, Fp8EmulationExperts
            return found

        return select_or_emulate

    return decorate


def _fits(
    config: FusedMoEConfig,
    weight_key: QuantKey | None,
    activation_key: QuantKey | None,
) -> bool:
    experts = Fp8EmulationExperts
    supported, _ = experts.is_supported_config(
        experts, config, weight_key, activation_key, experts.activation_format()
    )
    return supported
