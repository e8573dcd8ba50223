# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""How far a sync reached: a trainer may update a part of a model, and should know."""

from collections.abc import Iterable
from dataclasses import dataclass

from .staging import StagedTensor

__all__ = ["SyncReach"]


@dataclass(frozen=True)
class SyncReach:
    """What a complete sync wrote, of what loading a checkpoint writes.

    Attributes:
        updated: qualified names of tensors that it wrote.
        kept: of those that it did not.

    """

    updated: tuple[str, ...]
    kept: tuple[str, ...]

    @classmethod
    def of(cls, tensors: Iterable[StagedTensor]) -> "SyncReach":
        """Sort a model's tensors; those that no checkpoint has to bring are neither."""
        tensors = list(tensors)
        updated = tuple(t.path for t in tensors if t.written)
        kept = (t for t in tensors if not t.written and not t.ledger.empty)
        return cls(updated, tuple(t.path for t in kept))
