# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Make memory that nobody wrote show itself."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.utils.deterministic


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
