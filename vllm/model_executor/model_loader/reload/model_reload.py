# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""What a model knows of its syncs."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field, replace
from typing import Protocol

from vllm.config import ModelConfig

from .plan import Plan
from .reach import SyncReach
from .status import ReloadStatus
from .sync_report import SyncReport

__all__ = ["ModelReload", "Sync"]

# Reports that nobody takes must not add up.
MAX_KEPT = 100


class Sync(Protocol):
    """A sync that is under way, of whatever kind."""

    @property
    def is_open(self) -> bool:
        """Whether weights may still be loaded."""

    @property
    def mixture(self) -> str:
        """How much of the model serves new weights already; empty if nothing does."""

    def finish(self, model_config: ModelConfig | None) -> None:
        """Let the new weights serve."""

    def abort(self, reason: str, error: BaseException | None = None) -> None:
        """Let the old weights serve."""


@dataclass
class ModelReload:
    """What a model knows of its syncs, from one to the next.

    Attributes:
        version: complete syncs so far.
        first_loaded: whether a first load was seen, so that its writes are known.
        lost: why no whole weights serve, if so; a sync then owes everything.
        fenced: whether, when lost, requests must be refused.
        transaction: the open sync, or the one that failed and was not closed.
        plan: where earlier syncs brought what they were given.
        unchecked: by which road weights came past the checks since a sync of all.
        checksums: of what was sent, by checkpoint name, if they are asked for.
        ended: reports of the syncs that ended last, without their layers, for whoever
            takes them.
        reach: what the last complete sync wrote, until somebody has asked.

    """

    version: int = 0
    first_loaded: bool = False
    lost: str = ""
    fenced: bool = False
    transaction: Sync | None = None
    plan: Plan = field(default_factory=Plan)
    unchecked: str = ""
    checksums: dict[str, str] = field(default_factory=dict)
    ended: deque[SyncReport] = field(default_factory=lambda: deque(maxlen=MAX_KEPT))
    reach: SyncReach | None = None

    @property
    def status(self) -> ReloadStatus:
        return replace(self._checked_status(), unchecked=self.unchecked)

    def _checked_status(self) -> ReloadStatus:
        if self.lost:
            return ReloadStatus("inconsistent", self.version, self.lost, self.fenced)
        if self.transaction is None or not self.transaction.is_open:
            return ReloadStatus("serving", self.version)
        mixture = self.transaction.mixture
        detail = mixture and f"a weight sync is under way: {mixture}"
        return ReloadStatus("updating", self.version, detail, fenced=bool(mixture))
