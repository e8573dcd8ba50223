# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Times a layer of FP8 experts on the base's kernels, on ours, and without checks.

    python -m benchmarks.kernels.moe.bench --out moe.json

All contestants take turns in one run, as CUDA graphs, on inputs that take turns too.
The base runs twice: how far it is from itself is what a ratio of 1 is worth.
"""

import argparse
import json
import sys
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from importlib.metadata import version
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch

from benchmarks.kernels.moe.timing import alternating, capture
from tests.kernels.moe.layers import Layer, base_kernels, checks
from tests.kernels.moe.problems import MODELS, Experts

TOKENS = (1, 8, 32, 128, 512, 2048, 8192)
CUDA = torch.device("cuda")
# Bytes and dense FP8 operations a second, from NVIDIA's data sheets (SXM).
PEAKS = {"H100": (3.35e12, 1.979e15), "H200": (4.8e12, 1.979e15)}


def contestants(layer: Layer, m: int, rounds: int) -> dict[str, Callable[[], Any]]:
    """Capture each contestant's graph of a layer, by name."""
    inputs = [layer.inputs(m, seed) for seed in range(rounds)]
    launches = [partial(layer.run, *each) for each in inputs]
    on_base = partial(base_kernels, layer.experts, m)
    modes = {
        "base": on_base,
        "ours": nullcontext,
        "unchecked": partial(checks, "off"),
        "base again": on_base,
    }
    graphs = {}
    for name, mode in modes.items():
        with mode():
            graphs[name] = capture(launches)
    return graphs


def floor_ms(experts: Experts, m: int) -> float | None:
    """The time that weights alone take to be read, or products to be made.

    An expert is idle if no token picked it: (1 - T / E) ** M of them on average.
    """
    for name, (bandwidth, operations) in PEAKS.items():
        if name in torch.cuda.get_device_name():
            size = 3 * experts.hidden * experts.intermediate
            busy = 1 - (1 - experts.top_k / experts.count) ** m
            read = experts.count * busy * size / bandwidth
            return 1e3 * max(read, 2 * m * experts.top_k * size / operations)
    return None


def measure(layer: Layer, m: int, repeats: int) -> dict[str, Any]:
    """Time a layer of so many tokens; milliseconds."""
    rounds = 16 if m <= 128 else 4 if m <= 512 else 2
    times = alternating(contestants(layer, m, rounds), repeats, rounds)
    base = median(times["base"])
    row: dict[str, Any] = {"tokens": m, "floor": floor_ms(layer.experts, m)}
    for name, each in times.items():
        low, *_, high = quantiles(each, n=10)
        row[name] = {"median": median(each), "low": low, "high": high}
    row["ratio"] = {name: median(each) / base for name, each in times.items()}
    row["checks"] = median(
        checked / unchecked
        for checked, unchecked in zip(times["ours"], times["unchecked"])
    )
    return row


def table(model: str, rows: list[dict[str, Any]]) -> str:
    """Return the rows as Markdown."""
    head = [
        "M",
        "base, ms",
        "ours, ms",
        "ours / base",
        "base / base",
        "checks on / off",
    ]
    lines = [f"### {model}", "", " | ".join(head), " | ".join(["--:"] * len(head))]
    for row in rows:
        cells = [
            f"{row['tokens']}",
            f"{row['base']['median']:.4f}",
            f"{row['ours']['median']:.4f}",
            f"{row['ratio']['ours']:.3f}",
            f"{row['ratio']['base again']:.3f}",
            f"{row['checks']:.4f}",
        ]
        lines.append(" | ".join(cells))
    return "\n".join(f"| {line} |" if "|" in line else line for line in lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=MODELS, nargs="+", default=list(MODELS))
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    parser.add_argument("--repeats", type=int, default=31)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    result: dict[str, Any] = {
        "device": torch.cuda.get_device_name(),
        "versions": {name: version(name) for name in ("vllm", "torch", "triton")},
        "command": " ".join(sys.argv[1:]),
        "models": {},
    }
    for model in options.model:
        layer = Layer(MODELS[model], CUDA)
        rows = [measure(layer, m, options.repeats) for m in options.tokens]
        result["models"][model] = rows
        options.out.write_text(json.dumps(result, indent=2) + "\n")
        print(table(model, rows), flush=True)
        del layer


if __name__ == "__main__":
    main()
