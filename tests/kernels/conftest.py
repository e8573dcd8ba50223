# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The fork's kernels run in Triton's interpreter where there is no GPU."""

from tests.harness.kernels import import_kernels

import_kernels(
    "vllm.model_executor.kernels.group_sums",
    "vllm.model_executor.kernels.strided_copy",
    "vllm.model_executor.layers.fused_moe.fp8_grouped_gemm",
    "vllm.model_executor.layers.fused_moe.scale_scan",
)
