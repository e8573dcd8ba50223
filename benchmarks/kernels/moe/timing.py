# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Times of launches on a GPU, without the host's part in them."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from statistics import median

import torch

__all__ = ["alternating", "capture", "milliseconds"]

Launch = Callable[[], object]


def capture(launches: Sequence[Launch]) -> Launch:
    """Capture launches, one after the other, in a CUDA graph; return its replay."""
    for launch in launches:
        launch()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for launch in launches:
            launch()
    return graph.replay


def alternating(
    contestants: Mapping[str, Launch], repeats: int, per_replay: int
) -> dict[str, list[float]]:
    """Time replays in turns, so that a slow moment of the machine hits them all.

    Args:
        contestants: what is replayed, by name.
        repeats: replays of each.
        per_replay: launches in a replay.

    Returns:
        Milliseconds of a launch, one value for each replay.

    """
    events: dict[str, list] = {name: [] for name in contestants}
    event = partial(torch.cuda.Event, enable_timing=True)
    for turn in range(repeats + 1):
        for name, replay in contestants.items():
            start, end = event(), event()
            start.record()
            replay()
            end.record()
            if turn:  # the first warms up
                events[name].append((start, end))
    torch.cuda.synchronize()
    return {
        name: [start.elapsed_time(end) / per_replay for start, end in pairs]
        for name, pairs in events.items()
    }


def milliseconds(launches: Sequence[Launch], repeats: int = 5) -> float:
    """Return the median time of one of these launches in a CUDA graph."""
    times = alternating({"": capture(launches)}, repeats, len(launches))
    return median(times[""])
