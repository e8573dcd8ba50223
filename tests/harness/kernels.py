# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Triton's kernels where vLLM leaves Triton out, as it does without a GPU.

Triton's interpreter needs no GPU, and neither does compiling for one.
"""

from importlib import import_module
from importlib.util import find_spec
from unittest import mock

from vllm import triton_utils


def import_kernels(*modules: str) -> None:
    """Import these modules with Triton itself, before anything else imports them."""
    if find_spec("triton") is None:
        return
    import triton
    import triton.language as tl

    for module in modules:
        import_module(module.rpartition(".")[0])  # others do without Triton
        with mock.patch.multiple(triton_utils, triton=triton, tl=tl):
            import_module(module)
