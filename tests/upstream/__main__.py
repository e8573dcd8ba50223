# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Run upstream's tests of weight updates on both sides and tell what was lost."""

import argparse
import os
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path

import psutil
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from overlay.base import ROOT, Base, OverlayError, find_wheel, identify
from overlay.source import find_source
from tests.upstream.comparison import Comparison, expected_losses
from tests.upstream.report import print_report
from tests.upstream.side import Side, SideError
from tests.upstream.sources import extract_tests, unpack_base

TESTS = (
    "tests/model_executor/model_loader/test_reload.py",
    "tests/model_executor/model_loader/test_weight_checksum.py",
    "tests/distributed/test_sharded_rdt_plan.py",
    "tests/v1/worker/test_gpu_worker_weight_transfer.py",
)
DOCUMENT = ROOT / "docs" / "upstream-tests.md"
REPORTS = ROOT / "build" / "upstream"
BYTES_PER_SIDE = 2 << 30


def main() -> int:
    """Return the exit status: 1 if an unexpected test was lost, 2 if none could run."""
    arguments = _arguments()
    base = identify("vllm", version("vllm"))
    console = Console()
    try:
        with tempfile.TemporaryDirectory(prefix="upstream-") as folder:
            sides = _lay_out(base, Path(folder), arguments.timeout)
            _run(sides, console)
    except (OverlayError, SideError) as error:
        console.print(f"[red]error:[/] {error}", highlight=False)
        return 2
    on_base, on_fork = (side.outcomes() for side in sides)
    comparison = Comparison(on_base, on_fork, expected_losses(DOCUMENT))
    print_report(console, comparison, base)
    return 1 if comparison.unexpected else 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m tests.upstream", description=__doc__)
    parser.add_argument(
        "--timeout", type=int, default=1800, help="seconds for each side (%(default)s)"
    )
    return parser.parse_args()


def _lay_out(base: Base, folder: Path, timeout: int) -> list[Side]:
    tests = extract_tests(find_source(base.version), folder / "tests-of-upstream")
    present = [test for test in TESTS if (tests / test).is_file()]
    unpacked = unpack_base(find_wheel(base.version), folder / "base")
    installed = Path(sys.prefix)
    REPORTS.mkdir(parents=True, exist_ok=True)
    return [
        Side("base", unpacked, str(unpacked), tests, present, REPORTS, timeout),
        Side("fork", installed, "", tests, present, REPORTS, timeout),
    ]


def _run(sides: list[Side], console: Console) -> None:
    """Run the sides, at once where memory and processors allow."""
    enough = psutil.virtual_memory().available >= len(sides) * BYTES_PER_SIDE
    at_once = min(len(sides), os.cpu_count() or 1) if enough else 1
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with (
        Progress(*columns, console=console) as progress,
        ThreadPoolExecutor(at_once) as pool,
    ):
        runs = [pool.submit(side.run, _bar(progress, side)) for side in sides]
        for run in runs:
            run.result()


def _bar(progress: Progress, side: Side) -> Callable[[int], None]:
    task = progress.add_task(side.name, total=100)
    return lambda percent: progress.update(task, completed=percent)


if __name__ == "__main__":
    sys.exit(main())
