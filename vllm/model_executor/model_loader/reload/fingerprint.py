# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Sums that tell whether a tensor that comes again is the one that came before.

Once a layer is committed its staging is gone. Tensors that serve as they were staged
tell what was sent, but they may have been repacked. To tell a repeated tensor from a
changed one, 64 bits are then kept of the rows that were written together: the bytes of
each, as little-endian integers b[i], of which the high half is mixed into the low one,
summed as b[i] * m[i] modulo 2**64, and the sums of the rows summed in the same way.
Multipliers m[i] are odd, so that any single changed byte changes the sum. Modulo 2**64
the highest bits would else count alike wherever they are: two signs that change would
cancel each other.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import gcd
from typing import TYPE_CHECKING

import torch

from vllm.triton_utils import HAS_TRITON

from .bitwise import same_bytes
from .ledger import Box, Ledger, boxes_of_view

if TYPE_CHECKING:
    from .staging import StagedTensor

__all__ = ["Fingerprint", "fingerprints"]

# Fractional bits of the golden ratio: multiplication spreads low bits over high ones.
_SPREAD = -7046029254386353131
# Scales, which are also sent one by one, are kept as they are.
_SMALL_BYTES = 1 << 16


class Fingerprint:
    """What was staged of one tensor: its values if somebody keeps them, or else sums.

    Args:
        values: all of it, which nobody changes; or None.
        together: how many rows are summed to one.
        sums: otherwise, [..., rows / together].

    """

    def __init__(
        self, values: torch.Tensor | None, together: int, sums: torch.Tensor | None
    ):
        self._values = values
        self._together = together
        self._sums = sums

    @classmethod
    def kept_in(cls, tensor: torch.Tensor) -> Fingerprint:
        """That of a tensor whose values will not change."""
        return cls(tensor.detach(), 1, None)

    def check(self, tensor: StagedTensor, view: torch.Tensor, source: object) -> None:
        """Compare `source`, about to be written to `view`, with what was committed.

        Raises:
            WeightSyncError: it differs, or covers parts of rows and cannot be compared.

        """
        if not isinstance(source, torch.Tensor):
            raise tensor.refuse("came again after its layer was committed, in part")
        came = source.to(tensor.device, tensor.meta.dtype).expand(view.shape)
        boxes = boxes_of_view(view, tensor.meta)
        if self._values is not None:
            equal = self._equals_values(tensor, view, came)
        else:
            equal = self._equals_sums(tensor, view, came, boxes)
        if not equal:
            raise tensor.refuse(
                "came again with other values after its layer was committed; send "
                "each tensor once, or set VLLM_RELOAD_COMMIT=model",
                boxes[0] if len(boxes) == 1 else None,
            )

    def equals(self, other: Fingerprint) -> bool:
        """Whether two tensors that were written alike are the same."""
        for a, b in ((self._values, other._values), (self._sums, other._sums)):
            if a is not None and (b is None or not same_bytes(a, b)):
                return False
        return True

    def _equals_values(
        self, tensor: StagedTensor, view: torch.Tensor, came: torch.Tensor
    ) -> bool:
        assert self._values is not None
        offset = view.storage_offset() - tensor.meta.storage_offset()
        offset += self._values.storage_offset()
        kept = self._values.as_strided(view.shape, view.stride(), offset)
        return same_bytes(kept, came)

    def _equals_sums(
        self,
        tensor: StagedTensor,
        view: torch.Tensor,
        came: torch.Tensor,
        boxes: list[Box],
    ) -> bool:
        assert self._sums is not None
        whole_rows = view.shape[-1:] == tensor.meta.shape[-1:]
        in_order = list(view.stride()) == sorted(view.stride(), reverse=True)
        if len(boxes) != 1 or not whole_rows or not in_order:
            raise tensor.refuse("came again after its layer was committed, in part")
        extents = [b - a for a, b in zip(boxes[0].start, boxes[0].stop)]
        *where, rows = boxes[0].slices()[:-1] or (slice(1),)
        if rows.start and rows.start % self._together or rows.stop % self._together:
            raise tensor.refuse("came again after its layer was committed, in part")
        start, stop = (n and n // self._together for n in (rows.start, rows.stop))
        sums = _sums(came.reshape(extents), self._together)
        return torch.equal(sums, self._sums[(*where, slice(start, stop))])


def fingerprints(
    staged: Sequence[tuple[torch.Tensor, Ledger]],
) -> list[Fingerprint]:
    """Fingerprints of tensors of one device, and how each was written."""
    tensors = [tensor.detach() for tensor, _ in staged]
    large = {
        i: (tensor, _rows_written_together(tensor, ledger))
        for i, (tensor, (_, ledger)) in enumerate(zip(tensors, staged))
        if tensor.nbytes > _SMALL_BYTES
    }
    sums = dict(zip(large, _sums_of_all(list(large.values()))))
    return [
        Fingerprint(None, large[i][1], sums[i])
        if i in large
        else Fingerprint.kept_in(tensor.clone())
        for i, tensor in enumerate(tensors)
    ]


def _sums_of_all(tensors: list[tuple[torch.Tensor, int]]) -> Iterator[torch.Tensor]:
    """Sums of each, in one launch where a kernel runs."""
    launched = _launch([(t, n) for t, n in tensors if not t.is_cpu])
    for tensor, together in tensors:
        sums = launched.get(tensor.data_ptr())
        if sums is None:
            yield _sums(tensor, together)
        else:
            yield sums.reshape(*tensor.shape[:-2], -1)


def _launch(tensors: list[tuple[torch.Tensor, int]]) -> dict[int, torch.Tensor]:
    """Sums by address, of those that the kernel takes."""
    if not tensors or not HAS_TRITON:
        return {}
    from vllm.model_executor.kernels.group_sums import can_sum_groups, sum_groups

    fit = [(t, together) for t, together in tensors if can_sum_groups(t, together)]
    return dict(zip((t.data_ptr() for t, _ in fit), sum_groups(fit)))


def _rows_written_together(tensor: torch.Tensor, ledger: Ledger) -> int:
    """The largest number of rows of which every box holds a multiple."""
    return gcd(tensor.shape[-2], ledger.step()) if tensor.dim() > 1 else 1


def _sums(tensor: torch.Tensor, together: int) -> torch.Tensor:
    """Sums of a tensor [..., rows, columns] as [..., rows / together]."""
    if tensor.dim() < 2:
        tensor = tensor.reshape(1, -1)
    sums = _row_sums(tensor.reshape(-1, tensor.shape[-1]))
    sums = sums.reshape(*tensor.shape[:-2], -1, together)
    return (sums * _multipliers(together, tensor.device)).sum(-1)


def _row_sums(rows: torch.Tensor) -> torch.Tensor:
    row_bytes = max(1, rows.shape[-1] * rows.element_size())
    multipliers = _multipliers(-(-row_bytes // 8), rows.device)
    step = max(1, _chunk_bytes(rows.device) // row_bytes)
    chunks = (rows[i : i + step] for i in range(0, rows.shape[0], step))
    words = (_mixed(_words(chunk)) for chunk in chunks)
    return torch.cat([_weighted_sums(each, multipliers) for each in words])


def _mixed(words: torch.Tensor) -> torch.Tensor:
    """Integers with their high halves mixed into their low ones."""
    high = words >> 32
    high &= 0xFFFFFFFF  # the shift brings copies of the sign
    high ^= words
    return high


def _weighted_sums(words: torch.Tensor, multipliers: torch.Tensor) -> torch.Tensor:
    if words.device.type == "cpu":  # no other device multiplies integer matrices
        return words @ multipliers
    return (words * multipliers).sum(-1)


def _multipliers(count: int, device: torch.device) -> torch.Tensor:
    return torch.arange(1, count + 1, device=device) * _SPREAD | 1


def _chunk_bytes(device: torch.device) -> int:
    """Bytes to take at a time: what a processor's cache holds, or worth a launch."""
    return 1 << 18 if device.type == "cpu" else 1 << 24


def _words(rows: torch.Tensor) -> torch.Tensor:
    """The bytes of each row as 64-bit integers, of which the last is filled up."""
    data = rows.contiguous().view(torch.uint8)
    if padding := -data.shape[-1] % 8:
        data = torch.nn.functional.pad(data, (0, padding))
    elif data.storage_offset() % 8 or data.data_ptr() % 8:  # in a bucket, say
        data = data.clone()
    return data.view(torch.int64)
