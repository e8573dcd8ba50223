# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Layers that serve their tensors just as they are staged.

Between loading and serving a layer is processed, and for many kernels nothing comes of
it: a kernel object is made around the same tensors. One processing tells. If no
operator looked at a value, every byte is as it was staged, and all there is to commit
are copies to the layer's tensors of the same names, then that is so whatever the values
are: it is not processed again, as long as these tensors serve.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from .commit import Commit, Place, place_of
from .errors import WeightSyncError
from .fingerprint import Fingerprint, fingerprints
from .processing import is_processed, pair_layer, prepare_as_staged, process_layer
from .staging import StagedLayer

__all__ = ["commit_as_staged", "prepare_commit_of"]


def commit_as_staged(staged: StagedLayer) -> Commit | None:
    """Pair a layer that is known to serve what is staged with the one that serves.

    Args:
        staged: the layer, complete and not exposed.

    Returns:
        None if something is made of its tensors, or nobody knows.

    """
    info = staged.info
    if not info.as_staged:
        return None if is_processed(staged.layer) else _prepare_as_staged(staged)
    commit = _prepare_as_staged(staged)
    if _targets(commit) == info.as_staged:
        return commit
    info.as_staged = None
    return None


def prepare_commit_of(staged: StagedLayer, renew: bool = False) -> Commit:
    """Pair a staged layer with the one that serves, processed if it has to be.

    Args:
        staged: the layer, complete and not exposed; no attention layer or its child.
        renew: see `process_layer`.

    """
    if renew:
        return pair_layer(staged, process_layer(staged, renew=True), renew=True)
    commit = commit_as_staged(staged)
    if commit is not None:
        return commit
    info = staged.info
    if info.as_staged is not None:
        return pair_layer(staged, process_layer(staged))
    watch = _ProcessingWatch(staged)
    commit = pair_layer(staged, process_layer(staged, watching=watch))
    info.as_staged = _targets(commit) if watch.saw_nothing(commit) else frozenset()
    return commit


def _prepare_as_staged(staged: StagedLayer) -> Commit:
    with torch._C.DisableTorchFunction():
        return prepare_as_staged(staged)


class _ProcessingWatch(TorchDispatchMode):
    """Finds out whether processing makes anything of what is staged."""

    def __init__(self, staged: StagedLayer):
        super().__init__()
        self._staged = staged
        self._made_more_than_views = False
        self._before = self._sums()

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        self._made_more_than_views |= not getattr(func, "is_view", False)
        return func(*args, **(kwargs or {}))

    def saw_nothing(self, commit: Commit) -> bool:
        """Whether `commit`, made by the processing, is what was staged, and no more."""
        if self._made_more_than_views or commit.assignments:
            return False
        try:
            expected = _prepare_as_staged(self._staged)
        except WeightSyncError:  # a tensor that does not serve
            return False
        # A kernel may not ask torch before it changes a tensor.
        unchanged = all(a.equals(b) for a, b in zip(self._before, self._sums()))
        return unchanged and _pairs(commit) == _pairs(expected)

    def _sums(self) -> list[Fingerprint]:
        tensors = [t for t in self._staged.tensors if t.meta.numel()]
        return fingerprints([(t.materialize(), t.ledger) for t in tensors])


def _pairs(commit: Commit) -> set[tuple[Place, Place]]:
    return set(zip(commit.targets, (place_of(new) for _, new in commit.copies)))


def _targets(commit: Commit) -> frozenset[Place]:
    with torch._C.DisableTorchFunction():
        return frozenset(commit.targets)
