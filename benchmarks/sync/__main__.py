# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Times cold loads and syncs of the base and of the fork, in turns.

python -m benchmarks.sync --model narrow --out build/sync.json
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
from torch._subclasses import FakeTensorMode

from benchmarks.sync.workload import MODELS, Workload
from demo.side import QUIET, released
from overlay.base import ROOT

# What is measured in a repetition: its name, and what a side is told.
ROUND = (
    ("cold load", "load"),
    ("first sync", "sync"),
    ("sync", "sync"),
    ("sync", "sync"),
)
Answer = dict[str, Any]
Answers = dict[str, dict[str, list[Answer]]]


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

    def tell(self, command: str) -> Answer:
        """Tell the side what to do, and return what it measured."""
        process = self._process
        assert process.stdin is not None and process.stdout is not None
        print(command, file=process.stdin, flush=True)
        for line in process.stdout:
            if line.startswith('{"seconds"'):
                return json.loads(line)
        said = Path(self._log.name).read_text()[-4000:]
        raise RuntimeError(f"a side ended at {command}:\n{said}")

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        self._log.close()


@contextmanager
def sides(
    workload: Workload, folder: Path, base: Path | None
) -> Iterator[dict[str, SideProcess]]:
    """Start the base and the fork, on a checkpoint that one of them wrote."""
    if base is None:
        tree = released(folder / "released", folder).environment
    else:
        tree = dict(PYTHONPATH=str(base))
    environments = {"base": tree, "fork": {}}
    running = {n: SideProcess(e, folder, workload) for n, e in environments.items()}
    try:
        running["fork"].tell("write")
        yield running
    finally:
        for side in running.values():
            side.close()


def measure(workload: Workload, repeats: int, base: Path | None) -> Iterator[Answers]:
    """Yield the answers so far, by kind of work and side, after each repetition."""
    kinds = [*dict.fromkeys(kind for kind, _ in ROUND), "copy"]
    answers: Answers = {kind: {"base": [], "fork": []} for kind in kinds}
    with TemporaryDirectory() as name, sides(workload, Path(name), base) as running:
        for side in running.values():
            side.tell("load")  # imports, and warms the file cache
        for _ in range(repeats):
            for kind, command in (*ROUND, ("copy", "copy")):
                for side_name, side in running.items():
                    answers[kind][side_name].append(side.tell(command))
            yield answers


def table(answers: Answers, tensors: int, size: int) -> Table:
    """Medians, and the least and the most of each.

    Args:
        answers: what was measured.
        tensors: how many tensors a sync sends.
        size: their bytes.

    """
    columns = "fork / base", "fork, us a tensor", "fork, GB/s", "peak, MiB"
    table = Table("", "base, s", "fork, s", *columns)
    for kind, sides in answers.items():
        seconds = {name: [a["seconds"] for a in s] for name, s in sides.items()}
        base, fork = map(median, seconds.values())
        cells = [
            f"{median(s):.4f} ({min(s):.4f} to {max(s):.4f})" for s in seconds.values()
        ]
        rates = f"{fork / tensors * 1e6:.1f}", f"{size / fork / 1e9:.1f}"
        peaks = [max(a["peak"] or 0 for a in s) >> 20 for s in sides.values()]
        peak = "{} → {}".format(*peaks) if any(peaks) else ""
        table.add_row(kind, *cells, f"{fork / base:.3f}", *rates, peak)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=MODELS, default="narrow")
    for size in ("layers", "experts", "hidden", "intermediate"):
        parser.add_argument(f"--{size}", type=int, help="other than the model's")
    parser.add_argument("--bucket", type=int, default=64 << 20, help="bytes")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--base", type=Path, help="folder that holds a released vLLM")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    asked = options.layers, options.experts, options.hidden, options.intermediate
    sizes = [a or size for a, size in zip(asked, MODELS[options.model])]
    workload = Workload(*sizes, options.bucket)
    with FakeTensorMode():
        sent = [tensor.nbytes for _, tensor in workload.case.tensors(seed=1)]
    result: dict[str, Any] = dict(
        model=options.model,
        workload=workload.arguments,
        tensors=len(sent),
        bytes=sum(sent),
        vllm=version("vllm"),
    )
    for answers in measure(workload, options.repeats, options.base):
        result["answers"] = answers
        if options.out is not None:
            options.out.write_text(json.dumps(result, indent=2) + "\n")
    Console(width=130).print(table(result["answers"], len(sent), sum(sent)))


if __name__ == "__main__":
    main()
