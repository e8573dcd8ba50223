# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The health of an engine client whose engine core is a stand-in."""

import asyncio
from types import SimpleNamespace

import pytest

from vllm.v1.engine import weight_health
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError
from vllm.v1.engine.refused_output import WeightsInconsistentError


class Core:
    """Answers at once, unless it is to wait."""

    def __init__(self, error: Exception | None = None, waits: bool = False):
        self.error = error
        self.waits = waits

    async def call_utility_async(self, method: str) -> None:
        assert method == "check_weights"
        if self.waits:
            await asyncio.Event().wait()
        if self.error is not None:
            raise self.error


def check(core: Core, dead: bool = False) -> None:
    engine = SimpleNamespace(
        engine_core=core, errored=dead, dead_error=EngineDeadError()
    )
    asyncio.run(AsyncLLM.check_health(engine))


def test_an_engine_that_serves_is_healthy():
    check(Core())


def test_an_engine_that_refuses_all_requests_is_not():
    with pytest.raises(WeightsInconsistentError, match="a mixture"):
        check(Core(WeightsInconsistentError("a mixture")))


def test_an_engine_that_is_busy_is_healthy(monkeypatch):
    monkeypatch.setattr(weight_health, "PATIENCE_SECONDS", 0.01)
    check(Core(waits=True))


def test_an_engine_that_is_dead_is_not_asked():
    with pytest.raises(EngineDeadError):
        check(Core(AssertionError("it was asked")), dead=True)
