# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The combinations of architecture and quantisation that exist and make sense."""

from .architectures import (
    DEEPSEEK_V3,
    GPT_OSS,
    LLAMA,
    MIXTRAL,
    NEMOTRON_H,
    QWEN2_MOE,
    QWEN3_MOE,
)
from .case import Case
from .quantization import CompressedChannel, CompressedTensor, Fp8Block, Fp8Tensor
from .slots import Part, Sizes

EXPERTS = frozenset({Part.EXPERTS})
STATIC = Fp8Tensor(activation_scheme="static")

CASES = {
    "qwen3_moe-bf16": Case(QWEN3_MOE),
    # Kernels want multiples of 32: vLLM pads each expert to a width of 128.
    "qwen3_moe-bf16-padded_experts": Case(QWEN3_MOE, sizes=Sizes(intermediate=112)),
    "qwen3_moe-fp8_block": Case(QWEN3_MOE, Fp8Block()),
    "qwen3_moe-fp8_block-bf16_attention": Case(QWEN3_MOE, Fp8Block(), EXPERTS),
    "qwen3_moe-fp8_block-fp8_kv": Case(QWEN3_MOE, Fp8Block(), kv_cache_dtype="fp8"),
    "qwen3_moe-fp8_tensor": Case(QWEN3_MOE, Fp8Tensor()),
    "qwen3_moe-fp8_tensor_static": Case(QWEN3_MOE, STATIC),
    "qwen3_moe-compressed_channel": Case(QWEN3_MOE, CompressedChannel()),
    "qwen3_moe-compressed_tensor_static": Case(QWEN3_MOE, CompressedTensor()),
    "mixtral-bf16": Case(MIXTRAL),
    "mixtral-fp8_tensor_static": Case(MIXTRAL, STATIC),
    "deepseek_v3-bf16": Case(DEEPSEEK_V3),
    "deepseek_v3-fp8_block": Case(DEEPSEEK_V3, Fp8Block()),
    "qwen2_moe-bf16": Case(QWEN2_MOE),
    "qwen2_moe-fp8_block": Case(QWEN2_MOE, Fp8Block()),
    "gpt_oss-bf16": Case(GPT_OSS),
    "llama-bf16": Case(LLAMA),
    # vLLM pads the embedding, and with it the tied output projection, to 1024 rows.
    "llama-bf16-padded_vocab": Case(LLAMA, sizes=Sizes(vocab=1000)),
    "llama-fp8_block": Case(LLAMA, Fp8Block()),
    "nemotron_h-bf16": Case(NEMOTRON_H, sizes=Sizes(layers=3)),
}
