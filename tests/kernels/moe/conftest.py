# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Triton's interpreter, with FP8 rounded as GPUs round it."""

import os

import pytest


@pytest.fixture(autouse=True)
def _round_fp8_to_nearest(monkeypatch):
    """Let torch round: the interpreter cuts off, and loses carries into exponents."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        return
    import torch
    import triton.language as tl
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def rounded(values, from_dtype, to_dtype, rounding_mode):
        if (from_dtype, to_dtype) != (tl.float32, tl.float8e4nv):
            return convert(values, from_dtype, to_dtype, rounding_mode)
        return (
            torch.from_numpy(values).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
        )

    monkeypatch.setattr(interpreter, "_convert_float", rounded)
