# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Times cold loads and syncs of the base and of the fork, in turns.

python -m benchmarks.sync --layers 8 --experts 128 --out build/sync.json
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.sync.workload import Workload
from demo.side import QUIET, released
from overlay.base import ROOT
from tests.checkpoints import write_checkpoint


class SideProcess:
    """A side in a process of its own."""

    def __init__(self, environment: dict[str, str], folder: Path, workload: Workload):
        self._log = (folder / "side.log").open("a")
        command = [sys.executable, "-m", "benchmarks.sync.side", str(folder / "model")]
        self._process = subprocess.Popen(
            [*command, *workload.arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            cwd=ROOT,
            env=os.environ | QUIET | environment,
        )

    def seconds(self, command: str) -> float:
        """Tell the side what to do, and return how long it took."""
        process = self._process
        assert process.stdin is not None and process.stdout is not None
        print(command, file=process.stdin, flush=True)
        for line in process.stdout:
            if line.startswith("seconds "):
                return float(line.split()[1])
        raise RuntimeError(f"a side ended at {command}, see {self._log.name}")

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        self._log.close()


@contextmanager
def sides(workload: Workload, folder: Path) -> Iterator[dict[str, SideProcess]]:
    """Start the base and the fork."""
    write_checkpoint(workload.case, seed=1, folder=folder / "model")
    environments = {"base": released(folder).environment, "fork": {"PYTHONPATH": ""}}
    running = {n: SideProcess(e, folder, workload) for n, e in environments.items()}
    try:
        yield running
    finally:
        for side in running.values():
            side.close()


def measure(workload: Workload, repeats: int) -> dict[str, dict[str, list[float]]]:
    """Seconds by kind of work and side: cold loads, first syncs, later syncs."""
    times: dict[str, dict[str, list[float]]] = {
        kind: {"base": [], "fork": []} for kind in ("cold load", "first sync", "sync")
    }
    with TemporaryDirectory() as name, sides(workload, Path(name)) as running:
        for side in running.values():
            side.seconds("load")  # imports, and warms the file cache
        for _ in range(repeats):
            for kind, command in (
                ("cold load", "load"),
                ("first sync", "sync"),
                ("sync", "sync"),
                ("sync", "sync"),
            ):
                for side_name, side in running.items():
                    times[kind][side_name].append(side.seconds(command))
    return times


def table(times: dict[str, dict[str, list[float]]], tensors: int) -> Table:
    """Medians, and the least and the most of each."""
    table = Table("", "base, s", "fork, s", "fork / base", "fork, us a tensor")
    for kind, sides in times.items():
        base, fork = (median(sides[name]) for name in ("base", "fork"))
        cells = [
            f"{median(s):.3f} ({min(s):.3f} to {max(s):.3f})" for s in sides.values()
        ]
        per_tensor = f"{fork / tensors * 1e6:.1f}"
        table.add_row(kind, *cells, f"{fork / base:.3f}", per_tensor)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--experts", type=int, default=128)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--intermediate", type=int, default=128)
    parser.add_argument("--bucket", type=int, default=64 << 20, help="bytes")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path)
    options = vars(parser.parse_args())
    out, repeats = options.pop("out"), options.pop("repeats")
    workload = Workload(**options)
    tensors = sum(1 for _ in workload.case.tensors(1))
    times = measure(workload, repeats)
    Console().print(table(times, tensors))
    if out is not None:
        result: dict[str, Any] = dict(workload=options, tensors=tensors, seconds=times)
        result["vllm"] = version("vllm")
        out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
