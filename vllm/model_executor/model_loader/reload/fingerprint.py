# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Row sums that tell whether a tensor that comes again is the one that came before.

Once a layer is committed its staging is gone, and the tensors that serve may have been
repacked. To tell a repeated tensor from a changed one, 64 bits are kept of each row:
its bytes, as little-endian integers b[i], summed as b[i] * m[i] modulo 2**64 with
multipliers m[i] that are odd, so that any single changed byte changes the sum.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from .ledger import boxes_of_view

if TYPE_CHECKING:
    from .staging import StagedTensor

__all__ = ["Fingerprint"]

# Fractional bits of the golden ratio: multiplication spreads low bits over high ones.
_SPREAD = -7046029254386353131
_CHUNK_BYTES = 1 << 24


class Fingerprint:
    """Row sums of one staged tensor, int64 [*shape[:-1]], on its device."""

    def __init__(self, tensor: torch.Tensor):
        self._sums = _row_sums(tensor)

    def check(self, tensor: StagedTensor, view: torch.Tensor, source: object) -> None:
        """Compare `source`, about to be written to `view`, with what was committed.

        Raises:
            WeightSyncError: it differs, or covers parts of rows and cannot be compared.

        """
        boxes = boxes_of_view(view, tensor.meta)
        whole_rows = view.dim() == 0 or view.shape[-1:] == tensor.meta.shape[-1:]
        if len(boxes) != 1 or not whole_rows or not isinstance(source, torch.Tensor):
            raise tensor.refuse("came again after its layer was committed, in part")
        came = source.to(device=self._sums.device, dtype=tensor.meta.dtype)
        box = boxes[0]
        extents = [b - a for a, b in zip(box.start, box.stop)]
        sums = _row_sums(came.expand(view.shape).reshape(extents))
        if not torch.equal(sums, self._sums[box.slices()[:-1]]):
            raise tensor.refuse(
                "came again with other values after its layer was committed; send "
                "each tensor once, or set VLLM_RELOAD_COMMIT=model",
                box,
            )


def _row_sums(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.dim() == 0:
        return _row_sums(tensor.reshape(1))
    rows = tensor.reshape(-1, tensor.shape[-1])
    step = max(1, _CHUNK_BYTES // max(1, rows.shape[-1] * rows.element_size()))
    sums = [_sum_bytes(rows[i : i + step]) for i in range(0, rows.shape[0], step)]
    return torch.cat(sums).reshape(tensor.shape[:-1])


def _sum_bytes(rows: torch.Tensor) -> torch.Tensor:
    data = rows.contiguous().view(torch.uint8)
    padding = -data.shape[-1] % 8
    words = torch.nn.functional.pad(data, (0, padding)).view(torch.int64)
    index = torch.arange(1, words.shape[-1] + 1, device=words.device)
    return (words * (index * _SPREAD | 1)).sum(-1)
