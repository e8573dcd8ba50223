# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Mixtral: experts whose projections are called w1 (gate), w3 (up) and w2 (down)."""

from collections.abc import Iterator
from functools import partial

from ..case import Architecture
from ..slots import Part, Sizes, Slot, attention, decoder, gated_mlp, norm


def _config(sizes: Sizes) -> dict[str, object]:
    return dict(
        model_type="mixtral",
        num_hidden_layers=sizes.layers,
        intermediate_size=sizes.intermediate,
        num_local_experts=sizes.experts,
        num_experts_per_tok=2,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.kv_heads,
        max_position_embeddings=512,
        rms_norm_eps=1e-5,
        rope_theta=10000.0,
        tie_word_embeddings=False,
        hidden_act="silu",
        sliding_window=None,
    )


def _layer(layer: str, sizes: Sizes) -> Iterator[Slot]:
    yield norm(f"{layer}.input_layernorm", sizes.hidden)
    yield from attention(f"{layer}.self_attn", sizes)
    yield norm(f"{layer}.post_attention_layernorm", sizes.hidden)
    moe = f"{layer}.block_sparse_moe"
    yield Slot(f"{moe}.gate.weight", (sizes.experts, sizes.hidden))
    for expert in range(sizes.experts):
        yield from gated_mlp(
            f"{moe}.experts.{expert}",
            sizes.hidden,
            sizes.intermediate,
            Part.EXPERTS,
            names=("w1", "w3", "w2"),
        )


MIXTRAL = Architecture("MixtralForCausalLM", _config, partial(decoder, _layer))
