# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""What can be said of the weights that a model serves."""

from dataclasses import dataclass
from typing import Literal

__all__ = ["ReloadState", "ReloadStatus"]

ReloadState = Literal["serving", "updating", "inconsistent"]


@dataclass(frozen=True)
class ReloadStatus:
    """State of a model's weights.

    Attributes:
        state: "serving" whole weights of one version; "updating" while a sync is open
            and the old weights are whole; "inconsistent" when the weights are a
            mixture, were lost, or never were loaded, until a complete sync.
        version: complete syncs so far.
        detail: why, when inconsistent.
        fenced: whether requests must be refused. Weights that were never loaded
            (`load_format=dummy`) are inconsistent, but there to be run.

    """

    state: ReloadState
    version: int
    detail: str = ""
    fenced: bool = False
