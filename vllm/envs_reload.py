# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Environment variables of the weight sync, for `vllm.envs`."""

import os
from collections.abc import Callable
from functools import wraps
from typing import Any

__all__ = ["VARIABLES", "not_compile_factors"]

VARIABLES: dict[str, Callable[[], Any]] = {
    # When synced layers start to serve: "layer", each once it is complete, or "model",
    # all of them at the end, which costs memory for a second model.
    "VLLM_RELOAD_COMMIT": lambda: os.getenv("VLLM_RELOAD_COMMIT", "layer"),
    # Where the old weights of layers that serve new ones already are kept until a sync
    # is over, to be put back if it fails: "host", in its memory, or "off", nowhere.
    "VLLM_RELOAD_ROLLBACK": lambda: os.getenv("VLLM_RELOAD_ROLLBACK", "off"),
    # Whether a tensor that was synced before takes the same way past its loader.
    "VLLM_RELOAD_PLAN": lambda: os.getenv("VLLM_RELOAD_PLAN", "1") == "1",
    # File to which the report of each sync is written, in place of the one before;
    # none by default. With several ranks, one file each.
    "VLLM_RELOAD_REPORT": lambda: os.getenv("VLLM_RELOAD_REPORT", ""),
    # Whether syncs take checksums of the tensors that they are sent.
    "VLLM_RELOAD_CHECKSUMS": lambda: os.getenv("VLLM_RELOAD_CHECKSUMS", "0") == "1",
    # What to do about a bad weight scale: "raise", "warn" or "off".
    "VLLM_MOE_SCALE_CHECK": lambda: os.getenv("VLLM_MOE_SCALE_CHECK", "raise"),
}


def not_compile_factors(
    compile_factors: Callable[[], dict[str, object]],
) -> Callable[[], dict[str, object]]:
    """Keep these variables out of the keys of compiled graphs."""

    @wraps(compile_factors)
    def without_variables() -> dict[str, object]:
        factors = compile_factors()
        return {k: v for k, v in factors.items() if k not in VARIABLES}

    return without_variables
