# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""What a checkpoint holds, before anything is quantised: one slot a tensor."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum, auto

import torch


class Part(Enum):
    """The parts of a model that a quantised checkpoint may hold in FP8."""

    ATTENTION = auto()
    DENSE = auto()
    EXPERTS = auto()


@dataclass(frozen=True)
class Sizes:
    """Dimensions of a model; the defaults make a checkpoint of a few megabytes.

    Attributes:
        layers: Number of decoder layers.
        experts: Number of routed experts a layer.
        hidden: Width of the residual stream.
        intermediate: Width of one routed expert; a dense MLP is `2 * hidden` wide.
        heads: Number of query heads.
        kv_heads: Number of key and value heads.
        head_dim: Width of one head.
        vocab: Number of token ids.
    """

    layers: int = 2
    experts: int = 8
    hidden: int = 256
    intermediate: int = 128
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    vocab: int = 1024

    @property
    def dense(self) -> int:
        """Width of a dense MLP."""
        return 2 * self.hidden


@dataclass(frozen=True)
class Draw:
    """How a tensor's values are drawn: normally distributed, in `dtype`."""

    mean: float = 0.0
    std: float = 0.05
    dtype: torch.dtype = torch.bfloat16


WEIGHT = Draw()
EMBEDDING = Draw(std=1.0)
# Around one, yet never all ones: a norm that was not loaded must show.
NORM = Draw(mean=1.0, std=0.1)
FLOAT_BIAS = Draw(dtype=torch.float32)


@dataclass(frozen=True)
class Slot:
    """One tensor of an unquantised checkpoint.

    Attributes:
        name: The name the released checkpoints give it.
        shape: Its shape; a projection's is [out features, in features].
        draw: The distribution of its values.
        part: The part of the model it belongs to; None is never quantised.
        reads: The activation that a projection reads, where it shares one with others:
            such projections were calibrated together and share their input scale.
    """

    name: str
    shape: tuple[int, ...]
    draw: Draw = WEIGHT
    part: Part | None = None
    reads: str = ""

    @property
    def module(self) -> str:
        """The name of the module that owns the tensor."""
        return self.name.rpartition(".")[0]

    @property
    def is_linear(self) -> bool:
        """Whether a quantisation has to be told to leave it alone."""
        return self.name.endswith(".weight") and len(self.shape) == 2


def projection(
    module: str, out_features: int, in_features: int, part: Part, reads: str = ""
) -> Slot:
    """A linear layer's weight, [out_features, in_features], which may be quantised."""
    shape = (out_features, in_features)
    return Slot(f"{module}.weight", shape, part=part, reads=reads or module)


def norm(module: str, width: int) -> Slot:
    """An RMSNorm's weight, [width]."""
    return Slot(f"{module}.weight", (width,), NORM)


def gated_mlp(
    module: str,
    hidden: int,
    intermediate: int,
    part: Part,
    names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj"),
) -> Iterator[Slot]:
    """The gate, up and down projections of one MLP or one expert, named by `names`."""
    gate, up, down = (f"{module}.{name}" for name in names)
    yield projection(gate, intermediate, hidden, part, reads=module)
    yield projection(up, intermediate, hidden, part, reads=module)
    yield projection(down, hidden, intermediate, part)


def attention(module: str, sizes: Sizes, bias: tuple[str, ...] = ()) -> Iterator[Slot]:
    """The q, k, v and o projections of grouped-query attention.

    Args:
        module: Name of the attention module.
        sizes: Dimensions of the model.
        bias: The projections that have a bias, by their letter.
    """
    query, key = sizes.heads * sizes.head_dim, sizes.kv_heads * sizes.head_dim
    for letter, width in dict(q=query, k=key, v=key).items():
        name = f"{module}.{letter}_proj"
        yield projection(name, width, sizes.hidden, Part.ATTENTION, reads=module)
        if letter in bias:
            yield Slot(f"{name}.bias", (width,))
    yield projection(f"{module}.o_proj", sizes.hidden, query, Part.ATTENTION)
    if "o" in bias:
        yield Slot(f"{module}.o_proj.bias", (sizes.hidden,))


def embedding(module: str, sizes: Sizes) -> Slot:
    """The token embedding, [vocab, hidden]."""
    return Slot(f"{module}.weight", (sizes.vocab, sizes.hidden), EMBEDDING)


def head(sizes: Sizes) -> Slot:
    """The output projection, [vocab, hidden]."""
    return Slot("lm_head.weight", (sizes.vocab, sizes.hidden))


def decoder(
    layer: Callable[[str, Sizes], Iterator[Slot]], sizes: Sizes
) -> Iterator[Slot]:
    """A decoder whose layers are alike; `layer` gives the slots of one, by its name."""
    yield embedding("model.embed_tokens", sizes)
    for index in range(sizes.layers):
        yield from layer(f"model.layers.{index}", sizes)
    yield norm("model.norm", sizes.hidden)
    yield head(sizes)
