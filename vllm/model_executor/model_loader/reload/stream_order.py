# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""An order in which a device does the work of a sync: that of its calls.

A caller may load each chunk on another stream, as vLLM's packed NCCL transfer does on
two in turns. What one call has staged, a later one commits and lets go, so that work
must not overtake what it reads, nor memory be used again before it was read. Steps of
the model, on the stream on which the sync was opened, must not read half of a commit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch

__all__ = ["StreamOrder"]


class StreamOrder:
    """Orders the work of calls, whichever streams they are made on.

        order = StreamOrder.on(devices)
        with order.call():      # the first of each stream's calls, and all later ones
            ...

    Args:
        current: returns the stream that work is queued on; None where there is none.

    """

    def __init__(self, current: Callable[[], torch.Stream] | None):
        self._current = current
        self._seen: dict[int, torch.Stream] = {}
        if current is not None:
            self._note(current())

    @classmethod
    def on(cls, devices: Iterable[torch.device]) -> StreamOrder:
        """The order of work on these devices; a CPU needs none."""
        is_needed = any(device.type not in ("cpu", "meta") for device in devices)
        return cls(torch.accelerator.current_stream if is_needed else None)

    @contextmanager
    def call(self) -> Iterator[None]:
        """Do the block's work after that of earlier calls, and before that of later."""
        if self._current is None:
            yield
            return
        stream = self._current()
        others = self._note(stream)
        for other in others:
            stream.wait_stream(other)
        try:
            yield
        finally:
            for other in others:
                other.wait_stream(stream)

    def _note(self, stream: torch.Stream) -> list[torch.Stream]:
        """Note a stream, and return the others."""
        self._seen.setdefault(stream.stream_id, stream)
        return [s for number, s in self._seen.items() if number != stream.stream_id]
