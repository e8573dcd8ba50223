# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Make memory that nobody wrote show itself, and count what is allocated."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate

import pytest
import torch
import torch.utils.deterministic
from torch.profiler import ProfilerActivity, profile


@contextmanager
def nan_memory() -> Iterator[None]:
    """Let every tensor that torch allocates without values start as NaN.

    `torch.empty`, its `_like`, `_strided`, `new_` and `resize_` relatives then hold NaN
    in every floating-point format, float8 included, and the largest value in integer
    ones. Raw storages (`torch.UntypedStorage(n)`) are not filled.
    """
    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(enabled, warn_only=warn_only)


@dataclass
class Allocated:
    """Bytes that torch's CPU allocator gave out, less those it got back.

    Attributes:
        peak: the most at any time.
        left: at the end.

    """

    peak: int = 0
    left: int = 0


@contextmanager
def allocated() -> Iterator[Allocated]:
    """Count bytes from here to the end of the block, which then are in the result."""
    result = Allocated()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        yield result
    events = profiler.profiler.kineto_results.events()
    changes = sorted(
        (e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"
    )
    totals = list(accumulate(size for _, size in changes))
    result.peak, result.left = max(totals, default=0), (totals or [0])[-1]
