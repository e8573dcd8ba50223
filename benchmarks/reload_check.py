# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""How fast `vllm reload-check` reads, beside `dd`, from files that are not in memory.

    python -m benchmarks.reload_check CHECKPOINT A

`dd` reads both checkpoints and the check compares both, in turns; peak memory is that
of this process, less what it had before the first check.
"""

import argparse
import os
import resource
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median

from vllm.model_executor.model_loader.checkpoint_check import (
    check_checkpoint,
    check_sync,
    open_checkpoint,
)


def passed_on(items: Sequence, unit: str) -> Sequence:
    return items


def forget(files: list[Path]) -> None:
    """Take files out of the page cache."""
    for file in files:
        with file.open("rb") as stream:
            os.fdatasync(stream.fileno())
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_with_dd(files: list[Path]) -> None:
    for file in files:
        line = ["dd", f"if={file}", "of=/dev/null", "bs=16M", "status=none"]
        subprocess.run(line, check=True)


def seconds(work: Callable[[], object], files: list[Path]) -> float:
    forget(files)
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def peak_megabytes() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint")
    parser.add_argument("against")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    folders = [args.against, args.checkpoint]
    files = [f for folder in folders for f in Path(folder).glob("*.safetensors")]
    before = peak_megabytes()
    work = {
        "dd": lambda: read_with_dd(files),
        "check": lambda: check_checkpoint(open_checkpoint(folders[1]), passed_on),
        "compare": lambda: check_sync(*map(open_checkpoint, folders), passed_on),
    }
    times = [
        {n: seconds(w, files) for n, w in work.items()} for _ in range(args.repeats)
    ]
    for name in work:
        print(name, *(f"{run[name]:.2f}" for run in times), "s")
    ratio = median(run["dd"] / run["compare"] for run in times)
    size = sum(file.stat().st_size for file in files) / 1e9
    print(f"{size:.2f} GB; compare: {ratio:.2f} of dd's speed, median")
    print(f"peak memory +{peak_megabytes() - before:.0f} MB")


if __name__ == "__main__":
    main()
