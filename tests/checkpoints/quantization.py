# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""How a checkpoint stores a projection, and what its config.json says about it.

Shape suffixes: N out features, K in features, B block size.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from .random import uniform
from .slots import Slot

BLOCK = 128
FP8 = torch.float8_e4m3fn
FP8_MAX = torch.finfo(FP8).max

Named = Iterator[tuple[str, torch.Tensor]]


def _to_fp8(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Divide float32 by the (broadcast) scale and round to FP8."""
    return (weight / scale).to(FP8)


class Quantization(ABC):
    """The storage format of the quantised projections of a checkpoint."""

    @abstractmethod
    def store(self, slot: Slot, weight_NK: torch.Tensor, seed: int) -> Named:
        """Yield the tensors, fully named, that stand for one projection.

        Args:
            slot: The projection.
            weight_NK: Its values, [N, K] float32: rounded before, scales would collide.
            seed: Seed of the checkpoint, for scales that no weight determines.
        """

    @abstractmethod
    def config(self, plain: list[str]) -> dict[str, object] | None:
        """Return config.json's `quantization_config`, None where it has none.

        Args:
            plain: Names of the linear modules that are not quantised.
        """

    def input_scale(self, slot: Slot, seed: int) -> torch.Tensor:
        """The static scale, 0-d float32, of the activation that `slot` reads."""
        return 0.01 + 0.04 * uniform(f"{slot.reads}.input_scale", seed)


@dataclass(frozen=True)
class Bf16(Quantization):
    """No quantisation."""

    def store(self, slot: Slot, weight_NK: torch.Tensor, seed: int) -> Named:
        yield slot.name, weight_NK.to(slot.draw.dtype)

    def config(self, plain: list[str]) -> None:
        return None


@dataclass(frozen=True)
class Fp8Block(Quantization):
    """FP8 in blocks of 128 x 128, scale [ceil(N / 128), ceil(K / 128)], float32."""

    def store(self, slot: Slot, weight_NK: torch.Tensor, seed: int) -> Named:
        rows, columns = (-(-size // BLOCK) for size in weight_NK.shape)
        padded = weight_NK.new_zeros(rows * BLOCK, columns * BLOCK)
        padded[: weight_NK.shape[0], : weight_NK.shape[1]] = weight_NK
        blocks = padded.unflatten(1, (columns, BLOCK)).unflatten(0, (rows, BLOCK))
        scale = blocks.abs().amax(dim=(1, 3)) / FP8_MAX
        spread = scale.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
        spread = spread[: weight_NK.shape[0], : weight_NK.shape[1]]
        yield slot.name, _to_fp8(weight_NK, spread)
        yield f"{slot.name}_scale_inv", scale

    def config(self, plain: list[str]) -> dict[str, object]:
        return dict(
            quant_method="fp8",
            fmt="e4m3",
            activation_scheme="dynamic",
            weight_block_size=[BLOCK, BLOCK],
            modules_to_not_convert=plain,
        )


@dataclass(frozen=True)
class Fp8Tensor(Quantization):
    """FP8 with one 0-d scale a projection, and a static input scale if asked for."""

    activation_scheme: str = "dynamic"

    def store(self, slot: Slot, weight_NK: torch.Tensor, seed: int) -> Named:
        scale = weight_NK.abs().amax() / FP8_MAX
        yield slot.name, _to_fp8(weight_NK, scale)
        yield f"{slot.name}_scale", scale
        if self.activation_scheme == "static":
            yield f"{slot.module}.input_scale", self.input_scale(slot, seed)

    def config(self, plain: list[str]) -> dict[str, object]:
        return dict(
            quant_method="fp8",
            activation_scheme=self.activation_scheme,
            ignored_layers=plain,
        )


@dataclass(frozen=True)
class CompressedChannel(Quantization):
    """compressed-tensors FP8: a scale a channel, [N, 1], dynamic per-token inputs."""

    def store(self, slot: Slot, weight_NK: torch.Tensor, seed: int) -> Named:
        scale = weight_NK.abs().amax(dim=1, keepdim=True) / FP8_MAX
        yield slot.name, _to_fp8(weight_NK, scale)
        yield f"{slot.name}_scale", scale

    def config(self, plain: list[str]) -> dict[str, object]:
        return _compressed_config(
            plain, weights=_fp8_args("channel"), inputs=_fp8_args("token", dynamic=True)
        )


@dataclass(frozen=True)
class CompressedTensor(Quantization):
    """compressed-tensors FP8: static scales of shape [1] for weight and input."""

    def store(self, slot: Slot, weight_NK: torch.Tensor, seed: int) -> Named:
        scale = weight_NK.abs().amax().view(1) / FP8_MAX
        yield slot.name, _to_fp8(weight_NK, scale)
        yield f"{slot.name}_scale", scale
        yield f"{slot.module}.input_scale", self.input_scale(slot, seed).view(1)

    def config(self, plain: list[str]) -> dict[str, object]:
        return _compressed_config(
            plain, weights=_fp8_args("tensor"), inputs=_fp8_args("tensor")
        )


def _fp8_args(strategy: str, dynamic: bool = False) -> dict[str, object]:
    return dict(
        num_bits=8, type="float", strategy=strategy, symmetric=True, dynamic=dynamic
    )


def _compressed_config(
    plain: list[str], weights: dict[str, object], inputs: dict[str, object]
) -> dict[str, object]:
    group = dict(targets=["Linear"], weights=weights, input_activations=inputs)
    return dict(
        quant_method="compressed-tensors",
        format="float-quantized",
        quantization_status="compressed",
        config_groups=dict(group_0=group),
        ignore=plain,
    )
