# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Draws what the benchmark measured: time over the floor against tokens.

python -m benchmarks.kernels.moe.plot moe.json moe.png
"""

from pathlib import Path

import matplotlib

from benchmarks.drawing import draw_result

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402


def draw(result: dict, picture: Path) -> None:
    """Draw one panel a model; without a floor, times themselves."""
    models = result["models"]
    figure, panels = plt.subplots(
        1, len(models), figsize=(4 * len(models), 3.5), squeeze=False, sharey=True
    )
    for panel, (model, rows) in zip(panels[0], models.items()):
        tokens = [row["tokens"] for row in rows]
        for name in ("base", "ours", "unchecked"):
            times = [row[name]["median"] / (row["floor"] or 1) for row in rows]
            panel.plot(tokens, times, marker=".", label=name)
        panel.set(title=model, xlabel="tokens", xscale="log", yscale="log")
        panel.grid(which="both", alpha=0.3)
    has_floor = next(iter(models.values()))[0]["floor"] is not None
    panels[0][0].set_ylabel("time / floor" if has_floor else "ms")
    panels[0][0].legend()
    versions = ", ".join(f"{name} {v}" for name, v in result["versions"].items())
    figure.suptitle(f"{result['device']}: {versions}", fontsize="small")
    figure.tight_layout()
    figure.savefig(picture, dpi=150)


if __name__ == "__main__":
    draw_result(draw, __doc__.splitlines()[0])
