# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""A server that serves one of two checkpoints, and all that is known of both."""

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import requests
import torch

from tests.checkpoints import CASES, Sizes, write_checkpoint
from tests.harness import stand_ins
from tests.harness.models import build, single_rank
from tests.harness.server import Server, starting
from vllm.model_executor.model_loader.weight_checksum import compute_tensor_digests

__all__ = ["CASE", "PIECES", "SERVER_OPTIONS", "A", "B", "FaultBench", "starting_bench"]

A, B = 1, 2
CASE = replace(
    CASES["qwen3_moe-fp8_block"],
    sizes=Sizes(experts=2, hidden=128, heads=2, vocab=320),
)
SERVER_OPTIONS = [
    *("--enforce-eager", "--max-model-len", "256", "--max-num-seqs", "4"),
    *("--weight-transfer-config", '{"backend": "shm"}'),
    *("--worker-extension-cls", "tests.harness.faulty_worker.FaultyWorker"),
]
if torch.cpu._is_amx_tile_supported():  # it rounds otherwise behind a cached prefix
    SERVER_OPTIONS.append("--no-enable-prefix-caching")
PIECES = 6

Named = tuple[str, torch.Tensor]


@dataclass(frozen=True)
class FaultBench:
    """What schedules share.

    Attributes:
        server: the server, which serves A.
        folders: of the checkpoints A and B.
        digests: of the parameters after a cold load, by checkpoint.
        tensors: of the checkpoints, in pieces.
        answers: the first answer that was seen from the same weights.
        tally: how often what was done, and with which outcome.
    """

    server: Server
    folders: Mapping[int, Path]
    digests: Mapping[int, Mapping[str, str]]
    tensors: dict[int, list[list[Named]]] = field(init=False)
    answers: dict[tuple, tuple[list[int], list[float]]] = field(default_factory=dict)
    tally: Counter[tuple[str, str]] = field(default_factory=Counter)

    def __post_init__(self):
        object.__setattr__(self, "tensors", {s: list(_pieces(s)) for s in (A, B)})

    def call(self, method: str, **kwargs: Any) -> requests.Response:
        """Have the worker do something."""
        body = {"method": method, "kwargs": kwargs}
        return self.server.post("collective_rpc", body)

    def served_digests(self) -> dict[str, str]:
        """Return the digests of the parameters that serve."""
        answer = self.server.post("weight_checker", {"action": "checksum"})
        assert answer.ok, answer.text
        held = answer.json()["checksums"]
        return {name.rpartition(":")[2]: digest for name, digest in held.items()}


@contextmanager
def starting_bench(folder: Path) -> Iterator[FaultBench]:
    """Start a server, which has loaded A; its log is `server.log`."""
    folders = {s: write_checkpoint(CASE, s, folder / str(s), True) for s in (A, B)}
    with starting(folders[A], folder / "server.log", SERVER_OPTIONS, {}) as server:
        digests = _cold_digests(folders)
        server.wait()
        yield FaultBench(server, folders, digests)


def _cold_digests(folders: dict[int, Path]) -> dict[int, dict[str, str]]:
    """Load each checkpoint in this process."""
    dtype = torch.get_default_dtype()
    with pytest.MonkeyPatch.context() as patch, single_rank():
        stand_ins.install(patch)
        models = {seed: build(CASE, folder).model for seed, folder in folders.items()}
    torch.set_default_dtype(dtype)
    return {seed: compute_tensor_digests(model) for seed, model in models.items()}


def _pieces(seed: int) -> Iterator[list[Named]]:
    tensors = list(CASE.tensors(seed))
    size = -(-len(tensors) // PIECES)
    for start in range(0, len(tensors), size):
        yield tensors[start : start + size]
