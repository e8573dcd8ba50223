# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""After a good sync a model is bit-identical to a cold load, on every architecture."""

from collections.abc import Callable

import pytest

from tests.checkpoints import CASES
from tests.harness.snapshot import assert_same, snapshot
from tests.harness.sync import sync_parts
from vllm.model_executor.model_loader.reload import (
    reload_status,
)

# An iterator is staged one by one, a list in runs, and the next one in those runs.
SENT: tuple[tuple[int, Callable], ...] = ((2, iter), (3, list), (2, list))


@pytest.mark.parametrize("policy", ["layer", "model"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_synced_model_equals_cold_load(
    case, policy, make_model, cold_load, nan_memory, monkeypatch
):
    monkeypatch.setenv("VLLM_RELOAD_COMMIT", policy)
    model, vllm_config = built = make_model(case, seed=1)
    for version, (seed, form) in enumerate(SENT, start=1):
        sync_parts(built, [form(case.tensors(seed))])
        assert reload_status(model).version == version
        assert_same(snapshot(model), cold_load(case, seed))
