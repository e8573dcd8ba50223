# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Sync into a model in this process, once a fault, on whichever vLLM is installed.

    python -m demo.defects FOLDER       # prints a measurement a fault

FOLDER is where the checkpoints are written.
"""

import sys
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from demo.faults import FAULTS, Fault, Send, complete
from demo.measurement import Measurement, Outcome, describe
from tests.checkpoints import CASES, write_checkpoint
from tests.harness import memory, stand_ins
from tests.harness.models import Built, build, single_rank
from tests.harness.snapshot import Snapshot, differences, snapshot
from vllm.model_executor.model_loader import reload

SEED_A, SEED_B = 1, 2


class Result(NamedTuple):
    """What a sync raised, and what the model holds after it."""

    error: Exception | None
    weights: Snapshot


class Bench:
    """Makes models from disk and remembers what they hold.

    Args:
        folder: where checkpoints are written.
    """

    def __init__(self, folder: Path):
        self._folder = folder
        self.cold = cache(self._cold)

    def make(self, checkpoint: str, seed: int) -> Built:
        """Load a checkpoint into a fresh model."""
        case, folder = CASES[checkpoint], self._folder / f"{checkpoint}-{seed}"
        if not folder.exists():
            write_checkpoint(case, seed, folder)
        return build(case, folder)

    def _cold(self, checkpoint: str, seed: int) -> Snapshot:
        return snapshot(self.make(checkpoint, seed).model)


def measure(fault: Fault, bench: Bench) -> Measurement:
    """Sync B into a fresh model of A as a fault has it, and see what became of it."""
    built = bench.make(fault.checkpoint, SEED_A)
    tensors = list(CASES[fault.checkpoint].tensors(SEED_B))
    old, new = (bench.cold(fault.checkpoint, seed) for seed in (SEED_A, SEED_B))
    result = sync(built, fault.send, tensors)
    outcome, detail = _judge(result, old, new)
    if result.error is not None and _is_fenced(built):
        again = sync(built, complete, tensors)
        healed = again.error is None and _count(again.weights, new) == 0
        outcome = Outcome.FENCED if healed else Outcome.BROKEN
        detail = "" if healed else "a complete sync did not repair it"
    error = "" if result.error is None else describe(result.error)
    return Measurement(fault.title, outcome, detail, error)


def sync(built: Built, send: Send, tensors: list) -> Result:
    """Sync as a trainer does that stops at the first error, and says so if it can."""
    model: Any = built.model
    error = None
    with built.worker_context():
        try:
            reload.initialize_layerwise_reload(model)
            for chunk in send(tensors):
                model.load_weights(iter(chunk))
            reload.finalize_layerwise_reload(model, built.vllm_config.model_config)
        except Exception as raised:
            error = raised
            # The released vLLM has no such function.
            abort = getattr(reload, "abort_layerwise_reload", None)
            if abort is not None:
                abort(model, describe(raised))
    return Result(error, snapshot(model))


def _is_fenced(built: Built) -> bool:
    # The released vLLM has no such function.
    status = getattr(reload, "reload_status", None)
    return status is not None and status(built.model).state == "inconsistent"


def _judge(result: Result, old: Snapshot, new: Snapshot) -> tuple[Outcome, str]:
    if result.error is None:
        if _count(result.weights, new) == 0:
            return Outcome.NEW, ""
        return Outcome.WRONG, _damage(result.weights, new)
    if _count(result.weights, old) == 0:
        return Outcome.OLD, ""
    raised = type(result.error).__name__
    return Outcome.BROKEN, f"{raised}, {_damage(result.weights, old)}"


def _count(actual: Snapshot, expected: Snapshot) -> int:
    return sum(1 for _ in differences(actual, expected))


def _damage(actual: Snapshot, expected: Snapshot) -> str:
    tensors = [value for value in actual.values() if value.ndim]
    meta = sum(tensor.is_meta for tensor in tensors)
    if meta:
        return f"{meta} of {len(tensors)} tensors left on the meta device"
    nan = sum(_holds_nan(tensor) for tensor in tensors)
    return f"tensors that differ: {_count(actual, expected)}, with NaN: {nan}"


def _holds_nan(tensor: torch.Tensor) -> bool:
    return bool(tensor.is_floating_point() and tensor.float().isnan().any())


def main() -> None:
    """Measure every fault."""
    bench = Bench(Path(sys.argv[1]))
    with pytest.MonkeyPatch.context() as patch, single_rank(), memory.nan_memory():
        stand_ins.install(patch)
        for fault in FAULTS:
            measure(fault, bench).report()


if __name__ == "__main__":
    main()
