# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Draws what a sync did to each layer, and when, from the report that it wrote.

    VLLM_RELOAD_REPORT=sync.json ...
    python -m benchmarks.sync.timeline sync.json timeline.png

A layer is staged from the first tensor that it is sent to the moment it serves.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402

from vllm.model_executor.model_loader.reload.sync_report import (  # noqa: E402
    LayerReport,
    SyncReport,
    read_report,
)

# Of what overlaps, the last is on top. Told apart without colours.
STYLES = {
    "staged": dict(color="0.85"),
    "receive": dict(facecolor="white", edgecolor="0.2", hatch="////", linewidth=0.5),
    "check": dict(color="0.55"),
    "commit": dict(color="0.1"),
}
ROW_INCHES = 0.17
# No picture is higher; of more layers each has less room, and some have no name.
MAX_ROWS = 120


def draw(report: SyncReport, picture: Path) -> None:
    """Draw a row for each layer, in the model's order from above."""
    rows = min(MAX_ROWS, len(report.layers))
    figure, panel = plt.subplots(figsize=(9, 1.6 + ROW_INCHES * rows))
    for place, layer in enumerate(report.layers):
        for name, style in STYLES.items():
            bars = [(start, end - start) for start, end in _spans(layer, name, report)]
            panel.broken_barh(bars, (place - 0.4, 0.8), **style)
    pause = report.seconds - report.pause_seconds
    if report.pause_seconds:
        panel.axvline(pause, color="black", linestyle="--", linewidth=1)
    _label(panel, report)
    figure.tight_layout()
    figure.savefig(picture, dpi=150)
    plt.close(figure)


def _spans(layer: LayerReport, name: str, report: SyncReport) -> Any:
    if name == "staged":
        end = report.seconds if layer.committed_at is None else layer.committed_at
        return [(start, end) for start, _ in layer.received]
    return {"receive": layer.received, "check": layer.checked}.get(
        name, layer.processed
    )


def _label(panel: Any, report: SyncReport) -> None:
    handles: list[Any] = [plt.Rectangle((0, 0), 1, 1, **s) for s in STYLES.values()]
    names = list(STYLES)
    if report.pause_seconds:
        handles.append(plt.Line2D([], [], color="black", linestyle="--", linewidth=1))
        names.append("no request runs from here on")
    panel.legend(
        handles,
        names,
        ncols=len(names),
        fontsize="small",
        loc="lower left",
        bbox_to_anchor=(0, 1),
    )
    step = -(-len(report.layers) // MAX_ROWS) or 1
    shown: Sequence[int] = range(0, len(report.layers), step)
    panel.set_yticks(shown, [report.layers[n].name for n in shown], fontsize=7)
    panel.set(xlim=(0, report.seconds), xlabel="seconds from the start of the sync")
    panel.set_ylim(max(1, len(report.layers)) - 0.5, -0.5)
    panel.set_ylabel("layer")
    panel.grid(axis="x", alpha=0.3)
    panel.set_title(
        f"{report.model}, rank {report.rank}: sync {report.result}, "
        f"{report.bytes / 1e6:.1f} MB in {report.seconds:.2f} s",
        pad=28,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("report", type=Path)
    parser.add_argument("picture", type=Path)
    options = parser.parse_args()
    draw(read_report(options.report), options.picture)


if __name__ == "__main__":
    main()
