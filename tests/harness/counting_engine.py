# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""An engine behind routes that only counts what it is asked."""

__all__ = ["CountingEngine"]


class CountingEngine:
    """Counts how often a route asked for something."""

    def __init__(self):
        self.asked = 0

    def __getattr__(self, name: str):
        async def answer(*args, **kwargs):
            self.asked += 1

        return answer
