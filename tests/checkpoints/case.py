# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""A case: which architecture, stored how, in which sizes."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch

from .quantization import Bf16, Quantization
from .random import normal, uniform
from .slots import Part, Sizes, Slot


@dataclass(frozen=True)
class Architecture:
    """A model's config.json and tensors, as its released checkpoints have them.

    Attributes:
        name: Class name of the model.
        config: Gives the fields of config.json, but for those that every model has.
        slots: Gives the tensors.
    """

    name: str
    config: Callable[[Sizes], dict[str, object]]
    slots: Callable[[Sizes], Iterator[Slot]]


@dataclass(frozen=True)
class Case:
    """One checkpoint, but for its seed.

    Attributes:
        architecture: The model.
        quantization: How quantised projections are stored.
        parts: The parts of the model that are quantised.
        sizes: Dimensions of the model.
        kv_cache_dtype: "auto", or "fp8" for a checkpoint with `k_scale` and `v_scale`,
            to be served with an FP8 KV cache.
    """

    architecture: Architecture
    quantization: Quantization = Bf16()
    parts: frozenset[Part] = frozenset(Part)
    sizes: Sizes = field(default_factory=Sizes)
    kv_cache_dtype: str = "auto"

    def config(self) -> dict[str, object]:
        """The content of config.json."""
        config = dict(
            architectures=[self.architecture.name],
            torch_dtype="bfloat16",
            vocab_size=self.sizes.vocab,
            hidden_size=self.sizes.hidden,
            bos_token_id=1,
            eos_token_id=2,
            **self.architecture.config(self.sizes),
        )
        quantization = self.quantization.config(self._plain_modules())
        if quantization is not None:
            config["quantization_config"] = quantization
        return config

    def tensors(
        self, seed: int, device: str = "cpu"
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield every tensor of the checkpoint, made when it is asked for.

        Args:
            seed: Another seed changes every tensor.
            device: Where the tensors are made; values differ from device to device.
        """
        for slot in self.architecture.slots(self.sizes):
            noise = normal(slot.name, slot.shape, seed, device)
            values = slot.draw.mean + slot.draw.std * noise
            if self._is_quantised(slot):
                yield from self.quantization.store(slot, values, seed)
            else:
                yield slot.name, values.to(slot.draw.dtype)
        if self.kv_cache_dtype == "fp8":
            yield from self._kv_scales(seed)

    def _is_quantised(self, slot: Slot) -> bool:
        return slot.part in self.parts

    def _plain_modules(self) -> list[str]:
        slots = self.architecture.slots(self.sizes)
        return [s.module for s in slots if s.is_linear and not self._is_quantised(s)]

    def _kv_scales(self, seed: int) -> Iterator[tuple[str, torch.Tensor]]:
        for layer in range(self.sizes.layers):
            for scale in ("k_scale", "v_scale"):
                name = f"model.layers.{layer}.self_attn.{scale}"
                yield name, 0.01 + 0.04 * uniform(name, seed)
