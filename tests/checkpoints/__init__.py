# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Tiny but real checkpoints, for tests, the demo and benchmarks alike.

    case = CASES["qwen3_moe-fp8_block"]
    folder = write_checkpoint(case, seed=1, folder=tmp, tokenizer=True)
    for chunk in chunks(case.tensors(seed=2), bytes_per_chunk=1 << 20, bucket=bucket):
        model.load_weights(chunk)

An architecture lists its tensors as slots, a quantization says how a slot is stored,
and a case joins the two. A tensor's values depend on its name and the seed alone.
"""

from .bucket import chunks
from .case import Case
from .cases import CASES
from .slots import Part, Sizes, Slot
from .writer import write_checkpoint, write_shards

__all__ = [
    "CASES",
    "Case",
    "Part",
    "Sizes",
    "Slot",
    "chunks",
    "write_checkpoint",
    "write_shards",
]
