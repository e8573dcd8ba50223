# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The architectures, one a module, named as vLLM names their models."""

from .deepseek_v3 import DEEPSEEK_V3
from .gpt_oss import GPT_OSS
from .llama import LLAMA
from .mixtral import MIXTRAL
from .nemotron_h import NEMOTRON_H
from .qwen2_moe import QWEN2_MOE
from .qwen3_moe import QWEN3_MOE

__all__ = [
    "DEEPSEEK_V3",
    "GPT_OSS",
    "LLAMA",
    "MIXTRAL",
    "NEMOTRON_H",
    "QWEN2_MOE",
    "QWEN3_MOE",
]
