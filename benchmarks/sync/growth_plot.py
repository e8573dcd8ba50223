# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Draws how the cost of a sync grew, with what.

python -m benchmarks.sync.growth_plot growth.json growth.png
"""

import argparse
import json
from pathlib import Path
from statistics import median
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402

LABELS = {"bucket": "bytes of the bucket", "history": "sync"}


def draw(result: dict[str, list[dict[str, Any]]], picture: Path) -> None:
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
    parser.add_argument("result", type=Path)
    parser.add_argument("picture", type=Path)
    options = parser.parse_args()
    draw(json.loads(options.result.read_text()), options.picture)


if __name__ == "__main__":
    main()
