# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Measure both sides, print the table, and fail if the fork got a case wrong.

The checkpoints, the reports on the last syncs and the logs stay in `OUT`.
"""

import shutil
import sys
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.progress import TimeElapsedColumn as Elapsed

from demo.comparison import LAYER, MODEL, Comparison
from demo.faults import FAULTS
from demo.measurement import Measurement
from demo.serving import SERVICES
from demo.side import Side, fork, released
from overlay.base import ROOT

OUT = ROOT / "build" / "demo"
LOOK = """
What was synced is in build/demo/.
Is it sound, what does a sync send, what did one do?

    .venv/bin/vllm reload-check build/demo/qwen3_moe-fp8_block-2
    .venv/bin/vllm reload-check build/demo/qwen3_moe-fp8_block-2 \\
        --against build/demo/qwen3_moe-fp8_block-1
    .venv/bin/vllm reload-check --report build/demo/report-layer.json
"""
CASES_PER_SERVICE = 2
TOTAL = 2 * CASES_PER_SERVICE * len(SERVICES) + 3 * len(FAULTS)


def main() -> int:
    """Run the demo and return its exit status."""
    console = Console()
    start = time.monotonic()
    shutil.rmtree(OUT, ignore_errors=True)
    OUT.mkdir(parents=True)
    with TemporaryDirectory() as name:
        base = released(Path(name), OUT)
        comparison = Comparison()
        with _progress(console) as progress:
            task = progress.add_task("", total=TOTAL)
            for side, measured in _measure(comparison, base, OUT):
                progress.console.print(f"{side.title}: {measured.case}", style="dim")
                progress.update(task, advance=1, description=side.title)
    console.print(comparison.table(base.title, f"this fork, {version('vllm')}"))
    wrong = comparison.wrong()
    for case in wrong:
        console.print(f"The fork is not right: {case}", style="bold red")
    console.print(f"{time.monotonic() - start:.0f} s")
    console.print(LOOK, highlight=False)
    return 1 if wrong else 0


def _measure(
    comparison: Comparison, base: Side, folder: Path
) -> Iterator[tuple[Side, Measurement]]:
    per_layer, per_model = fork(folder, LAYER), fork(folder, MODEL)
    jobs = [
        (per_layer, comparison.fork[LAYER], True),
        (per_model, comparison.fork[MODEL], False),
        (base, comparison.released, True),
    ]
    for side, into, serves in jobs:
        for measured in _measure_side(side, folder, serves):
            into[measured.case] = measured
            yield side, measured


def _measure_side(side: Side, folder: Path, serves: bool) -> Iterator[Measurement]:
    if serves:
        for service in SERVICES:
            yield from side.measure("demo.serving", service, str(folder))
    yield from side.measure("demo.defects", str(folder))


def _progress(console: Console) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    return Progress(*columns, Elapsed(), console=console)


if __name__ == "__main__":
    sys.exit(main())
