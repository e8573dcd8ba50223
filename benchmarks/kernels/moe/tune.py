# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Finds the fastest tiles of the FP8 fused mixture of experts on this GPU.

    python -m benchmarks.kernels.moe.tune --model Qwen3-30B-A3B

writes the table that vLLM looks for. Each count of tokens is written as soon as it is
known, and one that the table has already is skipped: start again what was interrupted.
"""

import argparse
import json
import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from itertools import product
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
import triton

from benchmarks.kernels.moe.timing import milliseconds
from tests.kernels.moe.problems import MODELS, Experts, Problem, problem, route, weights
from vllm.model_executor.layers.fused_moe import tile as tile_module
from vllm.model_executor.layers.fused_moe.fp8_grouped_gemm import fp8_grouped_gemm
from vllm.model_executor.layers.fused_moe.scale_watch import scale_watch
from vllm.model_executor.layers.fused_moe.tile import Tile

TABLES = Path(tile_module.__file__).parent / "configs"
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
BLOCK = (128, 128)
GROUPS = (1, 8, 32)
FINALISTS = 4
CUDA = torch.device("cuda")


def table_name(experts: Experts, device_name: str) -> str:
    """Return the name by which vLLM looks for a table."""
    device = device_name.replace(" ", "_")
    device = "NVIDIA_H200" if "H200" in device.split("_") else device
    return (
        f"E={experts.count},N={experts.intermediate},device_name={device},"
        f"dtype=fp8_w8a8,block_shape=[{BLOCK[0]},{BLOCK[1]}].json"
    )


# Widths, slices, warps, and registers of a thread (0: as many as it likes), by height.
_SHORT = ((64, 1, 4, 0), (128, 1, 4, 0), (128, 1, 8, 0), (256, 2, 4, 0), (256, 2, 8, 0))
SHAPES = {
    16: _SHORT,
    32: _SHORT,
    64: (
        (128, 1, 4, 0),
        (128, 2, 4, 0),
        (128, 2, 4, 128),
        (128, 2, 4, 160),
        (256, 2, 4, 0),
        (256, 2, 8, 0),
        (256, 2, 8, 128),
    ),
    128: (
        (128, 1, 8, 0),
        (128, 2, 8, 0),
        (128, 2, 8, 128),
        (256, 2, 8, 0),
        (256, 2, 16, 0),
    ),
}
STAGES = (2, 3, 4, 5)


def tiles(block_m: int, is_second: bool) -> Iterator[Tile]:
    """Candidates of one height, with a group of one block."""
    for shape, stages, tma_b in product(SHAPES[block_m], STAGES, (False, True)):
        block_n, slices_n, num_warps, registers = shape
        options = dict(num_warps=num_warps, num_stages=stages)
        if registers:
            options["maxnreg"] = registers
        deep = stages == 5 and block_m >= 64
        shallow = stages == 2 and (block_m != 64 or block_n != 256)
        if not is_second and block_n != 2 * BLOCK[1]:
            continue
        if _fits(block_m, block_n, stages) and not deep and not shallow:
            yield Tile(block_m, block_n, BLOCK[1], 1, slices_n, tma_b, options)


def _fits(block_m: int, block_n: int, stages: int) -> bool:
    """Whether a tile's buffers of A and B fit into shared memory."""
    limit = torch.cuda.get_device_properties(0).shared_memory_per_block_optin
    return (block_m + block_n) * BLOCK[1] * stages <= limit - 1024


def heights(m: int, experts: Experts) -> list[int]:
    """Heights of routed blocks that are worth a try."""
    each = m * experts.top_k / experts.count
    return [h for h in SHAPES if min(each / 4, 64) <= h <= max(16, 2 * each)]


class Bench:
    """The two products of a layer with some tokens, on inputs that take turns.

    Args:
        experts: the model's experts.
        b_and_scales: weights of the first and of the second product.
        m: tokens.

    """

    def __init__(self, experts: Experts, b_and_scales: list[Any], m: int):
        seeds = range(4 if m <= 512 else 1)
        self._problems = [
            [
                problem(
                    m,
                    *experts.product(is_second),
                    BLOCK,
                    seed,
                    device=CUDA,
                    experts=experts.count,
                    top_k=experts.top_k,
                    is_second=is_second,
                    b_and_scale=b_and_scales[is_second],
                )
                for seed in seeds
            ]
            for is_second in (False, True)
        ]

    def milliseconds(
        self, is_second: bool, tile: Tile, block_m: int, repeats: int
    ) -> float:
        """Time a product, checks included; infinite if the tile cannot be run."""
        problems = self._problems[is_second]
        launches = [launch(p, is_second, tile, block_m) for p in problems]
        try:
            return milliseconds(launches * min(repeats, 4), repeats)
        except triton.runtime.errors.OutOfResources:
            return float("inf")

    def best(self, is_second: bool, block_m: int) -> tuple[float, Tile]:
        """Return the fastest tile of a product and its time."""
        half = block_m // 2
        heights = [block_m, half] if is_second and half >= 64 else [block_m]
        time = partial(self.milliseconds, is_second, block_m=block_m)
        candidates = [t for h in heights for t in tiles(h, is_second)]
        candidates.sort(key=partial(time, repeats=1))
        finalists = [
            replace(tile, group_m=g)
            for tile, g in product(candidates[:FINALISTS], GROUPS)
        ]
        timed = [(time(tile, repeats=7), tile) for tile in finalists]
        return min(timed, key=itemgetter(0))


def launch(p: Problem, is_second: bool, tile: Tile, block_m: int) -> Callable[[], None]:
    """Return what runs a product as the layer does, checks included."""
    m, top_k, n = *p.experts.shape, p.b.shape[1]
    c, c_scale = p.b.new_empty(m, top_k, n, dtype=torch.bfloat16), None
    if not is_second:
        c = p.b.new_empty(m, top_k, n // 2)
        c_scale = p.a_scale.new_empty(m, top_k, n // 2 // BLOCK[1])
    return partial(
        fp8_grouped_gemm,
        p.a,
        p.b,
        c,
        p.a_scale,
        p.b_scale,
        route(p, block_m),
        tile,
        BLOCK,
        topk_weights=p.weights if is_second else None,
        watch=scale_watch(CUDA),
        c_scale=c_scale,
    )


def compile_tile(job: tuple[Experts, bool, Tile]) -> None:
    """Put a kernel into Triton's cache on the disk: one for all N and all M."""
    experts, is_second, tile = job
    _, k = experts.product(is_second)
    shape = dict(experts=experts.top_k, top_k=experts.top_k, is_second=is_second)
    p = problem(16, 2 * BLOCK[0], k, BLOCK, device=CUDA, **shape)
    try:
        launch(p, is_second, tile, tile.block_m)()
    except triton.runtime.errors.OutOfResources:
        return


def compile_all(experts: Experts, heights: Iterable[int]) -> None:
    """Compile what will be timed, on all cores."""
    jobs = [
        (experts, is_second, tile)
        for is_second, height in product((False, True), sorted(heights))
        for tile in tiles(height, is_second)
    ]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(os.cpu_count(), mp_context=context) as pool:
        list(pool.map(compile_tile, jobs, chunksize=2))


def tune(experts: Experts, tokens: Iterable[int], table: Path) -> None:
    """Fill a table with the fastest tiles of each count of tokens."""
    entries = json.loads(table.read_text()) if table.exists() else {}
    missing = [m for m in tokens if str(m) not in entries]
    compile_all(experts, {h for m in missing for h in heights(m, experts)})
    random = torch.Generator(CUDA).manual_seed(0)
    products = (experts.product(is_second) for is_second in (False, True))
    b_and_scales = [weights(experts.count, *nk, BLOCK, random) for nk in products]
    for m in missing:
        bench = Bench(experts, b_and_scales, m)
        pairs = [
            (bench.best(False, height), bench.best(True, height))
            for height in heights(m, experts)
        ]
        (first_ms, first), (second_ms, second) = min(
            pairs, key=lambda pair: pair[0][0] + pair[1][0]
        )
        print(f"M = {m}: {first_ms:.4f} + {second_ms:.4f} ms", flush=True)
        entries[str(m)] = {**first.entries(), "SECOND": second.entries()}
        ordered = dict(sorted(entries.items(), key=lambda item: int(item[0])))
        table.write_text(json.dumps(ordered, indent=4) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=MODELS, nargs="+", default=list(MODELS))
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    parser.add_argument("--tables", type=Path, default=TABLES)
    options = parser.parse_args()
    options.tables.mkdir(exist_ok=True)
    for model in options.model:
        name = table_name(MODELS[model], torch.cuda.get_device_name())
        print(f"{model}: {name}", flush=True)
        tune(MODELS[model], options.tokens, options.tables / name)


if __name__ == "__main__":
    main()
