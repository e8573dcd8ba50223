# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Qwen3-MoE: norms on q and k, routed experts only."""

from collections.abc import Iterator
from functools import partial

from ..case import Architecture
from ..slots import Part, Sizes, Slot, attention, decoder, gated_mlp, norm


def _config(sizes: Sizes) -> dict[str, object]:
    return dict(
        model_type="qwen3_moe",
        num_hidden_layers=sizes.layers,
        intermediate_size=sizes.dense,
        moe_intermediate_size=sizes.intermediate,
        num_experts=sizes.experts,
        num_experts_per_tok=2,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.kv_heads,
        head_dim=sizes.head_dim,
        max_position_embeddings=512,
        rms_norm_eps=1e-6,
        rope_theta=10000.0,
        tie_word_embeddings=False,
        decoder_sparse_step=1,
        mlp_only_layers=[],
        norm_topk_prob=True,
        hidden_act="silu",
        attention_bias=False,
    )


def _layer(layer: str, sizes: Sizes) -> Iterator[Slot]:
    yield norm(f"{layer}.input_layernorm", sizes.hidden)
    yield from attention(f"{layer}.self_attn", sizes)
    yield norm(f"{layer}.self_attn.q_norm", sizes.head_dim)
    yield norm(f"{layer}.self_attn.k_norm", sizes.head_dim)
    yield norm(f"{layer}.post_attention_layernorm", sizes.hidden)
    yield Slot(f"{layer}.mlp.gate.weight", (sizes.experts, sizes.hidden))
    for expert in range(sizes.experts):
        module = f"{layer}.mlp.experts.{expert}"
        yield from gated_mlp(module, sizes.hidden, sizes.intermediate, Part.EXPERTS)


QWEN3_MOE = Architecture("Qwen3MoeForCausalLM", _config, partial(decoder, _layer))
