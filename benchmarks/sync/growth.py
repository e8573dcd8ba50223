# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Times syncs of the fork as models and buckets grow, and many in a row.

    python -m benchmarks.sync.growth --out build/growth.json

A sync should cost as much a tensor in a large model as in a small one, and as much the
hundredth time as the second.
"""

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

from rich.console import Console
from rich.table import Table
from torch._subclasses import FakeTensorMode

from benchmarks.sync.__main__ import SideProcess
from benchmarks.sync.workload import MODELS, Workload

MIB = 1 << 20
# What is varied, and its values; all else is the model's.
SWEEPS = {
    "layers": (2, 4, 8, 16, 32),
    "experts": (16, 32, 64, 128, 256),
    "bucket": tuple(mib * MIB for mib in (1, 4, 16, 64, 256, 1024)),
}
Row = dict[str, Any]


def sent_by(workload: Workload) -> list[int]:
    """Bytes of each tensor."""
    with FakeTensorMode():
        return [tensor.nbytes for _, tensor in workload.case.tensors(seed=1)]


def measure(workload: Workload, syncs: int) -> Row:
    """Seconds of each of some syncs after the first, and what they send."""
    sent = sent_by(workload)
    with TemporaryDirectory() as name:
        side = SideProcess({}, Path(name), workload)
        try:
            for command in ("write", "load", "sync"):
                side.tell(command)
            answers = [side.tell("sync") for _ in range(syncs)]
        finally:
            side.close()
    seconds = [answer["seconds"] for answer in answers]
    peaks = [answer["peak"] for answer in answers]
    sizes = asdict(workload) | dict(tensors=len(sent), bytes=sum(sent))
    return sizes | dict(seconds=seconds, peaks=peaks)


def sweep(workload: Workload, what: str, repeats: int, history: int) -> Iterator[Row]:
    """Rows of one sweep, the smallest first."""
    if what == "history":
        yield measure(workload, history)
        return
    for value in SWEEPS[what]:
        varied = replace(workload, **{what: value})
        if varied.bucket >= max(sent_by(varied)):
            yield measure(varied, repeats)


def table(result: dict[str, list[Row]]) -> Table:
    """Medians, and the least and the most of each; of a history its ends."""
    table = Table("", "", "tensors", "GB", "s", "us a tensor", "GB/s")
    for what, rows in result.items():
        for row in rows:
            tensors, size, seconds = row["tensors"], row["bytes"], row["seconds"]
            parts = {"": seconds}
            if what == "history":
                tenth = len(seconds) // 10
                parts = {"first tenth": seconds[:tenth], "last": seconds[-tenth:]}
            for name, part in parts.items():
                middle = median(part)
                table.add_row(
                    what,
                    name or str(row[what]),
                    str(tensors),
                    f"{size / 1e9:.2f}",
                    f"{middle:.4f} ({min(part):.4f} to {max(part):.4f})",
                    f"{middle / tensors * 1e6:.1f}",
                    f"{size / middle / 1e9:.1f}",
                )
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=MODELS, default="narrow")
    parser.add_argument("--layers", type=int, help="other than the model's")
    parser.add_argument("--bucket", type=int, default=64 * MIB, help="bytes")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--history", type=int, default=100, help="syncs in a row")
    sweeps = [*SWEEPS, "history"]
    parser.add_argument("--sweeps", nargs="+", choices=sweeps, default=sweeps)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    layers, *sizes = MODELS[options.model]
    workload = Workload(options.layers or layers, *sizes, options.bucket)
    result: dict[str, list[Row]] = {}
    for what in options.sweeps:
        rows = result.setdefault(what, [])
        for row in sweep(workload, what, options.repeats, options.history):
            rows.append(row)
            if options.out is not None:  # whatever may end a sweep of hours
                options.out.write_text(json.dumps(result, indent=2) + "\n")
    Console(width=110).print(table(result))


if __name__ == "__main__":
    main()
