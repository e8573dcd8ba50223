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
        state: "serving" whole weights of one version; "updating" while a sync is open;
            "inconsistent" when what is left of a sync is a mixture, or the weights
            were lost or never loaded, until a complete sync.
        version: complete syncs so far.
        detail: why requests must be refused, or why the weights are inconsistent.
        fenced: whether requests must be refused: after a sync that left a mixture, and
            during one from the first layer that it committed. Weights that were never
            loaded (`load_format=dummy`) are inconsistent, but there to be run.
        unchecked: by which road weights came past the checks of a sync, since the last
            sync that brought all of them; empty if none did.

    """

    state: ReloadState
    version: int
    detail: str = ""
    fenced: bool = False
    unchecked: str = ""
