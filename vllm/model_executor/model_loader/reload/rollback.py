# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The way back from layers that a sync has committed before it failed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

import vllm.envs as envs
from vllm.utils.platform_utils import is_pin_memory_available

from .commit import Commit, Place

__all__ = ["Rollback"]

_Key = tuple[Place, torch.dtype]


class Rollback:
    """Keeps what commits are about to overwrite, until the sync is over.

        rollback = Rollback()
        for commit in commits:
            rollback.keep(commit)
        apply_commits(commits)
        rollback.clear()        # or rollback.restore()

    Values of tensors are copied to host memory, pinned where the tensors are on an
    accelerator. Objects that a commit exchanges are themselves kept.
    """

    def __init__(self) -> None:
        self._values: dict[_Key, tuple[torch.Tensor, torch.Tensor]] = {}
        self._reversions: list[Callable[[], Any]] = []

    @classmethod
    def from_environment(cls) -> Rollback | None:
        """A rollback if VLLM_RELOAD_ROLLBACK asks for one.

        Raises:
            ValueError: it names no kind of rollback.

        """
        kind = envs.VLLM_RELOAD_ROLLBACK
        if kind not in ("off", "host"):
            raise ValueError(
                f"VLLM_RELOAD_ROLLBACK must be 'off' or 'host', but is {kind!r}"
            )
        return cls() if kind == "host" else None

    @property
    def nbytes(self) -> int:
        """Bytes of the host memory that holds values."""
        return sum(old.nbytes for _, old in self._values.values())

    @torch.no_grad()
    def keep(self, commit: Commit) -> None:
        """Keep what `commit` will overwrite."""
        for place, (live, _) in zip(commit.targets, commit.copies):
            key = place, live.dtype
            # Of memory that several layers share, the first copy is the old value.
            if key not in self._values:
                self._values[key] = live, _host_copy(live.data)
        self._reversions += [each.revert for each in commit.assignments]

    @torch.no_grad()
    def restore(self) -> None:
        """Undo all commits, the last one first, and keep nothing any more."""
        try:
            while self._reversions:
                self._reversions.pop()()
            while self._values:
                _, (live, old) = self._values.popitem()
                live.data.copy_(old)
        finally:
            self.clear()

    def clear(self) -> None:
        """Keep nothing any more."""
        self._values.clear()
        self._reversions.clear()


def _host_copy(tensor: torch.Tensor) -> torch.Tensor:
    pinned = tensor.device.type != "cpu" and is_pin_memory_available()
    copy = torch.empty_like(tensor, device="cpu", pin_memory=pinned)
    # The stream that copies is the one that overwrites the tensor afterwards.
    return copy.copy_(tensor, non_blocking=pinned)
