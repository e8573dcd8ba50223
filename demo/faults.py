# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""What a trainer may send: complete syncs, and each fault of the defect table."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch

from tests.checkpoints import chunks

Named = tuple[str, torch.Tensor]
Send = Callable[[list[Named]], Iterator[Iterable[Named]]]

BYTES_PER_CHUNK = 1 << 19

WEIGHT = "model.layers.0.mlp.experts.0.down_proj.weight"
SCALE = f"{WEIGHT}_scale_inv"


@dataclass(frozen=True)
class Fault:
    """One case: how the tensors of a checkpoint are sent, and what this fork answers.

    Attributes:
        title: Names the case.
        send: Gives the chunks in which the tensors are sent.
        checkpoint: What is sent, a name in `tests.checkpoints.CASES`.
        error: Type of the exception that this fork raises; none: the sync succeeds.
        names: What the message of that exception names.
    """

    title: str
    send: Send
    checkpoint: str = "qwen3_moe-fp8_block"
    error: str = ""
    names: tuple[str, ...] = ()


def complete(tensors: list[Named]) -> Iterator[Iterable[Named]]:
    """Send everything once, in the order of the checkpoint."""
    yield tensors


def through_one_bucket(tensors: list[Named]) -> Iterator[Iterable[Named]]:
    """Pack each chunk into the memory of the one before."""
    yield from chunks(tensors, BYTES_PER_CHUNK, torch.empty(1 << 20, dtype=torch.uint8))


def without_scales(tensors: list[Named]) -> Iterator[Iterable[Named]]:
    """Send the weights alone."""
    yield [(name, tensor) for name, tensor in tensors if not _is_scale(name)]


def one_weight_twice(tensors: list[Named]) -> Iterator[Iterable[Named]]:
    """Send the weights, one of them again, then the scales."""
    scales = [(name, tensor) for name, tensor in tensors if _is_scale(name)]
    weights = [(name, tensor) for name, tensor in tensors if not _is_scale(name)]
    yield [*weights, (WEIGHT, dict(weights)[WEIGHT]), *scales]


def cut_down(tensors: list[Named]) -> Iterator[Iterable[Named]]:
    """Send the upper left corner of one weight, 3 x 3."""
    yield _replaced(tensors, WEIGHT, lambda weight: weight[:3, :3].contiguous())


def nan_scale(tensors: list[Named]) -> Iterator[Iterable[Named]]:
    """Send NaN as the scales of one weight."""
    yield _replaced(tensors, SCALE, lambda scale: torch.full_like(scale, torch.nan))


def dies_half_way(tensors: list[Named]) -> Iterator[Iterable[Named]]:
    """Send the first half, then lose the connection."""

    def lost() -> Iterator[Named]:
        yield from tensors[: len(tensors) // 2]
        raise ConnectionResetError("the trainer went away")

    yield lost()


def _is_scale(name: str) -> bool:
    return name.endswith("_scale_inv")


def _replaced(
    tensors: list[Named], name: str, change: Callable[[torch.Tensor], torch.Tensor]
) -> list[Named]:
    return [(key, change(tensor) if key == name else tensor) for key, tensor in tensors]


EXPERT = ("model.layers.0.mlp.experts", "expert 0", "down")

FAULTS = (
    Fault("complete sync", complete),
    Fault("chunks through one reused bucket", through_one_bucket),
    Fault("one weight sent twice, then the scales", one_weight_twice),
    Fault(
        "scales never sent",
        without_scales,
        error="WeightSyncError",
        names=("model.layers.0.mlp.experts", "weight_scale_inv", "expert 0", "gate"),
    ),
    Fault(
        "a weight cut down to 3 x 3",
        cut_down,
        error="WeightSyncError",
        names=(*EXPERT, "w2_weight", "[256, 128]", "[3, 3]"),
    ),
    Fault(
        "a scale that is NaN",
        nan_scale,
        error="WeightSyncError",
        names=(*EXPERT, "weight_scale_inv", "nan"),
    ),
    Fault(
        "the trainer dies half way",
        dies_half_way,
        error="ConnectionResetError",
        names=("the trainer went away",),
    ),
    Fault("bf16 experts, complete sync", complete, "qwen3_moe-bf16"),
    Fault("static per-tensor FP8", complete, "qwen3_moe-fp8_tensor_static"),
    Fault(
        "compressed-tensors static FP8", complete, "qwen3_moe-compressed_tensor_static"
    ),
    Fault("k and v scales, FP8 cache", complete, "qwen3_moe-fp8_block-fp8_kv"),
    Fault("gpt-oss bf16", complete, "gpt_oss-bf16"),
)
