# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""What a weight sync says when it cannot be completed."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

__all__ = [
    "MAX_LINES",
    "Finding",
    "SyncConflictError",
    "TransferMissingError",
    "WeightSyncError",
]

# A message is read in a terminal and in an HTTP body: it must stay short.
MAX_LINES = 20


@dataclass(frozen=True)
class Finding:
    """One thing that is missing or invalid in a sync.

    Attributes:
        layer: qualified name of the module, as in `model.named_modules()`.
        parameter: name of the tensor inside that module.
        detail: what is wrong with it.
        expert: local expert index, for expert parameters.
        shard: "gate", "up" or "down", for expert parameters.

    """

    layer: str
    parameter: str
    detail: str
    expert: int | None = None
    shard: str | None = None

    def __str__(self) -> str:
        words = [f"{self.layer}.{self.parameter}" if self.layer else self.parameter]
        if self.expert is not None:
            words.append(f"expert {self.expert}")
        if self.shard is not None:
            words.append(self.shard)
        return f"{' '.join(words)}: {self.detail}"


class WeightSyncError(RuntimeError):
    """A weight sync was refused.

    Attributes:
        missing: what the sync owed and did not bring.
        invalid: what it brought and must not be served.

    """

    def __init__(
        self,
        summary: str,
        missing: Sequence[Finding] = (),
        invalid: Sequence[Finding] = (),
    ):
        self.summary = summary
        self.missing = tuple(missing)
        self.invalid = tuple(invalid)
        super().__init__("\n".join(self._lines()))

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.summary, self.missing, self.invalid)

    def _lines(self) -> list[str]:
        found = [f"  missing: {finding}" for finding in self.missing]
        found += [f"  invalid: {finding}" for finding in self.invalid]
        if len(found) < MAX_LINES:
            return [self.summary, *found]
        shown = found[: MAX_LINES - 2]
        return [self.summary, *shown, f"  and {len(found) - len(shown)} more"]


class SyncConflictError(RuntimeError):
    """A call came while another sync was open, or while none was."""


class TransferMissingError(RuntimeError):
    """The engine was started without a way for weights to come."""
