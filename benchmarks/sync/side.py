# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Loads and syncs a model, each when told to, on whichever vLLM is installed.

    python -m benchmarks.sync.side FOLDER LAYERS EXPERTS HIDDEN INTERMEDIATE BUCKET

reads "load" and "sync" from standard input, and answers with the seconds that took. The
time in which the trainer fills its bucket does not count.
"""

import gc
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from benchmarks.sync.workload import Workload
from tests.checkpoints import chunks
from tests.harness import stand_ins
from tests.harness.models import Built, build, single_rank
from vllm.model_executor.model_loader import reload


class Side:
    """A model and the tensors that are synced into it."""

    def __init__(self, workload: Workload, folder: Path):
        self._workload = workload
        self._folder = folder
        self._tensors = list(workload.case.tensors(seed=2))
        self._bucket = torch.empty(workload.bucket, dtype=torch.uint8)
        self._built: Built | None = None

    def load(self) -> float:
        """Load the checkpoint into a new model."""
        self._built = None
        gc.collect()  # the model before is no part of this load
        start = time.perf_counter()
        self._built = build(self._workload.case, self._folder)
        return time.perf_counter() - start

    def sync(self) -> float:
        """Push all tensors through the bucket."""
        assert self._built is not None
        model, config = self._built
        with self._built.worker_context():
            seconds = _timed(reload.initialize_layerwise_reload, model)
            for chunk in chunks(self._tensors, len(self._bucket), self._bucket):
                seconds += _timed(model.load_weights, chunk)
            finish = reload.finalize_layerwise_reload
            return seconds + _timed(finish, model, config.model_config)


def _timed(call: Callable[..., object], *arguments: object) -> float:
    start = time.perf_counter()
    call(*arguments)
    return time.perf_counter() - start


def main() -> None:
    """Answer commands until there are no more."""
    side = Side(Workload.of(sys.argv[2:]), Path(sys.argv[1]))
    with pytest.MonkeyPatch.context() as patch, single_rank():
        stand_ins.install(patch)
        for command in sys.stdin:
            print("seconds", getattr(side, command.strip())(), flush=True)


if __name__ == "__main__":
    main()
