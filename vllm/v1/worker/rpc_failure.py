# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Why an RPC failed on a worker, in plain data that any process can read.

Exceptions stay where they were raised: not every one can be pickled. What a client
needs of them goes on, to the engine core and from there to the API server.
"""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

import torch

from vllm.model_executor.model_loader.reload import WeightSyncError
from vllm.model_executor.model_loader.reload.agreement import RankFailedError
from vllm.model_executor.model_loader.reload.errors import (
    MAX_LINES,
    Finding,
    SyncConflictError,
    TransferMissingError,
)

__all__ = ["RpcFailedError", "RpcFailure"]

# The first that fits. Whatever fits none is no fault of the client, nor can the client
# do anything about it.
_STATUS: tuple[tuple[type[Exception], HTTPStatus], ...] = (
    (WeightSyncError, HTTPStatus.UNPROCESSABLE_ENTITY),
    (SyncConflictError, HTTPStatus.CONFLICT),
    (TransferMissingError, HTTPStatus.NOT_IMPLEMENTED),
    (MemoryError, HTTPStatus.INSUFFICIENT_STORAGE),
    (torch.OutOfMemoryError, HTTPStatus.INSUFFICIENT_STORAGE),
    (RankFailedError, HTTPStatus.FAILED_DEPENDENCY),
    (ValueError, HTTPStatus.BAD_REQUEST),
)


@dataclass(frozen=True)
class RpcFailure:
    """What one rank has to say of an RPC that failed on it.

    Attributes:
        text: type and message of the exception.
        status: what an HTTP client is to be told; None if the failure is no fault of
            the client. Where only another rank failed it is 424, failed dependency.
        missing: what a sync owed and did not bring, as far as it is listed.
        invalid: what it brought and must not be served, as far as it is listed.
        more: how many of these are not listed; at most 20 are.

    """

    text: str
    status: HTTPStatus | None = None
    missing: tuple[Finding, ...] = ()
    invalid: tuple[Finding, ...] = ()
    more: int = 0

    @classmethod
    def of(cls, error: Exception) -> "RpcFailure":
        """Describe an exception."""
        text = f"{type(error).__name__}: {error}"
        status = next((s for kind, s in _STATUS if isinstance(error, kind)), None)
        if not isinstance(error, WeightSyncError):
            return cls(text, status)
        missing = error.missing[:MAX_LINES]
        invalid = error.invalid[: MAX_LINES - len(missing)]
        found = len(error.missing) + len(error.invalid)
        more = found - len(missing) - len(invalid)
        return cls(text, status, missing, invalid, more)


class RpcFailedError(RuntimeError):
    """An RPC failed on workers in other processes.

    Args:
        summary: says which RPC, and on how many workers.
        failures: by rank.

    """

    def __init__(self, summary: str, failures: Mapping[int, RpcFailure]):
        self.summary = summary
        self.failures = dict(failures)
        super().__init__(f"{summary}\n{self._by_text()}")

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.summary, self.failures)

    def _by_text(self) -> str:
        """List what the ranks raised, each text once."""
        ranks = defaultdict[str, list[str]](list)
        for rank, failure in self.failures.items():
            ranks[failure.text].append(str(rank))
        return "\n".join(f"rank {', '.join(at)}: {text}" for text, at in ranks.items())
