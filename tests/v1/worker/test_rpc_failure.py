# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""What a worker says of an exception."""

import pytest
import torch

from tests.harness.pipe import through_pipe
from vllm.model_executor.model_loader.reload import WeightSyncError
from vllm.model_executor.model_loader.reload.agreement import RankFailedError
from vllm.model_executor.model_loader.reload.errors import (
    Finding,
    SyncConflictError,
    TransferMissingError,
)
from vllm.v1.worker.rpc_failure import RpcFailedError, RpcFailure


def findings(count: int, detail: str = "never sent") -> list[Finding]:
    return [Finding("layer", f"weight_{n}", detail) for n in range(count)]


@pytest.mark.parametrize(
    "error, status",
    [
        (WeightSyncError("no"), 422),
        (SyncConflictError("no"), 409),
        (TransferMissingError("no"), 501),
        (RankFailedError("no"), 424),
        (ValueError("no"), 400),
        (RuntimeError("no"), None),
        (MemoryError("no"), 507),
        (torch.OutOfMemoryError("no"), 507),
    ],
)
def test_a_status_for_each_kind(error, status):
    failure = RpcFailure.of(error)
    assert failure.status == status
    assert failure.text == f"{type(error).__name__}: no"


def test_findings_are_kept():
    missing, invalid = findings(2), findings(1, "scale is nan")
    failure = RpcFailure.of(WeightSyncError("no", missing, invalid))
    assert failure.missing == tuple(missing)
    assert failure.invalid == tuple(invalid)
    assert failure.more == 0


@pytest.mark.parametrize(
    "missing, invalid, kept",
    [(20, 0, (20, 0)), (21, 0, (20, 0)), (15, 10, (15, 5)), (5000, 3, (20, 0))],
)
def test_only_some_of_many_findings_are_kept(missing, invalid, kept):
    error = WeightSyncError("no", findings(missing), findings(invalid))
    failure = RpcFailure.of(error)
    assert (len(failure.missing), len(failure.invalid)) == kept
    assert failure.more == missing + invalid - sum(kept)


def test_an_error_of_several_ranks_travels():
    failure = RpcFailure.of(WeightSyncError("no", findings(1)))
    error = through_pipe(RpcFailedError("The RPC failed.", {1: failure}))
    assert error.failures == {1: failure}
    assert str(error).startswith("The RPC failed.\nrank 1: WeightSyncError: no\n")
