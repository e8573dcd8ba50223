# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""gpt-oss in bfloat16: experts fused in one tensor a layer, biases, attention sinks."""

from collections.abc import Iterator
from functools import partial

from ..case import Architecture
from ..slots import Sizes, Slot, attention, decoder, norm


def _config(sizes: Sizes) -> dict[str, object]:
    return dict(
        model_type="gpt_oss",
        num_hidden_layers=sizes.layers,
        intermediate_size=sizes.intermediate,
        num_local_experts=sizes.experts,
        num_experts_per_tok=2,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.kv_heads,
        head_dim=sizes.head_dim,
        max_position_embeddings=512,
        rms_norm_eps=1e-5,
        rope_theta=150000.0,
        rope_scaling=dict(
            rope_type="yarn",
            factor=32.0,
            beta_fast=32.0,
            beta_slow=1.0,
            truncate=False,
            original_max_position_embeddings=16,
        ),
        sliding_window=128,
        layer_types=[
            ("sliding_attention", "full_attention")[index % 2]
            for index in range(sizes.layers)
        ],
        tie_word_embeddings=False,
        hidden_act="silu",
        attention_bias=True,
        swiglu_limit=7.0,
    )


def _layer(layer: str, sizes: Sizes) -> Iterator[Slot]:
    hidden, width, experts = sizes.hidden, sizes.intermediate, sizes.experts
    yield norm(f"{layer}.input_layernorm", hidden)
    yield from attention(f"{layer}.self_attn", sizes, bias=("q", "k", "v", "o"))
    yield Slot(f"{layer}.self_attn.sinks", (sizes.heads,))
    yield norm(f"{layer}.post_attention_layernorm", hidden)
    yield Slot(f"{layer}.mlp.router.weight", (experts, hidden))
    yield Slot(f"{layer}.mlp.router.bias", (experts,))
    # Gate and up alternate in the last dimension; the weights are [in, out].
    fused = f"{layer}.mlp.experts"
    yield Slot(f"{fused}.gate_up_proj", (experts, hidden, 2 * width))
    yield Slot(f"{fused}.gate_up_proj_bias", (experts, 2 * width))
    yield Slot(f"{fused}.down_proj", (experts, width, hidden))
    yield Slot(f"{fused}.down_proj_bias", (experts, hidden))


GPT_OSS = Architecture("GptOssForCausalLM", _config, partial(decoder, _layer))
