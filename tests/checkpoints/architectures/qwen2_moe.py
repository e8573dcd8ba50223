# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Qwen2-MoE: biases on q, k and v, and a shared expert behind a gate of its own."""

from collections.abc import Iterator
from functools import partial

from ..case import Architecture
from ..slots import Part, Sizes, Slot, attention, decoder, gated_mlp, norm


def _config(sizes: Sizes) -> dict[str, object]:
    return dict(
        model_type="qwen2_moe",
        num_hidden_layers=sizes.layers,
        intermediate_size=sizes.dense,
        moe_intermediate_size=sizes.intermediate,
        shared_expert_intermediate_size=sizes.dense,
        num_experts=sizes.experts,
        num_experts_per_tok=2,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.kv_heads,
        max_position_embeddings=512,
        rms_norm_eps=1e-6,
        rope_theta=10000.0,
        tie_word_embeddings=False,
        decoder_sparse_step=1,
        mlp_only_layers=[],
        norm_topk_prob=False,
        hidden_act="silu",
        qkv_bias=True,
    )


def _layer(layer: str, sizes: Sizes) -> Iterator[Slot]:
    hidden = sizes.hidden
    yield norm(f"{layer}.input_layernorm", hidden)
    yield from attention(f"{layer}.self_attn", sizes, bias=("q", "k", "v"))
    yield norm(f"{layer}.post_attention_layernorm", hidden)
    yield Slot(f"{layer}.mlp.gate.weight", (sizes.experts, hidden))
    for expert in range(sizes.experts):
        module = f"{layer}.mlp.experts.{expert}"
        yield from gated_mlp(module, hidden, sizes.intermediate, Part.EXPERTS)
    yield from gated_mlp(f"{layer}.mlp.shared_expert", hidden, sizes.dense, Part.DENSE)
    yield Slot(f"{layer}.mlp.shared_expert_gate.weight", (1, hidden))


QWEN2_MOE = Architecture("Qwen2MoeForCausalLM", _config, partial(decoder, _layer))
