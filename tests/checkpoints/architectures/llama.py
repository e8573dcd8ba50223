# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Llama 3.2: dense, its output projection tied to the token embedding."""

from collections.abc import Iterator

from ..case import Architecture
from ..slots import Part, Sizes, Slot, attention, gated_mlp, norm


def _config(sizes: Sizes) -> dict[str, object]:
    return dict(
        model_type="llama",
        num_hidden_layers=sizes.layers,
        intermediate_size=sizes.dense,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.kv_heads,
        head_dim=sizes.head_dim,
        max_position_embeddings=512,
        rms_norm_eps=1e-5,
        rope_theta=500000.0,
        tie_word_embeddings=True,
        hidden_act="silu",
        attention_bias=False,
        mlp_bias=False,
    )


def _slots(sizes: Sizes) -> Iterator[Slot]:
    # Small, since it is the output projection too: else every token answers itself.
    yield Slot("model.embed_tokens.weight", (sizes.vocab, sizes.hidden))
    for index in range(sizes.layers):
        layer = f"model.layers.{index}"
        yield norm(f"{layer}.input_layernorm", sizes.hidden)
        yield from attention(f"{layer}.self_attn", sizes)
        yield norm(f"{layer}.post_attention_layernorm", sizes.hidden)
        yield from gated_mlp(f"{layer}.mlp", sizes.hidden, sizes.dense, Part.DENSE)
    yield norm("model.norm", sizes.hidden)


LLAMA = Architecture("LlamaForCausalLM", _config, _slots)
