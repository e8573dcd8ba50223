# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""What may go wrong while a trainer syncs into a server: one fault, or many in a row.

`SYNC_SCHEDULES` sets how many random schedules are tried.
"""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test

from tests.checkpoints import write_checkpoint
from tests.harness import stand_ins
from tests.harness.fault_schedule import (
    CASE,
    SERVER_OPTIONS,
    A,
    B,
    FaultBench,
    FaultSchedule,
)
from tests.harness.models import build, single_rank
from tests.harness.server import starting
from vllm.model_executor.model_loader.weight_checksum import compute_tensor_digests

SCHEDULES = int(os.environ.get("SYNC_SCHEDULES", "500"))
STEPS = 10


@pytest.fixture(scope="module")
def bench(tmp_path_factory) -> Iterator[FaultBench]:
    folder = tmp_path_factory.mktemp("checkpoints")
    folders = {s: write_checkpoint(CASE, s, folder / str(s), True) for s in (A, B)}
    log = folder / "server.log"
    with starting(folders[A], log, SERVER_OPTIONS, {}) as server:
        digests = cold_digests(folders)
        server.wait()
        yield FaultBench(server, folders, digests)


def cold_digests(folders: dict[int, Path]) -> dict[int, dict[str, str]]:
    """Load each checkpoint in this process."""
    dtype = torch.get_default_dtype()
    with pytest.MonkeyPatch.context() as patch, single_rank():
        stand_ins.install(patch)
        models = {seed: build(CASE, folder).model for seed, folder in folders.items()}
    torch.set_default_dtype(dtype)
    return {seed: compute_tensor_digests(model) for seed, model in models.items()}


@pytest.mark.timeout(0)
def test_no_schedule_of_faults_corrupts_or_kills(bench):
    run_state_machine_as_test(
        lambda: FaultSchedule(bench),
        settings=settings(
            max_examples=SCHEDULES,
            stateful_step_count=STEPS,
            deadline=None,
            database=None,
            # A schedule is short, and a server that has failed may go on failing.
            phases=[Phase.generate],
            derandomize="SYNC_SCHEDULES" not in os.environ,
            suppress_health_check=list(HealthCheck),
        ),
    )
    print(*sorted(bench.tally.items()), sep="\n")
