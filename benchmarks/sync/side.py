# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Loads and syncs a model, each when told to, on whichever vLLM is installed.

    python -m benchmarks.sync.side FOLDER LAYERS EXPERTS HIDDEN INTERMEDIATE BUCKET

reads commands from standard input and answers each with a line of JSON: the seconds it
took, and the bytes of GPU memory it had in use at most, above what was there before.
The time in which the trainer fills its bucket does not count.

    write   write the checkpoint that is loaded
    load    load it into a new model
    sync    push all tensors of another one through the bucket
    copy    copy as many bytes within the device's memory
"""

import gc
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from benchmarks.sync.workload import Workload
from tests.checkpoints import chunks, write_checkpoint
from tests.harness import stand_ins
from tests.harness.models import Built, build, single_rank
from vllm.model_executor.model_loader import reload
from vllm.utils.gc_utils import freeze_gc_heap

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
ENGINE = dict(attention_backend="TRITON_ATTN") if ON_GPU else {}


class Side:
    """A model and the tensors that are synced into it."""

    def __init__(self, workload: Workload, folder: Path):
        self._case = workload.case
        self._folder = folder
        self._tensors = list(self._case.tensors(seed=2, device=DEVICE))
        self._bucket = torch.empty(workload.bucket, dtype=torch.uint8, device=DEVICE)
        self._built: Built | None = None

    def write(self) -> float:
        return _timed(write_checkpoint, self._case, 1, self._folder, False, DEVICE)

    def load(self) -> float:
        if self._built is not None:
            _free(self._built.model)
        self._built = None
        gc.unfreeze()
        freeze_gc_heap()  # the model before is no part of this load
        start = time.perf_counter()
        self._built = build(self._case, self._folder, **ENGINE)
        seconds = time.perf_counter() - start
        freeze_gc_heap()  # as an engine does before it serves
        return seconds

    def sync(self) -> float:
        assert self._built is not None
        model, config = self._built
        with self._built.worker_context():
            seconds = _timed(reload.initialize_layerwise_reload, model)
            for chunk in chunks(self._tensors, len(self._bucket), self._bucket):
                seconds += _timed(model.load_weights, chunk)
            finish = reload.finalize_layerwise_reload
            return seconds + _timed(finish, model, config.model_config)

    def copy(self) -> float:
        total = sum(tensor.nbytes for _, tensor in self._tensors)
        target = torch.empty_like(self._bucket)
        target.copy_(self._bucket)  # touches the memory
        times = -(-total // len(target))
        seconds = _timed(lambda: [target.copy_(self._bucket) for _ in range(times)])
        return seconds * total / (times * len(target))


def _free(model: torch.nn.Module) -> None:
    """Give back GPU memory, whoever still holds the model: vLLM keeps some of it."""
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_cuda:
            tensor.untyped_storage().resize_(0)


def _timed(call: Callable[..., object], *arguments: object) -> float:
    _synchronize()
    start = time.perf_counter()
    call(*arguments)
    _synchronize()
    return time.perf_counter() - start


def _synchronize() -> None:
    if ON_GPU:
        torch.cuda.synchronize()


def _answer(command: Callable[[], float]) -> dict[str, float | int | None]:
    if not ON_GPU:
        return dict(seconds=command(), peak=None)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    seconds = command()
    return dict(seconds=seconds, peak=torch.cuda.max_memory_allocated() - before)


def main() -> None:
    """Answer commands until there are no more."""
    side = Side(Workload.of(sys.argv[2:]), Path(sys.argv[1]))
    with pytest.MonkeyPatch.context() as patch, single_rank():
        if not ON_GPU:
            stand_ins.install(patch)
        for command in sys.stdin:
            print(json.dumps(_answer(getattr(side, command.strip()))), flush=True)


if __name__ == "__main__":
    main()
