# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Every kernel compiles for every GPU it is meant for, with none at hand.

What the interpreter runs cannot be compiled, so one process compiles without it:

    python -m tests.kernels.moe.test_ahead_of_time outcomes.json
"""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from importlib import import_module
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from tests.harness.kernels import import_kernels

TARGETS = {
    "sm_80": ("cuda", 80, 32),
    "sm_89": ("cuda", 89, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "sm_120": ("cuda", 120, 32),
    "gfx942": ("hip", "gfx942", 64),
}
BINARIES = {"cuda": "cubin", "hip": "hsaco"}
PACKAGE = "vllm.model_executor"


@dataclass(frozen=True)
class Kernel:
    """A kernel in one specialisation, and what it is meant for.

    Attributes:
        path: module under `PACKAGE` and the kernel's name there.
        targets: names of `TARGETS`.
        signature: Triton's type of each argument that is no constexpr.
        constexprs: value of each argument that is one.
        options: of Triton's compiler, such as `num_warps`.

    """

    path: str
    targets: tuple[str, ...]
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any]
    options: Mapping[str, Any] = field(default_factory=dict)


_GEMM_SIZES = (
    "slot",
    "N",
    "K",
    "num_blocks_m",
    "num_slots",
    "group_size_m",
    "routed_block_m",
    "stride_am",
    "stride_be",
    "stride_bn",
    "stride_cm",
    "stride_asm",
    "stride_ask",
    "stride_bse",
    "stride_bsn",
    "stride_bsk",
    "stride_bias_e",
)
_COPY_SIZES = (
    "copies",
    "rows",
    "run",
    "words",
    "source_outer",
    "source_row",
    "target_outer",
    "target_row",
)
_GEMM = Kernel(
    path="layers.fused_moe.fp8_grouped_gemm:fp8_grouped_gemm_kernel",
    targets=("sm_89", "sm_90", "sm_100", "sm_120"),
    signature=dict(
        a_ptr="*fp8e4nv",
        b_ptr="*fp8e4nv",
        c_ptr="*bf16",
        a_scale_ptr="*fp32",
        b_scale_ptr="*fp32",
        topk_weights_ptr="*fp32",
        slots_ptr="*i32",
        experts_ptr="*i32",
        padded_ptr="*i32",
        device_word_ptr="*i64",
        host_word_ptr="*i64",
        **dict.fromkeys(_GEMM_SIZES, "i32"),
    ),
    constexprs=dict(
        b_desc=None,
        c_scale_ptr=None,
        bias_ptr=None,
        GROUP_N=128,
        GROUP_K=128,
        TOP_K=8,
        SWAP_AB=False,
        BLOCK_SIZE_M=64,
        BLOCK_SIZE_N=128,
        BLOCK_SIZE_K=128,
        SLICES_N=1,
        CHECKED_BLOCKS=16,
        SCALE_ROWS=16,
        SCALE_COLUMNS=16,
    ),
    options=dict(num_warps=4, num_stages=3),
)
_COPY = Kernel(
    path="kernels.strided_copy:_copy_runs_kernel",
    targets=("sm_80", "sm_90", "sm_100", "sm_120", "gfx942"),
    signature={"table": "*i64", "copies": "i32"},
    constexprs=dict(WORD="int64", ALIGNED=16, BLOCK=2048),
)
KERNELS = {
    "gemm, blocks": _GEMM,
    "gemm, few tokens": replace(
        _GEMM,
        constexprs={**_GEMM.constexprs, "SWAP_AB": True, "BLOCK_SIZE_M": 16},
    ),
    "gemm, slices": replace(
        _GEMM,
        targets=("sm_90", "sm_100", "sm_120"),
        signature={**_GEMM.signature, "b_desc": "tensordesc<fp8e4nv[64, 128]>"},
        constexprs={k: v for k, v in _GEMM.constexprs.items() if k != "b_desc"}
        | {"SLICES_N": 2},
    ),
    "gemm, gated": replace(
        _GEMM,
        targets=("sm_90", "sm_100"),
        signature={
            **_GEMM.signature,
            "b_desc": "tensordesc<fp8e4nv[128, 128]>",
            "c_ptr": "*fp8e4nv",
            "c_scale_ptr": "*fp32",
        },
        constexprs={
            k: v
            for k, v in _GEMM.constexprs.items()
            if k not in ("b_desc", "c_scale_ptr")
        }
        | {"SLICES_N": 2, "BLOCK_SIZE_N": 256},
        options=dict(num_warps=8, num_stages=3),
    ),
    "gemm, channels": replace(
        _GEMM,
        constexprs={**_GEMM.constexprs, "GROUP_N": 1, "GROUP_K": 0},
    ),
    "scan": Kernel(
        path="layers.fused_moe.scale_scan:_scan_kernel",
        targets=("sm_80", "sm_90", "sm_100", "sm_120", "gfx942"),
        signature={"tensors": "*i64"},
        constexprs={"CHUNK": 2048},
    ),
    "copy, runs": _COPY,
    "copy, rows": replace(
        _COPY,
        path="kernels.strided_copy:_copy_rows_kernel",
        signature={"table": "*i64", **dict.fromkeys(_COPY_SIZES, "i32")},
    ),
    "copy, bytes": replace(_COPY, constexprs=dict(WORD="int8", ALIGNED=1, BLOCK=4096)),
    "sums": replace(
        _COPY,
        path="kernels.group_sums:_sum_kernel",
        signature={"table": "*i64", "sums": "*i64"},
        constexprs={"BLOCK": 1024},
    ),
}
CASES = [pair for name, k in KERNELS.items() for pair in product([name], k.targets)]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory) -> dict[str, str]:
    """What compiling came to, by kernel and target."""
    folder = tmp_path_factory.mktemp("ahead_of_time")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(folder / "cache")  # compile, do not look up
    command = [sys.executable, "-m", "tests.kernels.moe.test_ahead_of_time"]
    subprocess.run([*command, folder / "outcomes.json"], env=environment, check=True)
    return json.loads((folder / "outcomes.json").read_text())


@pytest.mark.parametrize("kernel, target", CASES)
def test_compiles(kernel, target, outcomes):
    assert outcomes[f"{kernel} {target}"] == "compiled"


def _constant(value: Any) -> Any:
    """A constexpr's value; a type of Triton's is written as its name."""
    import triton.language as tl

    return getattr(tl, value) if isinstance(value, str) else value


def compile_for(kernel: Kernel, target: str) -> str:
    """Compile a kernel, and say "compiled" or why it cannot be."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    module, name = kernel.path.split(":")
    import_kernels(f"{PACKAGE}.{module}")
    source = ASTSource(
        fn=getattr(import_module(f"{PACKAGE}.{module}"), name),
        signature={**kernel.signature, **dict.fromkeys(kernel.constexprs, "constexpr")},
        constexprs={n: _constant(v) for n, v in kernel.constexprs.items()},
    )
    gpu = GPUTarget(*TARGETS[target])
    try:
        compiled = triton.compile(source, target=gpu, options=dict(kernel.options))
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "compiled" if compiled.asm[BINARIES[gpu.backend]] else "empty binary"


if __name__ == "__main__":
    outcomes_of = {f"{k} {t}": compile_for(KERNELS[k], t) for k, t in CASES}
    Path(sys.argv[1]).write_text(json.dumps(outcomes_of, indent=2))
