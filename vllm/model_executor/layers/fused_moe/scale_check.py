# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""What is done about a bad weight scale that is found outside of a sync."""

from __future__ import annotations

from enum import Enum

import vllm.envs as envs

__all__ = ["ScaleCheck"]


class ScaleCheck(Enum):
    """How to answer NaN, infinite and negative weight scales.

    OFF: nobody looks.
    WARN: they are logged.
    RAISE: they are an error.
    """

    OFF = "off"
    WARN = "warn"
    RAISE = "raise"

    @classmethod
    def from_environment(cls) -> ScaleCheck:
        """The answer that VLLM_MOE_SCALE_CHECK names.

        Raises:
            ValueError: it names none.

        """
        return cls(envs.VLLM_MOE_SCALE_CHECK)
