# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Draws what the benchmark measured: seconds, and memory, of the base and the fork.

python -m benchmarks.sync.plot sync.json sync.png
"""

from pathlib import Path
from statistics import median
from typing import Any

import matplotlib

from benchmarks.drawing import draw_result

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402

STYLES = {"base": dict(color="0.75"), "fork": dict(color="0.35", hatch="//")}
WIDTH = 0.4


def draw(result: dict[str, Any], picture: Path) -> None:
    """Draw medians with the least and the most, and peaks where they were measured."""
    answers = result["answers"]
    has_peaks = any(a["peak"] for a in answers["sync"]["fork"])
    figure, panels = plt.subplots(
        1, 1 + has_peaks, figsize=(5.5 * (1 + has_peaks), 3.5), squeeze=False
    )
    seconds, *memory = panels[0]
    _bars(seconds, answers, list(answers), "seconds")
    seconds.set(ylabel="seconds", yscale="log")
    for panel in memory:
        _bars(panel, answers, [kind for kind in answers if kind != "copy"], "peak")
        panel.set_ylabel("GPU memory above rest, bytes")
    seconds.legend()
    layers, experts, *_ = result["workload"]
    figure.suptitle(
        f"{result['model']}, {layers} layers x {experts} experts: {result['tensors']} "
        f"tensors, {result['bytes'] / 1e9:.2f} GB; vLLM {result['vllm']}",
        fontsize="small",
    )
    figure.tight_layout()
    figure.savefig(picture, dpi=150)


def _bars(panel: Any, answers: dict, kinds: list[str], what: str) -> None:
    for shift, (side, style) in zip((-WIDTH / 2, WIDTH / 2), STYLES.items()):
        values = [[a[what] for a in answers[kind][side]] for kind in kinds]
        heights = [median(each) for each in values]
        spread = [
            [height - min(each) for height, each in zip(heights, values)],
            [max(each) - height for height, each in zip(heights, values)],
        ]
        places = [place + shift for place in range(len(kinds))]
        panel.bar(places, heights, WIDTH, yerr=spread, capsize=3, label=side, **style)
    panel.set_xticks(range(len(kinds)), kinds)
    panel.grid(axis="y", alpha=0.3)


if __name__ == "__main__":
    draw_result(draw, __doc__.splitlines()[0])
