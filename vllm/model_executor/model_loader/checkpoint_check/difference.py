# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""What a sync from one checkpoint to another would send."""

from collections.abc import Iterator
from dataclasses import dataclass

from vllm.model_executor.model_loader.reload.checks import is_castable
from vllm.model_executor.model_loader.reload.errors import Finding

from .checkpoint import Checkpoint, StoredTensor

__all__ = ["Change", "find_changes", "find_unexpected", "find_unsent"]


@dataclass(frozen=True)
class Change:
    """A tensor before and after a sync."""

    before: StoredTensor
    after: StoredTensor

    @property
    def refusal(self) -> Finding | None:
        """Why a sync would refuse it, if it would."""
        before, after = self.before, self.after
        if before.shape == after.shape and is_castable(
            after.torch_dtype, before.torch_dtype
        ):
            return None
        detail = f"expected {before}, got {after}"
        return Finding(after.layer, after.parameter, detail)

    @property
    def is_none(self) -> bool:
        """Whether all bits are the same; reads up to the first that is not."""
        before, after = self.before, self.after
        if (before.dtype, before.shape) != (after.dtype, after.shape):
            return False
        return all(a == b for a, b in zip(before.chunks(), after.chunks()))


def find_changes(before: Checkpoint, after: Checkpoint) -> list[Change]:
    """Every tensor that both have, in the order in which it lies in its file."""
    both = [
        Change(before.tensors[name], tensor)
        for name, tensor in after.tensors.items()
        if name in before.tensors
    ]
    return sorted(both, key=lambda change: (change.after.file, change.after.start))


def find_unsent(before: Checkpoint, after: Checkpoint) -> Iterator[Finding]:
    """A finding about each tensor of `before` that a sync owes and does not send."""
    for name, tensor in before.tensors.items():
        if name not in after.tensors:
            yield Finding(tensor.layer, tensor.parameter, f"not sent; was {tensor}")


def find_unexpected(before: Checkpoint, after: Checkpoint) -> Iterator[Finding]:
    """A finding about each tensor of `after` that `before` has no place for."""
    for name, tensor in after.tensors.items():
        if name not in before.tensors:
            detail = f"sent, but not in {before.folder}: {tensor}"
            yield Finding(tensor.layer, tensor.parameter, detail)
