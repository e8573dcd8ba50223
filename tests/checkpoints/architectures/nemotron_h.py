# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Nemotron-H: Mamba2, attention and MLP layers in turn, all called `mixer`."""

from collections.abc import Iterator

from ..case import Architecture
from ..slots import (
    Draw,
    Part,
    Sizes,
    Slot,
    attention,
    embedding,
    head,
    norm,
    projection,
)

PATTERN = "M*-"
STATE = 64
GROUPS = 2
KERNEL = 4

# Its exponential is the decay of the state.
LOG_DECAY = Draw(mean=1.0, std=0.5)


def _pattern(sizes: Sizes) -> str:
    """One letter a layer: M is Mamba2, * attention, - an MLP."""
    return "".join(PATTERN[index % len(PATTERN)] for index in range(sizes.layers))


def _config(sizes: Sizes) -> dict[str, object]:
    return dict(
        model_type="nemotron_h",
        num_hidden_layers=sizes.layers,
        hybrid_override_pattern=_pattern(sizes),
        intermediate_size=sizes.dense,
        mlp_hidden_act="relu2",
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.kv_heads,
        head_dim=sizes.head_dim,
        mamba_num_heads=sizes.heads,
        mamba_head_dim=sizes.head_dim,
        ssm_state_size=STATE,
        n_groups=GROUPS,
        conv_kernel=KERNEL,
        use_conv_bias=True,
        chunk_size=128,
        max_position_embeddings=512,
        layer_norm_epsilon=1e-5,
        tie_word_embeddings=False,
        attention_bias=False,
        mlp_bias=False,
        use_bias=False,
    )


def _slots(sizes: Sizes) -> Iterator[Slot]:
    mixers = {"M": _mamba, "*": attention, "-": _mlp}
    yield embedding("backbone.embeddings", sizes)
    for index, letter in enumerate(_pattern(sizes)):
        layer = f"backbone.layers.{index}"
        yield norm(f"{layer}.norm", sizes.hidden)
        yield from mixers[letter](f"{layer}.mixer", sizes)
    yield norm("backbone.norm_f", sizes.hidden)
    yield head(sizes)


def _mamba(module: str, sizes: Sizes) -> Iterator[Slot]:
    inner = sizes.heads * sizes.head_dim
    convolved = inner + 2 * GROUPS * STATE
    fused = inner + convolved + sizes.heads
    yield projection(f"{module}.in_proj", fused, sizes.hidden, Part.DENSE)
    yield Slot(f"{module}.conv1d.weight", (convolved, 1, KERNEL))
    yield Slot(f"{module}.conv1d.bias", (convolved,))
    yield Slot(f"{module}.A_log", (sizes.heads,), LOG_DECAY)
    yield Slot(f"{module}.D", (sizes.heads,))
    yield Slot(f"{module}.dt_bias", (sizes.heads,))
    yield norm(f"{module}.norm", inner)
    yield projection(f"{module}.out_proj", sizes.hidden, inner, Part.DENSE)


def _mlp(module: str, sizes: Sizes) -> Iterator[Slot]:
    yield projection(f"{module}.up_proj", sizes.dense, sizes.hidden, Part.DENSE)
    yield projection(f"{module}.down_proj", sizes.hidden, sizes.dense, Part.DENSE)


NEMOTRON_H = Architecture("NemotronHForCausalLM", _config, _slots)
