# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Times syncs from a cold file against `dd` on the same one, in turns.

python -m benchmarks.sync.disk --folder build/disk --out build/disk.json

The page cache forgets the file before each. The kinds of work:

    dd          read the file in blocks of 16 MiB
    sync        reload the model from it
    warm sync   the same again: what a sync costs when nothing has to be read
    as stored   a sync of what the base's loader reads, in the order of the file

Processor time is told beside the clock's, and the load of the machine: other work on
its cores and its disk lengthens the one and hardly the other.
"""

import argparse
import json
import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import pytest
import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file
from torch._subclasses import FakeTensorMode

from benchmarks.sync.workload import Workload
from tests.checkpoints import Case
from tests.harness import stand_ins
from tests.harness.models import Built, build, single_rank
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
from vllm.model_executor.model_loader.reload import (
    finalize_layerwise_reload,
    initialize_layerwise_reload,
)
from vllm.model_executor.model_loader.reload.inplace import reload_weights

# By the clock and of processors.
Seconds = dict[str, list[tuple[float, float]]]


def write(case: Case, folder: Path) -> Path:
    """Write a checkpoint of that shape, with values that are quick to draw."""
    (folder / "config.json").write_text(json.dumps(case.config()))
    with FakeTensorMode():
        shapes = [(name, t.shape, t.dtype) for name, t in case.tensors(seed=1)]
    tensors = {name: _drawn(shape, dtype) for name, shape, dtype in shapes}
    path = folder / "model.safetensors"
    save_file(tensors, path, metadata={"format": "pt"})
    return path


def _drawn(shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
    if dtype == torch.float8_e4m3fn:
        return torch.randint(0, 0x7F, shape, dtype=torch.uint8).view(dtype)
    return torch.rand(shape).add_(0.5).to(dtype)


def forget(path: Path) -> None:
    """Let the page cache forget a file."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def dd(path: Path) -> None:
    command = ["dd", f"if={path}", "of=/dev/null", "bs=16M", "status=none"]
    subprocess.run(command, check=True)


def sync(built: Built, folder: Path) -> None:
    model, vllm_config = built
    with built.worker_context():
        reload_weights(vllm_config, model, None, str(folder), True)


def sync_as_stored(built: Built) -> None:
    model, vllm_config = built
    loader = DefaultModelLoader(vllm_config.load_config)
    with built.worker_context():
        initialize_layerwise_reload(model)
        model.load_weights(loader.get_all_weights(vllm_config.model_config, model))
        finalize_layerwise_reload(model, vllm_config.model_config)


def seconds(call: Callable[..., None], *arguments: object) -> tuple[float, float]:
    """What a call takes, by the clock and of processors, those of programs included."""
    start, used = time.perf_counter(), sum(os.times()[:4])
    call(*arguments)
    return time.perf_counter() - start, sum(os.times()[:4]) - used


def measure(case: Case, folder: Path, repeats: int) -> tuple[int, Seconds]:
    """The bytes of the checkpoint, and the seconds of each kind of work."""
    path = write(case, folder)
    built = build(case, folder)
    sync(built, folder)  # the first sync derives the plan
    times: Seconds = {"dd": [], "sync": [], "warm sync": [], "as stored": []}
    for _ in range(repeats):
        forget(path)
        times["dd"].append(seconds(dd, path))
        forget(path)
        times["sync"].append(seconds(sync, built, folder))
        times["warm sync"].append(seconds(sync, built, folder))
        forget(path)
        times["as stored"].append(seconds(sync_as_stored, built))
    return path.stat().st_size, times


def table(size: int, times: Seconds) -> Table:
    """Medians, the least and the most of each, rates, and processor time.

    What is told in parts of `dd` is compared round by round, as a disk that others use
    changes from one to the next.
    """
    table = Table("", "s", "GB/s", "of dd", "processor s")
    for kind, measured in times.items():
        clock = [seconds for seconds, _ in measured]
        shares = [dd / one for (dd, _), one in zip(times["dd"], clock)]
        rate = f"{size / median(clock) / 1e9:.2f}"
        used = spread([used for _, used in measured])
        table.add_row(kind, spread(clock), rate, spread(shares), used)
    return table


def spread(values: list[float]) -> str:
    return f"{median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    shape = dict(layers=6, experts=64, hidden=2048, intermediate=768)
    for name, default in shape.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--threads", type=int, default=1, help="of torch, in a sync")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--folder", type=Path, default="build", help="on the disk")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    workload = Workload(*(getattr(options, name) for name in shape), bucket=0)
    torch.set_num_threads(options.threads)
    options.folder.mkdir(parents=True, exist_ok=True)
    with (
        pytest.MonkeyPatch.context() as patch,
        single_rank(),
        TemporaryDirectory(dir=options.folder) as folder,
    ):
        stand_ins.install(patch)
        size, times = measure(workload.case, Path(folder), options.repeats)
    load = os.getloadavg()
    Console().print(table(size, times))
    Console().print("load of the machine: {:.1f}, {:.1f}, {:.1f}".format(*load))
    if options.out is not None:
        result = dict(workload=workload.arguments, bytes=size, seconds=times, load=load)
        options.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
