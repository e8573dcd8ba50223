# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Calls of a model's `load_weights` that have nothing to load."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .routing import RouteRecorder
from .staging import StagingMode

__all__ = ["IdleCalls"]


class IdleCalls:
    """Knows what a model does when all of a chunk went past it.

    A model that was given nothing, and touched nothing, does the same when it is given
    nothing again. That it may do so, all layers are shown to it, which costs more than
    the copies of a small chunk.

    Args:
        recorder: counts what the model was given.
        mode: counts what it touched.

    """

    def __init__(self, recorder: RouteRecorder, mode: StagingMode):
        self._recorder = recorder
        self._mode = mode
        self._known_at: tuple[int, int] | None = None
        self._result: Any = None

    def run(self, load: Callable[[], Any]) -> Any:
        """Load nothing, or return what the last call returned that was the same."""
        before = self._done()
        if self._known_at != before:
            self._result = load()
            self._known_at = before if self._done() == before else None
        # The caller may add to a set of names.
        return set(self._result) if isinstance(self._result, set) else self._result

    def _done(self) -> tuple[int, int]:
        return self._recorder.count, self._mode.touches
