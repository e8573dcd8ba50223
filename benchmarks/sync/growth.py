# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Times syncs of the fork as models and buckets grow, and many in a row.

    python -m benchmarks.sync.growth --out build/growth.json --picture build/growth.png

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

import matplotlib
from rich.console import Console
from rich.table import Table
from torch._subclasses import FakeTensorMode

from benchmarks.sync.__main__ import SideProcess
from benchmarks.sync.workload import MODELS, Workload

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402

MIB = 1 << 20
# What is varied, and its values; all else is the model's.
SWEEPS = {
    "layers": (2, 4, 8, 16, 32),
    "experts": (16, 32, 64, 128, 256),
    "bucket": tuple(mib * MIB for mib in (1, 4, 16, 64, 256, 1024)),
}
LABELS = {"bucket": "bytes of the bucket", "history": "sync"}
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


def draw(result: dict[str, list[Row]], picture: Path) -> None:
    """Draw microseconds a tensor over each of what was varied."""
    figure, panels = plt.subplots(
        1, len(result), figsize=(3.5 * len(result), 3.2), squeeze=False
    )
    for panel, (what, rows) in zip(panels[0], result.items()):
        panel.set(xlabel=LABELS.get(what, what), ylabel="microseconds a tensor")
        if what == "history":
            (row,) = rows
            costs = [seconds / row["tensors"] * 1e6 for seconds in row["seconds"]]
            panel.plot(range(2, len(costs) + 2), costs, ".", color="0.2")
        else:
            costs = [median(row["seconds"]) / row["tensors"] * 1e6 for row in rows]
            panel.plot([row[what] for row in rows], costs, "o-", color="0.2")
            panel.set_xscale("log", base=2)
        panel.set_ylim(bottom=0)
        panel.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(picture, dpi=150)


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
    parser.add_argument("--picture", type=Path)
    options = parser.parse_args()
    layers, *sizes = MODELS[options.model]
    workload = Workload(options.layers or layers, *sizes, options.bucket)
    result: dict[str, list[Row]] = {}
    for what in options.sweeps:
        rows = sweep(workload, what, options.repeats, options.history)
        result[what] = list(rows)
        if options.out is not None:
            options.out.write_text(json.dumps(result, indent=2) + "\n")
    if options.picture is not None:
        draw(result, options.picture)
    Console(width=110).print(table(result))


if __name__ == "__main__":
    main()
