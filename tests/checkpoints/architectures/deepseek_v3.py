# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""DeepSeek-V3: latent attention, a dense first layer, shared experts, a router bias."""

from collections.abc import Iterator

from ..case import Architecture
from ..slots import (
    FLOAT_BIAS,
    Part,
    Sizes,
    Slot,
    embedding,
    gated_mlp,
    head,
    norm,
    projection,
)

Q_RANK = 128
# As released: kernels for latent attention know 512 + 64 and little else.
KV_RANK = 512
ROPE = 64
NOPE = 64


def _config(sizes: Sizes) -> dict[str, object]:
    return dict(
        model_type="deepseek_v3",
        num_hidden_layers=sizes.layers,
        intermediate_size=sizes.dense,
        moe_intermediate_size=sizes.intermediate,
        n_routed_experts=sizes.experts,
        n_shared_experts=1,
        num_experts_per_tok=2,
        first_k_dense_replace=1,
        moe_layer_freq=1,
        n_group=2,
        topk_group=1,
        topk_method="noaux_tc",
        scoring_func="sigmoid",
        norm_topk_prob=True,
        routed_scaling_factor=2.5,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.heads,
        q_lora_rank=Q_RANK,
        kv_lora_rank=KV_RANK,
        qk_nope_head_dim=NOPE,
        qk_rope_head_dim=ROPE,
        v_head_dim=sizes.head_dim,
        max_position_embeddings=512,
        rms_norm_eps=1e-6,
        rope_theta=10000.0,
        tie_word_embeddings=False,
        hidden_act="silu",
        attention_bias=False,
        num_nextn_predict_layers=0,
    )


def _slots(sizes: Sizes) -> Iterator[Slot]:
    yield embedding("model.embed_tokens", sizes)
    for index in range(sizes.layers):
        layer = f"model.layers.{index}"
        yield norm(f"{layer}.input_layernorm", sizes.hidden)
        yield from _latent_attention(f"{layer}.self_attn", sizes)
        yield norm(f"{layer}.post_attention_layernorm", sizes.hidden)
        yield from _moe(f"{layer}.mlp", sizes) if index else _dense(layer, sizes)
    yield norm("model.norm", sizes.hidden)
    yield head(sizes)


def _latent_attention(module: str, sizes: Sizes) -> Iterator[Slot]:
    part, hidden, heads = Part.ATTENTION, sizes.hidden, sizes.heads
    kv_width = heads * (NOPE + sizes.head_dim)
    yield projection(f"{module}.q_a_proj", Q_RANK, hidden, part, reads=module)
    yield norm(f"{module}.q_a_layernorm", Q_RANK)
    yield projection(f"{module}.q_b_proj", heads * (NOPE + ROPE), Q_RANK, part)
    name = f"{module}.kv_a_proj_with_mqa"
    yield projection(name, KV_RANK + ROPE, hidden, part, reads=module)
    yield norm(f"{module}.kv_a_layernorm", KV_RANK)
    yield projection(f"{module}.kv_b_proj", kv_width, KV_RANK, part)
    yield projection(f"{module}.o_proj", hidden, heads * sizes.head_dim, part)


def _dense(layer: str, sizes: Sizes) -> Iterator[Slot]:
    return gated_mlp(f"{layer}.mlp", sizes.hidden, sizes.dense, Part.DENSE)


def _moe(module: str, sizes: Sizes) -> Iterator[Slot]:
    hidden, width = sizes.hidden, sizes.intermediate
    yield Slot(f"{module}.gate.weight", (sizes.experts, hidden))
    bias = f"{module}.gate.e_score_correction_bias"
    yield Slot(bias, (sizes.experts,), FLOAT_BIAS)
    for expert in range(sizes.experts):
        yield from gated_mlp(f"{module}.experts.{expert}", hidden, width, Part.EXPERTS)
    yield from gated_mlp(f"{module}.shared_experts", hidden, width, Part.DENSE)


DEEPSEEK_V3 = Architecture("DeepseekV3ForCausalLM", _config, _slots)
